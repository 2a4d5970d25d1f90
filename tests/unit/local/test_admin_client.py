"""Requests to admin apps."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from poise.local.queue import QueueAdmin


class Admin(BaseHTTPRequestHandler):
    def do_GET(self):
        content = json.dumps({"num_pending": 3, "num_dead_letters": 1}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def url():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Admin)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
def test_proxies_of_the_environment_are_ignored(url, monkeypatch, variable):
    monkeypatch.setenv(variable, "http://127.0.0.1:9")
    assert QueueAdmin(url, token=None).depth() == (3, 1)
