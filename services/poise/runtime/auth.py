"""Bearer tokens, compared in constant time; and the refusal to listen to the world without one."""

from __future__ import annotations

import hmac
import ipaddress

from poise.errors import Unauthenticated
from poise.runtime.config import ConfigError, ServiceConfig

_SCHEME = "bearer "


class BearerAuth:
    """Checks `authorization` values against the one token; lets everything pass when there is none."""

    def __init__(self, token: str | None) -> None:
        self._token = None if token is None else token.encode()

    @property
    def required(self) -> bool:
        """Whether callers need a token."""
        return self._token is not None

    def check(self, authorization: str | None) -> None:
        """Raise `Unauthenticated` unless `authorization` is `Bearer <the token>`."""
        if self._token is None:
            return
        if authorization is None:
            raise Unauthenticated("no bearer token", remedy="Send `authorization: Bearer <token>`.")
        if not authorization[: len(_SCHEME)].lower() == _SCHEME:
            raise Unauthenticated("not a bearer token", remedy="Send `authorization: Bearer <token>`.")
        given = authorization[len(_SCHEME) :].encode("utf-8", "surrogateescape")
        if not hmac.compare_digest(given, self._token):
            raise Unauthenticated("wrong bearer token", remedy="Check that both sides were given the same token.")


def refuse_open_bind(config: ServiceConfig, token: str | None) -> None:
    """Raise `ConfigError` for a listener beyond this machine that asks for no token, unless that was asked for."""
    if token is not None or config.auth.allow_open_bind:
        return
    problems = [
        f"{section}.host: {host} can be reached from other machines and no token is set; set auth.token_file, "
        "or auth.allow_open_bind: true where something else guards the port"
        for section, host in (("grpc", config.grpc.host), ("admin", config.admin.host))
        if not is_loopback(host)
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def is_loopback(host: str) -> bool:
    """Whether a host, a name or an address, is this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
