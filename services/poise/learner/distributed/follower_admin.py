"""The admin port of hosts without rank 0: liveness, readiness, and empty metrics.

A kubelet probes every pod of a learner, but only rank 0 runs the service's admin app.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CONTENT_TYPE_LATEST

from poise.runtime.config.settings import AdminConfig, ConfigError
from poise.runtime.network.addresses import join_address, listen

_TEXT = "text/plain; charset=utf-8"


@contextmanager
def serve_probes(config: AdminConfig) -> Iterator[threading.Event]:
    """Serve `/healthz`, `/readyz` and `/metrics` on a thread; the yielded event, once set, means ready.

    Raises:
        ConfigError: the port cannot be bound.
    """
    loaded = threading.Event()
    try:
        server = _Server(config, loaded)
    except OSError as error:
        raise ConfigError(
            f"admin: cannot listen on {join_address(config.host, config.port)}: {error}. Set another admin.port"
        ) from error
    thread = threading.Thread(target=server.serve_forever, name="follower-probes", daemon=True)
    thread.start()
    try:
        yield loaded
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Server(ThreadingHTTPServer):
    def __init__(self, config: AdminConfig, loaded: threading.Event) -> None:
        self.loaded = loaded
        super().__init__((config.host, config.port), _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listen(config.host, config.port)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = 10.0
    """Timeout of an idle connection, s."""

    def do_GET(self) -> None:
        """Answer one of the three paths."""
        match self.path:
            case "/healthz":
                self._respond(200, "ok")
            case "/readyz" if self.server.loaded.is_set():
                self._respond(200, "ready: follows rank 0")
            case "/readyz":
                self._respond(503, "the policy is still loading")
            case "/metrics":
                self._respond(200, "", CONTENT_TYPE_LATEST)  # rank 0 has the metrics of all
            case _:
                self._respond(404, "not found: this rank is a follower; rank 0 serves the admin app")

    def _respond(self, status: int, text: str, content_type: str = _TEXT) -> None:
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class's name)
        """Log nothing: a kubelet sends requests every few seconds."""
