"""The REST admin app of a service: health, metrics, status, settings, and operations such as pause and drain."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Header, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ConfigDict, Field, RootModel
from starlette.exceptions import HTTPException

import poise
from poise.errors import InvalidRequest, PoiseError
from poise.runtime.admin.docs_page import HEADERS, docs_page
from poise.runtime.admin.request_guard import BodyRejected, Guard
from poise.runtime.config.settings import AdminConfig
from poise.runtime.config.text import redacted
from poise.runtime.network.addresses import EVERY_HOST
from poise.runtime.network.auth import BearerAuth
from poise.runtime.rpc.interceptors import disk_error, is_disk_error
from poise.runtime.rpc.validation import Violations, quoted
from poise.runtime.service import ServiceApp

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

_FIELD_CHARS = 200


class WrongField(BaseModel):
    """One wrong field of a request."""

    field: str = Field(description="A query parameter, or a path within the body.")
    description: str = Field(description="The problem and what is allowed.")


class ErrorResponse(BaseModel):
    """The body of every error response."""

    reason: str = Field(description="The error, as in `poise.v1.ErrorReason` without its prefix.")
    message: str = Field(description="What happened.")
    remedy: str = Field(description="What to do about it. May be empty.")
    violations: list[WrongField] = Field([], description="Every wrong field, if the reason is INVALID_REQUEST.")


class ServiceState(BaseModel):
    """The service, and whether it accepts work."""

    service: str = Field(description="Short name of the service.")
    version: str = Field(description="Version of the program.")
    ready: bool = Field(description="Whether the service accepts work now.")
    reason: str = Field(description="Why it is not ready; during a start the stage and its seconds. Empty if ready.")


class ServiceStatus(ServiceState):
    """The state, and further facts that differ from service to service."""

    model_config = ConfigDict(extra="allow")


class CurrentSettings(RootModel[dict[str, Any]]):
    """The settings as a tree, as in a YAML file. `--show-defaults` explains every setting."""


class Checkpointed(BaseModel):
    """The checkpoint that was written, and further facts of the service."""

    model_config = ConfigDict(extra="allow")

    path: str = Field(description="Folder of the checkpoint on the service's file system.")


_ADMIN_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": description}
    for status, description in {
        401: "The bearer token is missing or wrong.",
        403: "A web page of another origin, a host that is not allowed, or a change without the header `X-Poise`.",
        408: "The body did not arrive in time.",
        413: "The body is too large.",
        422: "A field is wrong, or this service does not support the operation.",
        500: "A bug. The service's log has the traceback.",
        503: "The service is starting or shutting down, or one of its backends does not respond.",
    }.items()
}


def build_admin_app(app: ServiceApp, auth: BearerAuth, request_drain: Callable[[], None]) -> FastAPI:
    """Return the app. `/healthz`, `/readyz` and `/metrics` are open; `/admin` requires the token if there is one."""
    rest = FastAPI(
        title=f"POISE {app.name} service",
        version=poise.__version__,
        description="Health, metrics, status and operations of one service. Its work is done over gRPC. Requests that "
        "change something require the header `X-Poise: 1` or a bearer token; web pages can send neither.",
        docs_url=None,
        redoc_url=None,
    )
    rest.add_exception_handler(PoiseError, _answer_error)
    rest.add_exception_handler(RequestValidationError, _answer_invalid_request)
    rest.add_exception_handler(HTTPException, _answer_http_error)
    rest.add_exception_handler(OSError, _answer_disk_error)
    rest.add_exception_handler(Exception, _answer_bug)
    rest.include_router(_health_routes(app), tags=["health"])
    admin = APIRouter(prefix="/admin/v1", responses=_ADMIN_ERRORS)
    admin.include_router(_operations(app, request_drain))
    extra = app.admin_routes()
    if extra is not None:
        admin.include_router(extra)
    rest.include_router(admin, tags=["admin"], dependencies=[Depends(_describe_header)])
    rest.add_middleware(Guard, auth=auth, allowed_hosts=_hosts(app.config.admin), respond=_error_response)

    @rest.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(docs_page(rest.openapi()), headers=HEADERS)

    return rest


def _hosts(config: AdminConfig) -> tuple[str, ...]:
    """Return the allowed names in a Host header. 0.0.0.0 and :: are not among them: web pages can use these."""
    own = () if config.host in EVERY_HOST else (config.host,)
    return (*own, *config.allowed_hosts)


def _describe_header(
    x_poise: Annotated[str | None, Header(description="`1`. Required for a POST without a bearer token.")] = None,
) -> None:
    """Describe the header in the OpenAPI document; the guard checks it."""


def _health_routes(app: ServiceApp) -> APIRouter:
    router = APIRouter()

    @router.get(
        "/healthz",
        summary="Whether the process is healthy; 503 with the reason if it should be killed.",
        response_class=PlainTextResponse,
        responses={503: {"description": "The reason.", "content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def healthz(response: Response) -> str:
        if app.failed.is_set():  # it exits by itself, unless the failure prevents that
            response.status_code = 503
            return app.failure
        return "ok"

    @router.get(
        "/readyz",
        summary="Whether the service accepts work now; 503 with the reason if not.",
        response_class=PlainTextResponse,
        responses={503: {"description": "The reason.", "content": {"text/plain": {"schema": {"type": "string"}}}}},
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

    @router.get("/status", summary="State of the service, and facts about its work.")
    async def status() -> ServiceStatus:
        return ServiceStatus(**(state().model_dump() | app.status()))

    @router.get("/config", summary="The current settings, secrets masked.")
    async def config() -> CurrentSettings:
        return CurrentSettings(redacted(app.config))

    @router.post("/pause", summary="Reject new work until resume.")
    async def pause() -> ServiceState:
        await app.pause()
        return state()

    @router.post("/resume", summary="Accept work again.")
    async def resume() -> ServiceState:
        await app.resume()
        return state()

    @router.post("/drain", status_code=202, summary="Finish running work, make the state durable, and exit.")
    async def drain() -> ServiceState:
        request_drain()
        return state()

    @router.post("/checkpoint", summary="Make the state durable now.")
    async def checkpoint() -> Checkpointed:
        return Checkpointed(**await app.checkpoint())

    return router


class _AsciiJson(JSONResponse):
    """JSON in ASCII: a request may contain text that UTF-8 cannot encode."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False).encode()


def _error_response(error: PoiseError | BodyRejected) -> Response:
    if isinstance(error, BodyRejected):
        answer = ErrorResponse(
            reason="INVALID_REQUEST", message=error.message, remedy="Send a smaller body, without pauses."
        )
        return _AsciiJson(answer.model_dump(), error.status)
    answer = ErrorResponse(
        reason=error.reason,
        message=error.message,
        remedy=error.remedy,
        violations=[WrongField(field=one.field, description=one.description) for one in error.violations]
        if isinstance(error, InvalidRequest)
        else [],
    )
    headers = {}
    if error.status == "UNAUTHENTICATED":
        headers["WWW-Authenticate"] = "Bearer"
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, round(error.retry_after_s)))
    return _AsciiJson(answer.model_dump(), _HTTP_STATUS.get(error.status, 500), headers)


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, PoiseError)  # noqa: S101 (registered only for it)
    return _error_response(error)


async def _answer_invalid_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101 (registered only for it)
    violations = Violations()
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"][1:])
        violations.add(where if len(where) <= _FIELD_CHARS else quoted(where), problem["msg"])
    return _error_response(violations.error())


async def _answer_http_error(request: Request, error: Exception) -> Response:
    """Answer an unknown path, or a method that the path does not have."""
    assert isinstance(error, HTTPException)  # noqa: S101 (registered only for it)
    reason = "NOT_FOUND" if error.status_code == 404 else "INVALID_REQUEST"
    answer = ErrorResponse(reason=reason, message=error.detail, remedy="See /docs for the routes.")
    return _AsciiJson(answer.model_dump(), error.status_code, error.headers)


async def _answer_disk_error(request: Request, error: Exception) -> Response:
    if not is_disk_error(error):
        raise error
    logger.error("%s failed: %s", request.url.path, error)
    return await _answer_error(request, disk_error(error))


async def _answer_bug(request: Request, error: Exception) -> Response:
    """Hide the exception; uvicorn logs the traceback."""
    answer = ErrorResponse(reason="INTERNAL", message="a bug in the service. Its log has the traceback", remedy="")
    return _AsciiJson(answer.model_dump(), 500)
