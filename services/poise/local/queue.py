"""`poise queue`: labels in the queue and dead letters, through the value service's admin app."""

from __future__ import annotations

import json
import urllib.error
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from poise.local.admin_client import call_admin
from poise.runtime.config.settings import ConfigError

_TIMEOUT_S = 30.0
_MAX_LETTERS = 1000


class QueueError(Exception):
    """The value service rejected a request, or did not respond. The message has the reason and the remedy."""


@dataclass(frozen=True, slots=True)
class QueueAdmin:
    """The queue routes of a value service's admin app. Every method raises `QueueError`."""

    url: str
    """`http://host:port`."""
    token: str | None

    def letters(self, limit: int) -> list[dict[str, Any]]:
        """Return the newest dead letters, newest first."""
        letters = self._call(f"/dead-letters?limit={limit}")
        assert isinstance(letters, list)  # noqa: S101 (the route returns a list)
        return letters

    def replay(self, letter_ids: Sequence[str]) -> int:
        """Queue dead letters again, all or none; return how many."""
        return int(self._call("/dead-letters/replay", {"ids": list(letter_ids)})["num_replayed"])

    def discard(self, letter_ids: Sequence[str]) -> int:
        """Delete dead letters; return how many existed."""
        return int(self._call("/dead-letters/discard", {"ids": list(letter_ids)})["num_discarded"])

    def all_ids(self) -> list[str]:
        """Return the ids of all dead letters, oldest first, so that they are replayed in order."""
        return [letter["id"] for letter in reversed(self.letters(_MAX_LETTERS))]

    def depth(self) -> tuple[int, int]:
        """Return the numbers of waiting labels and of dead letters so far."""
        status = self._call("/status")
        if "num_pending" not in status:
            raise QueueError(f"the value service at {self.url} is {status.get('state', 'not ready')}. Try again later")
        return status["num_pending"], status["num_dead_letters"]

    def _call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        try:
            return call_admin(self.url, self.token, path, body, timeout_s=_TIMEOUT_S)
        except urllib.error.HTTPError as error:
            raise QueueError(_rejection(error)) from error
        except OSError as error:
            reason = getattr(error, "reason", error)
            raise QueueError(f"the value service at {self.url} does not respond: {reason}. Is it running?") from error
        except ValueError as error:
            raise QueueError(f"the program at {self.url} is not a value service's admin app") from error


def _rejection(error: urllib.error.HTTPError) -> str:
    """Return the message and the remedy in an error response."""
    try:
        body = json.load(error)
        fields = "; ".join(f"{one['field']}: {one['description']}" for one in body["violations"])
        return ". ".join(part for part in ((fields or body["message"]).rstrip("."), body["remedy"]) if part)
    except (ValueError, KeyError, TypeError):
        return f"the program that answered is not a value service's admin app: {error}"


def admin_url(text: str) -> str:
    """Return the value of `--admin` as `http://host:port`. Raises `ConfigError` if it is not a URL of this form."""
    try:
        parts = urlsplit(text)
        is_url = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # an unclosed bracket, or a port that is not a number
        is_url = False
    rest = text.partition("://")[2].rstrip("/")
    if not is_url or not rest.isascii() or not rest.isprintable() or any(letter in rest for letter in " /?#@"):
        raise ConfigError(f"--admin: {text!r} must be the value service's admin app, http://host:port")
    return f"{parts.scheme}://{rest}"


def letter_line(letter: dict[str, Any]) -> str:
    """Return a dead letter on one line: id, group, size, reason."""
    group = letter["group"]
    name = f"{group['run_id']}/{group['step']}/{group['group_id']}" if group else "not a label"
    cut = "" if letter["is_whole"] else ", truncated"
    return f"{letter['id']:22} {name:30} {letter['num_bytes']:>9} bytes{cut}  {letter['reason']}"
