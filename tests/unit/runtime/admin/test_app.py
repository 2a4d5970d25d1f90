"""Health of the admin app."""

import httpx
from tests.unit.runtime.test_service import Oven

from poise.runtime.admin.app import build_admin_app
from poise.runtime.config.settings import ServiceConfig
from poise.runtime.network.auth import BearerAuth


async def test_failed_service_that_does_not_exit_is_unhealthy():
    oven = Oven(ServiceConfig())
    rest = httpx.ASGITransport(build_admin_app(oven, BearerAuth(None), lambda: None))
    async with httpx.AsyncClient(transport=rest, base_url="http://oven") as client:
        alive = await client.get("/healthz")
        assert (alive.status_code, alive.text) == (200, "ok")
        oven.fail("the engine hangs")
        dead = await client.get("/healthz")
        assert (dead.status_code, dead.text) == (503, "the engine hangs")
