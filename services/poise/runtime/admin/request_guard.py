"""Checks every HTTP request of the admin app: its origin and token, then the size of its body.

ASGI middleware. A web page in a browser on this machine can reach the app. Three checks reject it: the `Host` header
(DNS rebinding), the `Origin` and `Sec-Fetch-Site` headers, and a header that no form can send.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Callable, Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from poise.errors import Forbidden, PoiseError
from poise.runtime.network.auth import BearerAuth, is_loopback
from poise.runtime.rpc.validation import quoted

MAX_BODY_BYTES = 2**18
"""Largest body, several times a full list of dead letters."""

BODY_TIMEOUT_S = 10.0
"""Time within which a body must arrive."""

CHANGE_HEADER = "x-poise"
"""Header required of requests that change something. Forms cannot send it; scripts need a preflight request for it."""

_PROBES = ("/healthz", "/readyz", "/metrics")
_OPEN = ("/docs", "/openapi.json")
"""Routes without a token."""
_READING = ("GET", "HEAD", "OPTIONS")
_REMEDY = "Use `poise`, curl, or a page of this service's own address."


class BodyRejected(Exception):
    """A body that is too large or too slow, with the HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class Guard:
    """Rejects requests that fail a check; passes on the others with their complete body."""

    def __init__(
        self,
        app: ASGIApp,
        auth: BearerAuth,
        allowed_hosts: Iterable[str],
        respond: Callable[[PoiseError | BodyRejected], Response],
    ) -> None:
        self._app = app
        self._auth = auth
        self._hosts = frozenset(map(_normalized, allowed_hosts))
        self._domains = tuple(f".{host.strip('.')}" for host in self._hosts if host.startswith("."))
        self._respond = respond

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope)
            # A GET needs no body. Waiting for one would let callers without a token occupy connections.
            body = b"" if scope["method"] in _READING else await _read_body(Headers(scope=scope), receive)
        except (PoiseError, BodyRejected) as error:
            await self._respond(error)(scope, receive, send)
            return
        await self._app(scope, _replayed(body, receive), send)

    def _check(self, scope: Scope) -> None:
        if scope["path"] in _PROBES and scope["method"] in _READING:
            return  # a kubelet uses the pod's address, Prometheus any name of the service
        headers = Headers(scope=scope)
        self._check_host(headers, scope)
        if scope["path"] in _OPEN:
            return
        _check_origin(headers)
        self._auth.check(headers.get("authorization"))
        has_token = headers.get("authorization", "").lower().startswith("bearer ")  # URLs can make browsers send Basic
        if scope["method"] not in _READING and not (CHANGE_HEADER in headers or has_token):
            raise Forbidden(
                f"the {scope['method']} request lacks the header {CHANGE_HEADER}, which other sites cannot send",
                remedy="Send `X-Poise: 1`, or a bearer token.",
            )

    def _check_host(self, headers: Headers, scope: Scope) -> None:
        values = headers.getlist("host")
        host = _hostname(f"//{values[0]}") if len(values) == 1 else ""
        own = scope.get("server")
        is_own = own is not None and host == _normalized(own[0])
        if host and (is_own or host in self._hosts or f".{host}".endswith(self._domains) or is_loopback(host)):
            return
        raise Forbidden(
            f"the host {quoted(', '.join(values))} does not belong to this service",
            remedy="Use localhost or the service's own address, or add the name to admin.allowed_hosts.",
        )


def _check_origin(headers: Headers) -> None:
    """Raise `Forbidden` for a request that a browser sent for a page of another origin."""
    site = headers.get("sec-fetch-site", "none")
    if site not in ("none", "same-origin"):
        raise Forbidden(
            f"the request is from a web page of another site (Sec-Fetch-Site: {quoted(site)})", remedy=_REMEDY
        )
    origin, host = headers.get("origin"), headers.get("host", "")
    if origin is not None and origin.lower().partition("://")[2] != host.lower():
        raise Forbidden(
            f"a web page at {quoted(origin)} sent the request; this service is at {quoted(host)}", remedy=_REMEDY
        )


async def _read_body(headers: Headers, receive: Receive) -> bytes:
    """Return the complete body. Raises `BodyRejected` if it is too large or too slow."""
    too_large = BodyRejected(413, f"the body has more than {MAX_BODY_BYTES} bytes")
    declared = headers.get("content-length", "0")
    if not declared.isdecimal() or len(declared) > 12 or int(declared) > MAX_BODY_BYTES:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            while True:
                message = await receive()
                body += message.get("body", b"")
                if len(body) > MAX_BODY_BYTES:
                    raise too_large
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise BodyRejected(408, f"the body did not arrive within {BODY_TIMEOUT_S:.0f} s") from None


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that returns the body first, then later messages."""
    is_replayed = False

    async def replay() -> Message:
        nonlocal is_replayed
        if is_replayed:
            return await receive()
        is_replayed = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _hostname(url: str) -> str:
    """Return the host of a URL without its port; empty if it has none."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 (raises for an invalid port)
    except ValueError:
        return ""
    is_bare = parts.username is None and not (parts.path or parts.query or parts.fragment)
    return _normalized(parts.hostname or "") if is_bare else ""


def _normalized(host: str) -> str:
    """Return a host in one spelling: lower case, without brackets, zone or final dot; IPv4 within IPv6 as IPv4."""
    host = host.strip().lower().strip("[]").partition("%")[0].removesuffix(".")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    return str(getattr(address, "ipv4_mapped", None) or address)
