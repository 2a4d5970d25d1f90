"""`poise queue`: the labels that wait and those that were refused, by the value service's admin app.

Knows the admin app's routes and no Redis: whoever may call the one needs no password of the other.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from poise.local.admin_http import ask_admin
from poise.runtime.config.settings import ConfigError

_TIMEOUT_S = 30.0
_MAX_LETTERS = 1000


class QueueError(Exception):
    """The value service refused, or did not answer. The message says why and what to do."""


@dataclass(frozen=True, slots=True)
class QueueAdmin:
    """The admin app of one value service."""

    url: str
    """`http://host:port`."""
    token: str | None

    def letters(self, limit: int) -> list[dict[str, Any]]:
        """Return the newest dead letters, newest first. Every method raises `QueueError`."""
        answer = self._ask("GET", f"/dead-letters?limit={limit}")
        assert isinstance(answer, list)  # noqa: S101 (what the route answers)
        return answer

    def replay(self, letter_ids: Sequence[str]) -> int:
        """Queue letters again, all or none; return how many."""
        return int(self._ask("POST", "/dead-letters/replay", {"ids": list(letter_ids)})["num_replayed"])

    def discard(self, letter_ids: Sequence[str]) -> int:
        """Delete letters; return how many there were."""
        return int(self._ask("POST", "/dead-letters/discard", {"ids": list(letter_ids)})["num_discarded"])

    def all_ids(self) -> list[str]:
        """Return the names of all letters that are kept, oldest first: so that they are replayed in their order."""
        return [letter["id"] for letter in reversed(self.letters(_MAX_LETTERS))]

    def depth(self) -> tuple[int, int]:
        """Return how many labels wait, and how many were ever refused."""
        status = self._ask("GET", "/status")
        if "num_pending" not in status:
            raise QueueError(f"the value service at {self.url} is {status.get('state', 'not ready')}; try again soon")
        return status["num_pending"], status["num_dead_letters"]

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/admin/v1{path}", data, method=method)  # noqa: S310 (of `admin_url`)
        request.add_header("content-type", "application/json")
        request.add_header("x-poise", "1")  # which web pages cannot send
        if self.token is not None:
            request.add_header("authorization", f"Bearer {self.token}")
        try:
            with ask_admin(request, _TIMEOUT_S) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise QueueError(_refusal(error)) from error
        except OSError as error:
            reason = getattr(error, "reason", error)
            raise QueueError(f"the value service at {self.url} does not answer: {reason}; is it up?") from error
        except (HTTPException, ValueError) as error:
            raise QueueError(f"something other than a value service's admin app listens at {self.url}") from error


def _refusal(error: urllib.error.HTTPError) -> str:
    try:
        answer = json.load(error)
        fields = "; ".join(f"{one['field']}: {one['description']}" for one in answer["violations"])
        return ". ".join(part for part in ((fields or answer["message"]).rstrip("."), answer["remedy"]) if part)
    except (ValueError, KeyError, TypeError):
        return f"something other than a value service's admin app answered: {error}"


def admin_url(text: str) -> str:
    """Return what `--admin` names, as `http://host:port`. Raises `ConfigError`."""
    try:
        parts = urlsplit(text)
        is_url = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # brackets that do not close, or a port that is no number
        is_url = False
    rest = text.partition("://")[2].rstrip("/")
    if not is_url or not rest.isascii() or not rest.isprintable() or any(letter in rest for letter in " /?#@"):
        raise ConfigError(f"--admin: {text!r} must be the value service's admin app: http://host:port")
    return f"{parts.scheme}://{rest}"


def letter_line(letter: dict[str, Any]) -> str:
    """Return a dead letter in one line."""
    group = letter["group"]
    name = f"{group['run_id']}/{group['step']}/{group['group_id']}" if group else "not a label"
    cut = "" if letter["is_whole"] else ", cut off"
    return f"{letter['id']:22} {name:30} {letter['num_bytes']:>9} bytes{cut}  {letter['reason']}"
