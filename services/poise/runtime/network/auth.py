"""Check bearer tokens, and require one for a service that other machines can reach."""

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
    """Checks `authorization` values against the token. Without a token, all are accepted."""

    def __init__(self, secret: str | TokenFile | None) -> None:
        self._secret = secret
        self._repeats = RepeatLog(logger)

    def _accepted(self) -> tuple[str, ...]:
        if not isinstance(self._secret, TokenFile):
            return () if self._secret is None else (self._secret,)
        accepted = self._secret.accepted
        if self._secret.problem:
            self._repeats.log(
                logging.ERROR,
                f"the new token file cannot be used: {self._secret.problem}. The previous token stays valid",
            )
        return accepted

    def check(self, authorization: str | None) -> None:
        """Raise `Unauthenticated` unless `authorization` is `Bearer <the token>`."""
        if self._secret is None:
            return
        if authorization is None:
            raise Unauthenticated("no bearer token", remedy="Send `authorization: Bearer <token>`.")
        if not authorization[: len(_SCHEME)].lower() == _SCHEME:
            raise Unauthenticated("not a bearer token", remedy="Send `authorization: Bearer <token>`.")
        token_sent = authorization[len(_SCHEME) :].encode("utf-8", "surrogateescape")
        if (
            sum(hmac.compare_digest(token_sent, token.encode()) for token in self._accepted()) == 0
        ):  # compares all of them, in constant time
            raise Unauthenticated("wrong bearer token", remedy="Check that client and service use the same token.")


def reject_open_bind(config: ServiceConfig, secret: str | TokenFile | None) -> None:
    """Raise `ConfigError` for a service without a token that other machines can reach, unless the settings allow it."""
    if secret is not None or config.auth.allow_open_bind:
        return
    problems = [
        f"{section}.host: other machines can reach {host}, and no token is set. Set auth.token_file, or "
        "auth.allow_open_bind: true if something else protects the port"
        for section, host in (("grpc", config.grpc.host), ("admin", config.admin.host))
        if not is_loopback(host)
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`, which is a name or an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
