"""What a host of followers answers on its admin port: that it lives, whether it has loaded, and no metrics of its own.

A kubelet asks every pod of a learner, though only the first process is the service. Knows nothing of training.
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
def answering_probes(config: AdminConfig) -> Iterator[threading.Event]:
    """Answer `/healthz`, `/readyz` and `/metrics` meanwhile, from a thread; set what is yielded to become ready.

    Raises:
        ConfigError: the port cannot be bound.
    """
    loaded = threading.Event()
    try:
        server = _Server(config, loaded)
    except OSError as error:
        raise ConfigError(
            f"admin: cannot listen on {join_address(config.host, config.port)}: {error}; choose another port"
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
        super().__init__((config.host, config.port), _Answer, bind_and_activate=False)
        self.socket.close()
        self.socket = listen(config.host, config.port)


class _Answer(BaseHTTPRequestHandler):
    server: _Server
    timeout = 10.0
    """Of a connection that sends nothing, s."""

    def do_GET(self) -> None:
        """Answer one of the three; all else is not here."""
        match self.path:
            case "/healthz":
                self._say(200, "ok")
            case "/readyz" if self.server.loaded.is_set():
                self._say(200, "ready: follows the first process")
            case "/readyz":
                self._say(503, "the policy is still loading")
            case "/metrics":
                self._say(200, "", CONTENT_TYPE_LATEST)  # the first process counts for all
            case _:
                self._say(404, "this process follows; the service is the first one")

    def _say(self, status: int, text: str, content_type: str = _TEXT) -> None:
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class's name)
        """Say nothing: a kubelet asks every few seconds."""
