"""Call the REST admin app of a service."""

from __future__ import annotations

import json
import urllib.request
from http.client import HTTPException
from typing import Any

_WITHOUT_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def call_admin(url: str, token: str | None, path: str, body: Any = None, *, timeout_s: float) -> Any:
    """Send a GET, or a POST if there is a body, to `/admin/v1` + `path` of `url`; return the JSON of the response.

    Proxies of the environment are ignored.

    Raises:
        urllib.error.HTTPError: the app rejected the request.
        OSError: the app does not respond.
        ValueError: the response is not JSON over HTTP, so another program listens there.
    """
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{url}/admin/v1{path}", data)  # noqa: S310 (callers build http URLs)
    request.add_header("content-type", "application/json")
    request.add_header("x-poise", "1")  # required of changes; web pages cannot send it
    if token is not None:
        request.add_header("authorization", f"Bearer {token}")
    try:
        with _WITHOUT_PROXY.open(request, timeout=timeout_s) as response:
            return json.load(response)
    except OSError:  # also RemoteDisconnected, which is an HTTPException too
        raise
    except HTTPException as error:
        raise ValueError(str(error)) from error
