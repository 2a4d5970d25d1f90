import pytest

from poise.errors import InvalidRequest
from poise.runtime.config.settings import ServiceConfig
from poise.runtime.service import Readiness, ServiceApp


class Oven(ServiceApp):
    """A service with only the required methods."""

    name = "oven"
    grpc_services = ()

    def register(self, server):
        pass

    async def start(self):
        pass

    async def drain(self):
        pass

    async def stop(self):
        pass

    def readiness(self):
        return Readiness(True)

    def status(self):
        return {}


@pytest.mark.parametrize("action", ["pause", "resume", "checkpoint"])
async def test_unsupported_operation_is_rejected_by_name(action):
    with pytest.raises(InvalidRequest, match="the oven service"):
        await getattr(Oven(ServiceConfig()), action)()


def test_failure_is_recorded_with_its_reason():
    app = Oven(ServiceConfig())
    app.fail("the gas is out")
    assert app.failed.is_set()
    assert app.failure == "the gas is out"


def test_services_have_separate_metrics():
    assert Oven(ServiceConfig()).registry is not Oven(ServiceConfig()).registry
