"""The REST admin app of a service: health, metrics, status, settings, and the few things an operator may do."""

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
from poise.runtime.admin.request_guard import BodyRefused, Guard
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
        403: "A web page of another origin, a host that is not allowed, or a change without the header `X-Poise`.",
        408: "The body did not come in time.",
        413: "The body is too large.",
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
        description="Health, metrics, status and operation of one service. Its work is done over gRPC. Requests that "
        "change something need the header `X-Poise: 1`, or a bearer token; web pages can send neither.",
        docs_url=None,
        redoc_url=None,
    )
    rest.add_exception_handler(PoiseError, _answer_error)
    rest.add_exception_handler(RequestValidationError, _answer_wrong_request)
    rest.add_exception_handler(HTTPException, _answer_http_error)
    rest.add_exception_handler(OSError, _answer_disk_error)
    rest.add_exception_handler(Exception, _answer_defect)
    rest.include_router(_probes(app), tags=["health"])
    admin = APIRouter(prefix="/admin/v1", responses=_ADMIN_ERRORS)
    admin.include_router(_operations(app, request_drain))
    extra = app.admin_routes()
    if extra is not None:
        admin.include_router(extra)
    rest.include_router(admin, tags=["admin"], dependencies=[Depends(_describe_header)])
    rest.add_middleware(Guard, auth=auth, allowed_hosts=_hosts(app.config.admin), answer=_refusal)

    @rest.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(docs_page(rest.openapi()), headers=HEADERS)

    return rest


def _hosts(config: AdminConfig) -> tuple[str, ...]:
    """Return the names that the app goes by. That of every interface is none: web pages may use it to reach them."""
    own = () if config.host in EVERY_HOST else (config.host,)
    return (*own, *config.allowed_hosts)


def _describe_header(
    x_poise: Annotated[str | None, Header(description="`1`. Required of a POST without a bearer token.")] = None,
) -> None:
    """Describe the header in the OpenAPI document; the guard checks it."""


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


class _Answer(JSONResponse):
    """JSON in ASCII: what a request holds may be no text that UTF-8 can write."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False).encode()


def _refusal(error: PoiseError | BodyRefused) -> Response:
    if isinstance(error, BodyRefused):
        answer = ErrorAnswer(reason="INVALID_REQUEST", message=error.message, remedy="Send a smaller body, at once.")
        return _Answer(answer.model_dump(), error.status)
    answer = ErrorAnswer(
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
    return _Answer(answer.model_dump(), _HTTP_STATUS.get(error.status, 500), headers)


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, PoiseError)  # noqa: S101 (registered for it alone)
    return _refusal(error)


async def _answer_wrong_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101 (registered for it alone)
    wrong = Violations()
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"][1:])
        wrong.add(where if len(where) <= _FIELD_CHARS else quoted(where), problem["msg"])
    return _refusal(wrong.error())


async def _answer_http_error(request: Request, error: Exception) -> Response:
    """An unknown path, or a method that it does not have."""
    assert isinstance(error, HTTPException)  # noqa: S101 (registered for it alone)
    reason = "NOT_FOUND" if error.status_code == 404 else "INVALID_REQUEST"
    answer = ErrorAnswer(reason=reason, message=error.detail, remedy="See /docs for what there is.")
    return _Answer(answer.model_dump(), error.status_code, error.headers)


async def _answer_disk_error(request: Request, error: Exception) -> Response:
    if not is_disk_error(error):
        raise error
    logger.error("%s failed: %s", request.url.path, error)
    return await _answer_error(request, disk_error(error))


async def _answer_defect(request: Request, error: Exception) -> Response:
    """Say nothing of it: uvicorn logs the traceback."""
    answer = ErrorAnswer(reason="INTERNAL", message="a defect in the service; its log holds the traceback", remedy="")
    return _Answer(answer.model_dump(), 500)
