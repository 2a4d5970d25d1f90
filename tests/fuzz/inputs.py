"""One input of the fuzzer: made from a seed and a number, saved if it fails, and loaded to be replayed."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fuzz.messages import RPCS, Rpc
from tests.fuzz.mutation import mutated

HTTP_SHARE = 0.12
RAW_SHARE = 0.01

ROUTES = (
    *(("GET", path) for path in ("/healthz", "/readyz", "/metrics", "/docs", "/openapi.json")),
    *(("GET", f"/admin/v1/{name}") for name in ("status", "config", "dead-letters", "dead-letters?limit=5")),
    *(("POST", f"/admin/v1/{name}") for name in ("resume", "dead-letters/replay", "dead-letters/discard")),
)
FORBIDDEN_ROUTES = tuple(("POST", f"/admin/v1/{name}") for name in ("pause", "drain", "checkpoint"))
"""Routes that would succeed; sent only in ways that must be rejected."""

FORBIDDING_HEADERS: tuple[dict[str, str], ...] = (
    {"host": "evil.example", "x-poise": "1"},
    {"origin": "http://evil.example", "x-poise": "1"},
    {"origin": "null", "x-poise": "1"},
    {"sec-fetch-site": "cross-site", "x-poise": "1"},
    {"content-type": "text/plain"},
    {"content-type": "application/x-www-form-urlencoded"},
)
ODD_PATHS = (
    *(
        "/admin/v1/status/../pause",
        "//admin/v1/pause",
        "/admin/v1/pause/",
        "/%00",
        "/admin/v1/%ff%fe",
        "/" + "a" * 9000,
    ),
    *("/admin/v1/dead-letters?limit=-1", "/admin/v1/dead-letters?limit=1e9", "/admin/v1/dead-letters?limit=%00", "*"),
    *(
        "/admin/v1/dead-letters?limit=" + "9" * 5000,
        "http://evil.example/",
        "/docs?x=<script>",
        "/admin/v1/%2e%2e/status",
    ),
)
ODD_HEADERS: tuple[tuple[str, str], ...] = (
    *(("content-length", value) for value in ("-1", "0", "5", "99999999999999999999", "1e3", "0x10", "+5")),
    *(("transfer-encoding", value) for value in ("chunked", "gzip", "identity")),
    *(("host", value) for value in ("", "a b", "[::1", "[::1]:80", "localhost:99999", "127.0.0.1@evil", "x" * 5000)),
    *(("authorization", value) for value in ("Bearer", "Bearer x", "Basic eDp4", "\x80\xff", "Bearer " + "x" * 9000)),
    *(
        ("content-type", value)
        for value in ("application/json", "application/json; charset=utf-16", "multipart/form-data")
    ),
    *(("origin", "null"), ("upgrade", "websocket"), ("expect", "100-continue"), ("connection", "close, upgrade")),
)
BODIES = (
    *(
        b"",
        b"{",
        b"null",
        b"[]",
        b"{}",
        b'{"ids": []}',
        b'{"ids": ["1-1"]}',
        b'{"ids": ["\\ud800"]}',
        b'{"ids": [1e999]}',
    ),
    *(b'{"ids": ["99999999999999999999-1"]}', '{"ids": ["١-١"]}'.encode(), b'{"ids": ["1-1\\u0000"]}', b"\xff\xfe\x00"),
    *(
        b'{"ids": ["' + b"x" * 5000 + b'"]}',
        b"[" * 5000,
        b'{"a":' * 3000,
        b'{"ids": ' + b"9" * 6000 + b"}",
        b"0\r\n\r\n",
    ),
    *(b'{"\\ud800": 1, "ids": ["x"]}', b'{"ids": ["1-1"], "' + b"k" * 3000 + b'": 1}', b'{"ids": null}', b"NaN"),
    b"{" + b",".join(b'"k%d": 1' % i for i in range(3000)) + b"}",
)


@dataclass(frozen=True, slots=True)
class Input:
    """A call of an RPC, or bytes for an HTTP or gRPC port."""

    seed: int
    number: int
    service: str
    method: str
    """Full name of the RPC; `http` or `raw` for bytes."""
    messages: tuple[bytes, ...]
    """Encoded requests of the RPC, or the bytes for the port."""
    has_token: bool = True
    cancel_after: int | None = None
    """Messages sent before the client cancels the call; None if it does not cancel."""
    must_be_refused: bool = False

    @property
    def rpc(self) -> Rpc | None:
        """The RPC that is called."""
        return _BY_NAME.get((self.service, self.method))

    def save(self, folder: Path, problem: str) -> Path:
        """Write the input to a file of its own."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"input-{self.seed}-{self.number}.json"
        facts = {name: getattr(self, name) for name in self.__slots__}
        facts |= {"messages": [base64.b64encode(one).decode() for one in self.messages], "problem": problem}
        path.write_text(json.dumps(facts, indent=1))
        return path

    @classmethod
    def load(cls, path: Path) -> Input:
        """Read what `save` wrote."""
        facts: dict[str, Any] = json.loads(path.read_text())
        del facts["problem"]
        facts["messages"] = tuple(map(base64.b64decode, facts["messages"]))
        return cls(**facts)


_BY_NAME = {(rpc.service, rpc.method): rpc for rpc in RPCS}
_WEIGHTS = [rpc.weight for rpc in RPCS]


def make_input(seed: int, number: int, widths: int, tokens: dict[str, str | None]) -> Input:
    """Return the input of a number: the same for the same seed."""
    random_ = random.Random(f"{seed}/{number}")
    kind = random_.random()
    if kind < RAW_SHARE:
        return _raw(seed, number, random_)
    if kind < RAW_SHARE + HTTP_SHARE:
        return _http(seed, number, random_, tokens)
    rpc = random_.choices(RPCS, _WEIGHTS)[0]
    right = rpc.make(random_, widths)
    messages = _stream(right, random_) if rpc.is_streaming[0] else [mutated(right[0], random_)]
    cancel_after = random_.randrange(len(messages) + 1) if random_.random() < 0.05 else None
    has_token = random_.random() < 0.9
    return Input(seed, number, rpc.service, rpc.method, tuple(messages), has_token, cancel_after)


def _stream(right: Sequence[Any], random_: random.Random) -> list[bytes]:
    """Return a stream of messages of which one is changed, or the order."""
    chosen = random_.randrange(len(right))
    messages = [
        mutated(message, random_) if index == chosen else message.SerializeToString()
        for index, message in enumerate(right)
    ]
    match random_.randrange(10):
        case 0:
            random_.shuffle(messages)
        case 1:
            del messages[random_.randrange(len(messages))]
        case 2:
            messages.insert(random_.randrange(len(messages) + 1), random_.choice(messages))
        case 3:
            del messages[random_.randrange(len(messages)) :]
        case 4 if random_.random() < 0.1:
            messages += [random_.choice(messages)] * 500
        case _:
            pass
    return messages


def _http(seed: int, number: int, random_: random.Random, tokens: dict[str, str | None]) -> Input:
    service = random_.choice(("generation", "value", "learner"))
    must_be_refused = random_.random() < 0.3
    headers: list[tuple[str, str]] = [("host", "localhost"), ("connection", "close")]
    body = b""
    if must_be_refused:
        method, path = random_.choice(FORBIDDEN_ROUTES)
        forbidding = random_.choice(FORBIDDING_HEADERS)
        headers = [*({"host": "localhost", "connection": "close"} | forbidding).items()]
        body = random_.choice(BODIES)
        headers.append(("content-length", str(len(body))))
    else:
        method, path = random_.choice(ROUTES)
        headers += [("x-poise", "1"), *([("authorization", f"Bearer {tokens[service]}")] if tokens[service] else [])]
        if method == "POST" or random_.random() < 0.1:
            body = random_.choice(BODIES)
            headers.append(("content-length", str(len(body))))
        for _ in range(random_.choice((0, 0, 1, 2))):
            match random_.randrange(4):
                case 0:
                    method = random_.choice(
                        ("PUT", "DELETE", "OPTIONS", "HEAD", "TRACE", "PATCH", "FOO", "get", "CONNECT")
                    )
                case 1:
                    path = random_.choice(ODD_PATHS)
                case 2:
                    headers.append(random_.choice(ODD_HEADERS))
                case _:
                    del headers[random_.randrange(len(headers))]
    head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers) + "\r\n"
    data = head.encode("utf-8") + body
    if random_.random() < 0.05 and not must_be_refused:
        data = data[: random_.randrange(len(data))] if random_.random() < 0.5 else data.replace(b"\r\n", b"\n")
    return Input(seed, number, service, "http", (data,), must_be_refused=must_be_refused)


def _raw(seed: int, number: int, random_: random.Random) -> Input:
    """Return bytes for a gRPC port that are not HTTP/2, or stop being it."""
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    settings = b"\0\0\0\x04\0\0\0\0\0"
    data = random_.choice(
        (
            b"",
            random_.randbytes(200),
            preface,
            preface[: random_.randrange(len(preface))],
            preface + settings + random_.randbytes(100),
            preface + settings + b"\xff\xff\xff\x01\x05\0\0\0\x01" + random_.randbytes(500),
            preface + settings * 2000,
            b"GET / HTTP/1.1\r\n\r\n",
        )
    )
    return Input(seed, number, random_.choice(("generation", "value", "learner")), "raw", (data,))
