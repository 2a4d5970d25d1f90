"""Bearer tokens, compared in constant time, also new ones in their file; no listening to the world without one."""

from __future__ import annotations

import hmac
import ipaddress
import logging

from poise.errors import Unauthenticated
from poise.runtime.config.settings import ConfigError, ServiceConfig
from poise.runtime.repeat_log import RepeatLog
from poise_client import TokenFile

logger = logging.getLogger(__name__)

_SCHEME = "bearer "


class BearerAuth:
    """Checks `authorization` values against the one token; lets everything pass when there is none."""

    def __init__(self, secret: str | TokenFile | None) -> None:
        self._secret = secret
        self._repeats = RepeatLog(logger)

    @property
    def required(self) -> bool:
        """Whether callers need a token."""
        return self._secret is not None

    def _accepted(self) -> tuple[str, ...]:
        if not isinstance(self._secret, TokenFile):
            return () if self._secret is None else (self._secret,)
        accepted = self._secret.accepted
        if self._secret.problem:
            self._repeats.log(logging.ERROR, f"the token file changed and is not used: {self._secret.problem}")
        return accepted

    def check(self, authorization: str | None) -> None:
        """Raise `Unauthenticated` unless `authorization` is `Bearer <the token>`."""
        if self._secret is None:
            return
        if authorization is None:
            raise Unauthenticated("no bearer token", remedy="Send `authorization: Bearer <token>`.")
        if not authorization[: len(_SCHEME)].lower() == _SCHEME:
            raise Unauthenticated("not a bearer token", remedy="Send `authorization: Bearer <token>`.")
        given = authorization[len(_SCHEME) :].encode("utf-8", "surrogateescape")
        if sum(hmac.compare_digest(given, token.encode()) for token in self._accepted()) == 0:  # all, whichever fits
            raise Unauthenticated("wrong bearer token", remedy="Check that both sides were given the same token.")


def refuse_open_bind(config: ServiceConfig, secret: str | TokenFile | None) -> None:
    """Raise `ConfigError` for a listener beyond this machine that asks for no token, unless that was asked for."""
    if secret is not None or config.auth.allow_open_bind:
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
