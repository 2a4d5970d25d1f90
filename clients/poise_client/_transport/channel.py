"""Opens channels: TLS, tokens, keepalive and proxies. Tokens are not sent in plaintext to other machines."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from poise_client._transport.fork import record_use, reject_after_fork
from poise_client._transport.target import check_target
from poise_client._transport.token import TOKEN_FILE_ENV, TokenFile
from poise_client._transport.tracing import TRACEPARENT, TRACEPARENT_KEY

MAX_RECEIVED_BYTES = 64 * 2**20
"""Large, because a group of many long rollouts is one message. Requests stay below gRPC's default of 4 MiB."""

ChannelOption = tuple[str, int | str]

_PING_AFTER_MS = 15_000
"""Silence after which a peer is pinged. gRPC may take twice as long."""
_PING_TIMEOUT_MS = 20_000
"""Maximum wait for the answer to a ping. A silent failure of a peer is detected within 50 s."""

KEEPALIVE_OPTIONS: tuple[ChannelOption, ...] = (
    ("grpc.keepalive_time_ms", _PING_AFTER_MS),
    ("grpc.keepalive_timeout_ms", _PING_TIMEOUT_MS),
    ("grpc.http2.ping_timeout_ms", _PING_TIMEOUT_MS),  # the longer of the two counts; a minute by default
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),  # no limit: a call may be silent for an hour
)
"""Options of channels and servers. On Linux gRPC also sets TCP_USER_TIMEOUT from them."""

_NO_PROXY_OPTIONS: tuple[ChannelOption, ...] = (
    ("grpc.enable_http_proxy", 0),  # http_proxy, https_proxy and grpc_proxy
    ("grpc.address_http_proxy_enabled_addresses", ""),  # GRPC_ADDRESS_HTTP_PROXY
)

_OPTIONS: tuple[ChannelOption, ...] = (
    *KEEPALIVE_OPTIONS,
    ("grpc.max_receive_message_length", MAX_RECEIVED_BYTES),
    # Reconnect within 2 s of a service's restart; gRPC's own backoff grows to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.enable_retries", 0),  # the clients retry, so errors can count the attempts
)


@dataclass(frozen=True, slots=True)
class TlsOptions:
    """TLS to the service, with a client certificate if the service requires one."""

    root_certs_file: Path | str | None = None
    """PEM file of the trusted authorities; None uses gRPC's defaults."""
    client_cert_file: Path | str | None = None
    """PEM file of the client's certificate chain."""
    client_key_file: Path | str | None = None
    """PEM file of its key."""
    server_name: str | None = None
    """Name in the service's certificate; None uses the name in the target. Set it for IP addresses."""

    def __post_init__(self) -> None:
        if (self.client_cert_file is None) != (self.client_key_file is None):
            raise ValueError("only one of client_cert_file and client_key_file is set. Set both or neither")

    def credentials(self) -> grpc.ChannelCredentials:
        """Return the credentials from the files. Raises `OSError` if one cannot be read."""
        roots, chain, key = (
            None if file is None else Path(file).read_bytes()
            for file in (self.root_certs_file, self.client_cert_file, self.client_key_file)
        )
        return grpc.ssl_channel_credentials(root_certificates=roots, private_key=key, certificate_chain=chain)


class Dialer:
    """Opens channels to one target. Checks its arguments before any call. Its repr contains no token."""

    def __init__(
        self,
        target: str,
        token: str | None,
        token_file: Path | str | TokenFile | None,
        tls: TlsOptions | None,
        allow_insecure_token: bool,
        use_proxy: bool,
    ) -> None:
        reject_after_fork()
        check_target(target)
        if token is not None and token_file is not None:
            raise ValueError("token and token_file are both set. Remove one")
        if token is None and token_file is None:
            token_file = os.environ.get(TOKEN_FILE_ENV) or None
        self._token_file = (
            token_file if token_file is None or isinstance(token_file, TokenFile) else TokenFile(token_file)
        )
        has_token = token is not None or self._token_file is not None
        if token is not None and (not token.isascii() or not token.isprintable() or " " in token or not token):
            raise ValueError("token must be printable ASCII without spaces or line breaks. Strip it first")
        if has_token and tls is None and not allow_insecure_token and not is_loopback(target):
            raise ValueError(
                f"the token for {target} would be sent in plaintext. Pass tls=TlsOptions(...), or "
                "allow_insecure_token=True if another layer encrypts the connection"
            )
        self.target = target
        self._token = token
        self._credentials = None if tls is None else tls.credentials()
        self._server_name = None if tls is None else tls.server_name
        self._use_proxy = use_proxy

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Metadata of a call: the token and the trace context."""
        token = self._token if self._token_file is None else self._token_file.current
        trace = TRACEPARENT.get()
        return (
            *(() if token is None else (("authorization", f"Bearer {token}"),)),
            *(((TRACEPARENT_KEY, trace),) if trace else ()),
        )

    @property
    def is_token_new(self) -> bool:
        """Whether the token changed so recently that the service may not have read it yet."""
        return self._token_file is not None and self._token_file.changed_lately

    def open(self) -> grpc.aio.Channel:
        """Open a channel on the running event loop. It connects at the first call."""
        return _open(self.target, self._credentials, self._server_name, self._use_proxy)


def open_channel(target: str, tls: TlsOptions | None = None, *, use_proxy: bool = False) -> grpc.aio.Channel:
    """Open a channel like those of the clients, on the running event loop. Use it for calls that the clients lack.

    Args:
        target: `host:port`, `[IPv6 address]:port`, `dns:///name:port` or `unix:path`.
        tls: TLS options; None sends plaintext.
        use_proxy: use the proxy of `http_proxy` and similar variables.

    Raises:
        ValueError: the target is not valid.
        OSError: a TLS file cannot be read.
        RuntimeError: this process was forked from one that has used gRPC.
    """
    check_target(target)
    credentials = None if tls is None else tls.credentials()
    return _open(target, credentials, None if tls is None else tls.server_name, use_proxy)


def _open(
    target: str, credentials: grpc.ChannelCredentials | None, server_name: str | None, use_proxy: bool
) -> grpc.aio.Channel:
    record_use()
    options: Sequence[ChannelOption] = (
        *_OPTIONS,
        *(() if use_proxy else _NO_PROXY_OPTIONS),
        *(() if server_name is None else (("grpc.ssl_target_name_override", server_name),)),
    )
    if credentials is None:
        return grpc.aio.insecure_channel(target, options=options)
    return grpc.aio.secure_channel(target, credentials, options=options)


def is_loopback(target: str) -> bool:
    """Return whether a gRPC target is on this machine."""
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    for scheme in ("dns:///", "dns:", "ipv4:", "ipv6:"):
        target = target.removeprefix(scheme)
    host = target.partition("]")[0].removeprefix("[") if target.startswith("[") else target.rpartition(":")[0] or target
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
