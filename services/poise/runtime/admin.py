"""The REST admin app of a service: health, metrics, status, settings, and the few things an operator may do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

import poise
from poise.errors import InvalidRequest, PoiseError
from poise.runtime.app import ServiceApp
from poise.runtime.auth import BearerAuth
from poise.runtime.config import redacted

_HTTP_STATUS = {
    "INVALID_ARGUMENT": 422,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "FAILED_PRECONDITION": 409,
    "ABORTED": 409,
    "RESOURCE_EXHAUSTED": 429,
    "UNAVAILABLE": 503,
}


def build_admin_app(app: ServiceApp, auth: BearerAuth, request_drain: Callable[[], None]) -> FastAPI:
    """Construct the app. `/healthz`, `/readyz` and `/metrics` are open; `/admin` needs the token when there is one."""
    rest = FastAPI(
        title=f"POISE {app.name} service",
        version=poise.__version__,
        description="Health, metrics, status and operation of one service. Its work is done over gRPC.",
        docs_url="/docs",
        redoc_url=None,
    )
    rest.add_exception_handler(PoiseError, _answer_error)
    rest.include_router(_probes(app), tags=["health"])

    def authenticate(request: Request) -> None:
        auth.check(request.headers.get("authorization"))

    admin = APIRouter(prefix="/admin/v1", dependencies=[Depends(authenticate)])
    admin.include_router(_operations(app, request_drain))
    extra = app.admin_routes()
    if extra is not None:
        admin.include_router(extra)
    rest.include_router(admin, tags=["admin"])
    return rest


def _probes(app: ServiceApp) -> APIRouter:
    router = APIRouter()

    @router.get("/healthz", summary="Whether the process answers.", response_class=PlainTextResponse)
    async def healthz() -> str:
        return "ok"

    @router.get("/readyz", summary="Whether work is accepted now; 503 says why not.", response_class=PlainTextResponse)
    async def readyz(response: Response) -> str:
        readiness = app.readiness()
        if readiness.ready:
            return "ready"
        response.status_code = 503
        return readiness.reason

    @router.get("/metrics", summary="Prometheus metrics.")
    async def metrics() -> Response:
        return Response(generate_latest(app.registry), media_type=CONTENT_TYPE_LATEST)

    return router


def _operations(app: ServiceApp, request_drain: Callable[[], None]) -> APIRouter:
    router = APIRouter()

    def state() -> dict[str, Any]:
        readiness = app.readiness()
        return {"service": app.name, "version": poise.__version__, "ready": readiness.ready, "reason": readiness.reason}

    @router.get("/status", summary="What the service holds and does.")
    async def status() -> dict[str, Any]:
        return state() | app.status()

    @router.get("/config", summary="The settings in force, secrets masked.")
    async def config() -> dict[str, Any]:
        return redacted(app.config)

    @router.post("/pause", summary="Refuse new work until resume.")
    async def pause() -> dict[str, Any]:
        await app.pause()
        return state()

    @router.post("/resume", summary="Accept work again.")
    async def resume() -> dict[str, Any]:
        await app.resume()
        return state()

    @router.post("/drain", status_code=202, summary="Finish the work in hand, make the state durable, and exit.")
    async def drain() -> dict[str, Any]:
        request_drain()
        return state()

    @router.post("/checkpoint", summary="Make the state durable now.")
    async def checkpoint() -> dict[str, Any]:
        return await app.checkpoint()

    return router


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, PoiseError)  # noqa: S101 (registered for it alone)
    body: dict[str, Any] = {"reason": error.reason, "message": error.message, "remedy": error.remedy}
    if isinstance(error, InvalidRequest):
        body["violations"] = [{"field": v.field, "description": v.description} for v in error.violations]
    headers = {}
    if error.status == "UNAUTHENTICATED":
        headers["WWW-Authenticate"] = "Bearer"
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, round(error.retry_after_s)))
    return JSONResponse(body, _HTTP_STATUS.get(error.status, 500), headers)
