"""Requests to admin apps, which ignore the proxies of the environment."""

from __future__ import annotations

import urllib.request
from http.client import HTTPResponse

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def ask_admin(request: urllib.request.Request, timeout_s: float) -> HTTPResponse:
    """Send a request. Raises what `urllib.request.urlopen` does."""
    answer: HTTPResponse = _DIRECT.open(request, timeout=timeout_s)
    return answer
