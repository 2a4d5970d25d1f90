"""The REST admin app of a service: health, metrics, status, settings, and the few things an operator may do."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ConfigDict, Field, RootModel
from starlette.exceptions import HTTPException

import poise
from poise.errors import FieldViolation, InvalidRequest, PoiseError
from poise.runtime.app import ServiceApp
from poise.runtime.auth import BearerAuth
from poise.runtime.config_text import redacted
from poise.runtime.interceptors import disk_error, is_disk_error

logger = logging.getLogger(__name__)

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


class WrongField(BaseModel):
    """One wrong field of a request."""

    field: str = Field(description="Where: a query parameter, or a path within the body.")
    description: str = Field(description="What is wrong and what would be right.")


class ErrorAnswer(BaseModel):
    """What every refusal holds."""

    reason: str = Field(description="Which error, as in `poise.v1.ErrorReason` without its prefix.")
    message: str = Field(description="What happened.")
    remedy: str = Field(description="What to do about it. May be empty.")
    violations: list[WrongField] = Field([], description="Of INVALID_REQUEST: every wrong field.")


class ServiceState(BaseModel):
    """Who answers, and whether it accepts work."""

    service: str = Field(description="Its short name.")
    version: str = Field(description="Of the program.")
    ready: bool = Field(description="Whether work is accepted now.")
    reason: str = Field(description="Why not; while it starts, what it does and for how long. Empty while it is.")


class ServiceStatus(ServiceState):
    """That, and what the service holds and does: facts of its own, which differ from service to service."""

    model_config = ConfigDict(extra="allow")


class SettingsInForce(RootModel[dict[str, Any]]):
    """The tree of settings, as a YAML file would hold it: every setting has its meaning in `--show-defaults`."""


class Checkpointed(BaseModel):
    """What was made durable, and facts of the service's own about it."""

    model_config = ConfigDict(extra="allow")

    path: str = Field(description="The folder, on the service's file system.")


_ADMIN_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": description}
    for status, description in {
        401: "No bearer token, or a wrong one.",
        422: "A field is wrong, or this service cannot do that.",
        500: "A defect; the service's log holds the traceback.",
        503: "The service is starting or shutting down, or something it stands on does not answer.",
    }.items()
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
    rest.add_exception_handler(RequestValidationError, _answer_wrong_request)
    rest.add_exception_handler(HTTPException, _answer_http_error)
    rest.add_exception_handler(OSError, _answer_disk_error)
    rest.add_exception_handler(Exception, _answer_defect)
    rest.include_router(_probes(app), tags=["health"])

    def authenticate(request: Request) -> None:
        auth.check(request.headers.get("authorization"))

    admin = APIRouter(prefix="/admin/v1", dependencies=[Depends(authenticate)], responses=_ADMIN_ERRORS)
    admin.include_router(_operations(app, request_drain))
    extra = app.admin_routes()
    if extra is not None:
        admin.include_router(extra)
    rest.include_router(admin, tags=["admin"])
    return rest


def _probes(app: ServiceApp) -> APIRouter:
    router = APIRouter()

    @router.get(
        "/healthz",
        summary="Whether the process works; 503 says why it should be killed.",
        response_class=PlainTextResponse,
        responses={503: {"description": "Why not.", "content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def healthz(response: Response) -> str:
        if app.failed.is_set():  # it ends by itself, unless what failed keeps it from ending
            response.status_code = 503
            return app.failure
        return "ok"

    @router.get(
        "/readyz",
        summary="Whether work is accepted now; 503 says why not.",
        response_class=PlainTextResponse,
        responses={503: {"description": "Why not.", "content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def readyz(response: Response) -> str:
        readiness = app.readiness()
        if readiness.ready:
            return "ready"
        response.status_code = 503
        return readiness.text

    @router.get("/metrics", summary="Prometheus metrics.", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(generate_latest(app.registry), media_type=CONTENT_TYPE_LATEST)

    return router


def _operations(app: ServiceApp, request_drain: Callable[[], None]) -> APIRouter:
    router = APIRouter()

    def state() -> ServiceState:
        readiness = app.readiness()
        return ServiceState(service=app.name, version=poise.__version__, ready=readiness.ready, reason=readiness.text)

    @router.get("/status", summary="What the service holds and does.")
    async def status() -> ServiceStatus:
        return ServiceStatus(**(state().model_dump() | app.status()))

    @router.get("/config", summary="The settings in force, secrets masked.")
    async def config() -> SettingsInForce:
        return SettingsInForce(redacted(app.config))

    @router.post("/pause", summary="Refuse new work until resume.")
    async def pause() -> ServiceState:
        await app.pause()
        return state()

    @router.post("/resume", summary="Accept work again.")
    async def resume() -> ServiceState:
        await app.resume()
        return state()

    @router.post("/drain", status_code=202, summary="Finish the work in hand, make the state durable, and exit.")
    async def drain() -> ServiceState:
        request_drain()
        return state()

    @router.post("/checkpoint", summary="Make the state durable now.")
    async def checkpoint() -> Checkpointed:
        return Checkpointed(**await app.checkpoint())

    return router


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, PoiseError)  # noqa: S101 (registered for it alone)
    violations = error.violations if isinstance(error, InvalidRequest) else ()
    answer = ErrorAnswer(
        reason=error.reason,
        message=error.message,
        remedy=error.remedy,
        violations=[WrongField(field=violation.field, description=violation.description) for violation in violations],
    )
    headers = {}
    if error.status == "UNAUTHENTICATED":
        headers["WWW-Authenticate"] = "Bearer"
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, round(error.retry_after_s)))
    return JSONResponse(answer.model_dump(), _HTTP_STATUS.get(error.status, 500), headers)


async def _answer_wrong_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101 (registered for it alone)
    violations = [
        FieldViolation(".".join(str(part) for part in problem["loc"][1:]), problem["msg"]) for problem in error.errors()
    ]
    return await _answer_error(request, InvalidRequest(violations))


async def _answer_http_error(request: Request, error: Exception) -> Response:
    """An unknown path, or a method that it does not have."""
    assert isinstance(error, HTTPException)  # noqa: S101 (registered for it alone)
    reason = "NOT_FOUND" if error.status_code == 404 else "INVALID_REQUEST"
    answer = ErrorAnswer(reason=reason, message=error.detail, remedy="See /docs for what there is.")
    return JSONResponse(answer.model_dump(), error.status_code, error.headers)


async def _answer_disk_error(request: Request, error: Exception) -> Response:
    if not is_disk_error(error):
        raise error
    logger.error("%s failed: %s", request.url.path, error)
    return await _answer_error(request, disk_error(error))


async def _answer_defect(request: Request, error: Exception) -> Response:
    """Say nothing of it: uvicorn logs the traceback."""
    answer = ErrorAnswer(reason="INTERNAL", message="a defect in the service; its log holds the traceback", remedy="")
    return JSONResponse(answer.model_dump(), 500)
