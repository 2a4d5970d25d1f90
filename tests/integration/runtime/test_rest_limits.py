"""Limits of the admin app: origin, size and speed of requests."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from tests.integration.runtime.process import TIMEOUT_S, run_stage

from poise.runtime.admin import request_guard as guard

TOKEN = "hunter2-hunter2"
CHANGES = ("pause", "resume", "drain", "checkpoint")


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """A service without a token, as on a laptop."""
    with run_stage(tmp_path_factory.mktemp("stage"), "admin.allowed_hosts=[value.rl.svc, .pods.example]") as stage:
        stage.wait_until_ready()
        yield stage


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A service with a token."""
    with run_stage(tmp_path_factory.mktemp("stage"), token=TOKEN) as stage:
        stage.wait_until_ready()
        yield stage


@pytest.fixture
def page(running):
    """What a browser sends for a page, without the headers that each test adds."""
    with httpx.Client(base_url=f"http://{running.addresses()['admin']}", timeout=TIMEOUT_S) as client:
        yield client
        assert client.get("/readyz").text == "ready"


def raw(stage, request: bytes, timeout_s: float = TIMEOUT_S) -> bytes:
    """Send bytes as they are; return all that comes until the service closes."""
    host, port = stage.addresses()["admin"].rsplit(":", 1)
    answer = b""
    with socket.create_connection((host, int(port)), timeout_s) as connection:
        connection.sendall(request)
        while data := connection.recv(65536):
            answer += data
    return answer


@pytest.mark.parametrize("action", CHANGES)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "text/plain"},
        {"authorization": "Basic dXNlcjpwYXNz"},
        {"origin": "http://evil.example", "x-poise": "1"},
        {"origin": "null", "x-poise": "1"},
        {"origin": "http://localhost:3000", "x-poise": "1"},
        {"sec-fetch-site": "cross-site", "x-poise": "1"},
        {"sec-fetch-site": "same-site", "x-poise": "1"},
        {"host": "evil.example", "x-poise": "1"},
        {"host": "127.0.0.1.evil.example:8051", "x-poise": "1"},
        {"host": "localhost.evil.example", "x-poise": "1"},
        {"host": "user@127.0.0.1", "x-poise": "1"},
        {"host": "10.1.2.3", "x-poise": "1"},
        {"host": "evilpods.example", "x-poise": "1"},
        {"host": "other.rl.svc", "x-poise": "1"},
    ],
)
def test_web_page_cannot_change_anything(page, action, headers):
    answer = page.post(f"/admin/v1/{action}", headers=headers)
    assert answer.status_code == 403
    assert answer.json()["reason"] == "FORBIDDEN"


@pytest.mark.parametrize("headers", [{"host": "evil.example"}, {"origin": "http://evil.example"}])
@pytest.mark.parametrize("path", ["status", "config"])
def test_web_page_cannot_read_anything(page, path, headers):
    assert page.get(f"/admin/v1/{path}", headers=headers).status_code == 403


@pytest.mark.parametrize("path", ["/docs", "/openapi.json"])
def test_dns_rebinding_cannot_read_the_documents(page, path):
    assert page.get(path).status_code == 200
    assert page.get(path, headers={"host": "evil.example"}).status_code == 403


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:1",
        "127.0.0.1",
        "127.9.9.9:80",
        "[::1]:80",
        "value.rl.svc",
        "a.b.pods.example",
        "pods.example",
    ],
)
def test_own_names_are_allowed(page, host):
    assert page.post("/admin/v1/resume", headers={"host": host, "x-poise": "1"}).status_code == 200


def test_same_origin_is_allowed(running, page):
    headers = {"origin": f"http://{running.addresses()['admin']}", "sec-fetch-site": "same-origin", "x-poise": "1"}
    assert page.post("/admin/v1/resume", headers=headers).status_code == 200


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics"])
@pytest.mark.parametrize("host", ["10.1.2.3:8051", "value-0.value.rl.svc", "", "a b"])
def test_probes_accept_any_host(page, path, host):
    assert page.get(path, headers={"host": host}).status_code == 200


def test_docs_page_loads_no_external_resources(page):
    answer = page.get("/docs")
    assert "/admin/v1/pause" in answer.text
    assert "x-poise" in answer.text
    for loads in ("http://", "https://", "//", "<script", "src="):
        assert loads not in answer.text.replace("<!doctype html>", "")
    assert "default-src 'none'" in answer.headers["content-security-policy"]


def test_openapi_describes_the_header(page):
    document = page.get("/openapi.json").json()
    for action in CHANGES:
        parameters = document["paths"][f"/admin/v1/{action}"]["post"]["parameters"]
        assert "x-poise" in [parameter["name"] for parameter in parameters]


@pytest.mark.parametrize("path", ["/admin/v1/pause", "/admin/v1/nothing", "/elsewhere"])
@pytest.mark.parametrize("size", [0, 10, guard.MAX_BODY_BYTES + 1, 8 * 2**20])
def test_unauthenticated_request_is_rejected_for_any_body(guarded, path, size):
    answer = httpx.post(f"http://{guarded.addresses()['admin']}{path}", content=bytes(size), timeout=TIMEOUT_S)
    assert answer.status_code == 401


@pytest.mark.parametrize("declared", [True, False])
def test_large_body_is_rejected(guarded, declared):
    size = guard.MAX_BODY_BYTES + 1
    with guarded.rest() as rest:
        content = bytes(size) if declared else (bytes(65536) for _ in range(size // 65536 + 1))
        answer = rest.post("/admin/v1/pause", content=content)
        assert answer.status_code == 413
        assert str(guard.MAX_BODY_BYTES) in answer.json()["message"]
        assert rest.get("/readyz").status_code == 200


@pytest.mark.parametrize("length", [b"1" * 5000, b"99999999999999999999", b"268435456"])
def test_declared_length_is_not_trusted(guarded, length):
    request = b"POST /admin/v1/pause HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer %s\r\n" % TOKEN.encode()
    answer = raw(guarded, request + b"Connection: close\r\nContent-Length: %s\r\n\r\n" % length)
    assert answer.startswith((b"HTTP/1.1 413", b"HTTP/1.1 400"))


@pytest.mark.parametrize(
    "head",
    [b"X-Large: " + b"x" * 2**20, b"\r\n".join(b"X-%d: x" % i for i in range(20000)), b"Cookie: " + bytes(2**17)],
)
def test_large_head_is_rejected(running, head):
    host, port = running.addresses()["admin"].rsplit(":", 1)
    with socket.create_connection((host, int(port)), TIMEOUT_S) as connection:
        try:
            connection.sendall(b"GET /admin/v1/status HTTP/1.1\r\nHost: localhost\r\n" + head + b"\r\n\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 400")
        except ConnectionError:
            pass  # closed while we were still sending


def is_closed(stage, trickle: bytes) -> bool:
    """Send `trickle` twice a second until the service closes the connection."""
    started = time.monotonic()
    host, port = stage.addresses()["admin"].rsplit(":", 1)
    with socket.create_connection((host, int(port)), TIMEOUT_S) as connection:
        connection.settimeout(0.5)
        while time.monotonic() - started < TIMEOUT_S:
            try:
                connection.sendall(trickle)
                if connection.recv(1000) == b"":
                    return True
            except TimeoutError:
                continue
            except ConnectionError:
                return True
    return False


def test_slow_requests_end(running):
    trickles = b"", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Slow: ", b"\r\n"
    request = b"POST /admin/v1/resume HTTP/1.1\r\nHost: localhost\r\nX-Poise: 1\r\nConnection: close\r\n"
    with ThreadPoolExecutor() as pool:  # all at once: each takes ten seconds
        heads = [pool.submit(is_closed, running, trickle) for trickle in trickles]
        body = pool.submit(raw, running, request + b"Content-Length: 100\r\n\r\nx")
        assert [head.result() for head in heads] == [True] * 3
        assert body.result().startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("path", [b"/healthz", b"/metrics", b"/docs", b"/openapi.json"])
def test_open_routes_do_not_wait_for_a_body(guarded, path):
    request = b"GET %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 100\r\n\r\nx" % path
    assert raw(guarded, request, guard.BODY_TIMEOUT_S / 2).startswith(b"HTTP/1.1 200")


def test_probes_work_despite_many_waiting_connections(running):
    host, port = running.addresses()["admin"].rsplit(":", 1)
    idle = [socket.create_connection((host, int(port)), TIMEOUT_S) for _ in range(400)]
    try:
        answer = httpx.get(f"http://{host}:{port}/healthz", timeout=TIMEOUT_S)
        assert answer.text == "ok"
    finally:
        for connection in idle:
            connection.close()
