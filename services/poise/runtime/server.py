"""Run a service as a process: gRPC and the admin app on one event loop, health, signals, drain."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import socket
from pathlib import Path

import grpc.aio
import uvicorn
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from poise.errors import PoiseError
from poise.runtime.admin.app import build_admin_app
from poise.runtime.admin.http_limits import MAX_HEAD_BYTES, DeadlineProtocol
from poise.runtime.cli.exit_status import FAILED, OK, WRONG_SETTINGS, exit_reason, exit_status
from poise.runtime.cli.signals import stop_on_signal
from poise.runtime.config.settings import ConfigError, GrpcConfig
from poise.runtime.config.text import redacted
from poise.runtime.logging import configure_logging
from poise.runtime.network.addresses import join_address, listen
from poise.runtime.network.auth import BearerAuth, reject_open_bind
from poise.runtime.network.certificates import Certificate
from poise.runtime.rpc.interceptors import ServiceInterceptor
from poise.runtime.rpc.request_stream import MAX_READ_BYTES
from poise.runtime.service import ServiceApp
from poise.runtime.tracing import configure_tracing
from poise_client._transport import KEEPALIVE_OPTIONS

logger = logging.getLogger(__name__)

ADDRESS_FILE_ENV = "POISE_ADDRESS_FILE"
"""Variable with the path of a file to which a service writes `{"grpc", "admin", "pid"}` once both ports are bound."""

_READINESS_EVERY_S = 0.25
_MIN_PING_INTERVAL_MS = 5000
"""Shortest accepted interval between pings. gRPC's default, five minutes, would disconnect our clients."""

_MAX_CONNECTIONS = 1024
_MAX_STREAMS = 1024
"""Concurrent calls on one connection; more wait in the client."""
_HANDSHAKE_TIMEOUT_MS = 10_000
_IDLE_CONNECTION_MS = 120_000
"""A connection without a call is closed after this time; clients reconnect at the next call."""


def serve(app: ServiceApp) -> int:
    """Serve until a signal or a drain request; return the exit status."""
    configure_logging(app.config.logging)
    configure_tracing(app.config.tracing, app.name)
    try:
        secret = app.config.auth.open()
        reject_open_bind(app.config, secret)
    except ConfigError as error:
        logger.error("%s", error)
        return WRONG_SETTINGS
    logger.info("settings: %s", json.dumps(redacted(app.config)))
    return asyncio.run(_Server(app, BearerAuth(secret)).run())


class _Server:
    """One run of a service."""

    def __init__(self, app: ServiceApp, auth: BearerAuth) -> None:
        self._app = app
        self._auth = auth
        self._health = HealthServicer()
        self._stop_requested = app.stop_requested

    async def run(self) -> int:
        app = self._app
        grpc_server = self._build_grpc()
        try:
            grpc_address = _bind(grpc_server, app.config.grpc)
            admin_socket = _listen("admin", app.config.admin.host, app.config.admin.port)
        except (ConfigError, _PortTaken) as error:
            logger.error("%s", error)
            return exit_status(error)
        admin = uvicorn.Server(
            uvicorn.Config(
                build_admin_app(app, self._auth, self._stop_requested.set),
                log_config=None,
                access_log=False,
                lifespan="off",
                http=DeadlineProtocol,
                ws="none",
                proxy_headers=False,
                h11_max_incomplete_event_size=MAX_HEAD_BYTES,
                timeout_graceful_shutdown=2,
            )
        )
        with stop_on_signal(self._stop_requested.set), contextlib.closing(admin_socket):
            await self._set_health(serving=False)
            await grpc_server.start()
            admin_task = asyncio.create_task(_serve_admin(admin, admin_socket), name="admin")
            admin_address = join_address(*admin_socket.getsockname()[:2])
            logger.info("%s: gRPC on %s, admin on http://%s", app.name, grpc_address, admin_address)
            _write_addresses(grpc_address, admin_address)
            watcher = asyncio.create_task(self._watch_readiness(), name="readiness")
            try:
                return await self._serve_until_stopped()
            finally:
                watcher.cancel()
                await grpc_server.stop(grace=1.0)
                admin.should_exit = True
                await asyncio.gather(watcher, admin_task, return_exceptions=True)
                logger.info("%s: stopped", app.name)

    async def _serve_until_stopped(self) -> int:
        app = self._app
        starting = asyncio.create_task(app.start(), name="start")
        stopping = asyncio.create_task(self._stop_requested.wait(), name="stop")
        failing = asyncio.create_task(app.failed.wait(), name="fail")
        try:
            await asyncio.wait({starting, stopping, failing}, return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                starting.cancel()
                await asyncio.gather(starting, return_exceptions=True)
                return OK if stopping.done() else self._report_failure()
            if (error := starting.exception()) is not None:
                known = isinstance(error, PoiseError | ConfigError | OSError)
                logger.error("%s cannot start: %s", app.name, exit_reason(error), exc_info=None if known else error)
                return exit_status(error)
            await asyncio.wait({stopping, failing}, return_when=asyncio.FIRST_COMPLETED)
            return await self._drain() if stopping.done() else self._report_failure()
        finally:
            stopping.cancel()
            failing.cancel()
            await app.stop()

    def _report_failure(self) -> int:
        logger.error("%s failed: %s", self._app.name, self._app.failure)
        return FAILED

    async def _drain(self) -> int:
        app, limit_s = self._app, self._app.config.drain_timeout_s
        logger.info("%s: draining for at most %.0f s. A second signal stops it at once", app.name, limit_s)
        await self._health.enter_graceful_shutdown()
        try:
            await asyncio.wait_for(app.drain(), limit_s)
        except TimeoutError:
            logger.warning("%s: running requests did not finish within drain_timeout_s = %s", app.name, limit_s)
        except Exception as error:
            logger.error("%s cannot drain: %s", app.name, error or type(error).__name__, exc_info=error)
            return FAILED
        return OK

    def _build_grpc(self) -> grpc.aio.Server:
        app = self._app
        server = grpc.aio.server(
            interceptors=[ServiceInterceptor(app.name, self._auth, app.registry, app.config.grpc.max_concurrent_rpcs)],
            options=[
                ("grpc.so_reuseport", 0),  # a second service on the same port must fail, not share its calls
                ("grpc.max_receive_message_length", MAX_READ_BYTES),
                ("grpc.max_allowed_incoming_connections", _MAX_CONNECTIONS),
                ("grpc.max_concurrent_streams", _MAX_STREAMS),
                ("grpc.server_handshake_timeout_ms", _HANDSHAKE_TIMEOUT_MS),
                ("grpc.max_connection_idle_ms", _IDLE_CONNECTION_MS),
                *KEEPALIVE_OPTIONS,  # ends the calls of clients that have vanished
                ("grpc.http2.min_ping_interval_without_data_ms", _MIN_PING_INTERVAL_MS),
            ],
        )
        app.register(server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection([*app.grpc_services, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
        return server

    async def _watch_readiness(self) -> None:
        logged: tuple[bool, str] | None = None
        while True:
            try:
                readiness = self._app.readiness()
            except Exception:
                logger.exception("%s: the readiness check raised an exception", self._app.name)
                self._app.fail("the readiness check raised an exception")
                return
            if (readiness.ready, readiness.reason) != logged:
                logged = (readiness.ready, readiness.reason)
                logger.info("%s: %s", self._app.name, "ready" if readiness.ready else f"not ready: {readiness.reason}")
                await self._set_health(serving=readiness.ready)
            await asyncio.sleep(_READINESS_EVERY_S)

    async def _set_health(self, *, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse.ServingStatus
        for service in ("", *self._app.grpc_services):
            await self._health.set(service, status.SERVING if serving else status.NOT_SERVING)


class _PortTaken(Exception):
    """Another program listens on the port. A restart may succeed, because that program may exit."""


_TEMPORARY = (errno.EADDRINUSE, socket.EAI_AGAIN)


def _bind(server: grpc.aio.Server, config: GrpcConfig) -> str:
    target = join_address(config.host, config.port)
    try:
        if config.tls_cert_file is not None and config.tls_key_file is not None:
            certificate = Certificate(config.tls_cert_file, config.tls_key_file)
            port = server.add_secure_port(target, certificate.credentials())
        else:
            port = server.add_insecure_port(target)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise ConfigError(f"grpc.tls_cert_file, grpc.tls_key_file: cannot be used: {error}") from error
    except RuntimeError as error:  # gRPC does not say why
        _listen("grpc", config.host, config.port).close()
        raise _PortTaken(f"grpc: cannot listen on {target}. Set another grpc.port, or 0") from error
    return join_address(config.host, port)


def _listen(section: str, host: str, port: int) -> socket.socket:
    address = join_address(host, port)
    try:
        listener = listen(host, port)
    except OSError as error:
        if error.errno in _TEMPORARY:
            raise _PortTaken(
                f"{section}: cannot listen on {address}: {error.strerror}. Set another {section}.port, or 0"
            ) from error
        raise ConfigError(
            f"{section}.host, {section}.port: cannot listen on {address}: {error.strerror}. Name an address of this "
            "machine and a port that this user may bind"
        ) from error
    listener.setblocking(False)
    return listener


async def _serve_admin(admin: uvicorn.Server, listener: socket.socket) -> None:
    await admin._serve([listener])  # `serve` would install its own signal handlers


def _write_addresses(grpc_address: str, admin_address: str) -> None:
    name = os.environ.get(ADDRESS_FILE_ENV)
    if not name:
        return
    path = Path(name)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps({"grpc": grpc_address, "admin": admin_address, "pid": os.getpid()}))
    temporary.replace(path)
