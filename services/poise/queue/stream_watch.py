"""Detects that a stream has lost labels that were published and not acknowledged.

Knows no server: states of the stream come from `redis_scripts.STATE`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from poise.queue.interface import age_of, newer_entry


@dataclass(frozen=True, slots=True)
class StreamState:
    """The stream and its dead letters at one moment, as reported by the server."""

    kind: str
    """Type of the stream's key; `none` where there is no such key."""
    letters_kind: str
    length: int
    newest: str
    """Id of the newest entry ever added; empty if there is no stream."""
    has_group: bool
    num_pending: int
    num_unread: int | None
    """Entries not yet delivered to any consumer; None if the server does not count them."""
    num_letters: int
    """Dead letters ever added."""

    @property
    def num_missing(self) -> int:
        """Entries that were deleted before they were consumed; 0 if the server does not count them."""
        if not self.has_group or self.num_unread is None:
            return 0
        return max(0, self.num_unread + self.num_pending - self.length)

    @classmethod
    def parse(cls, reply: Sequence[Any]) -> Self:
        """Read the answer of the script."""
        kind, letters_kind, length, newest, has_group, pending, unread, letters = reply
        return cls(
            kind.decode(),
            letters_kind.decode(),
            length,
            newest.decode(),
            bool(has_group),
            pending,
            unread if unread >= 0 else None,
            letters,
        )


@dataclass(frozen=True, slots=True)
class Expectation:
    """What was known of the stream before its state was requested. It may only have grown since."""

    newest: str
    """Newest entry known to have been published; empty where none is."""
    has_group: bool
    num_missing: int
    """Entries that are known to be missing, and counted."""


class StreamWatch:
    """What this process knows of a stream, and the losses that it found."""

    def __init__(self) -> None:
        self._known = Expectation("", False, 0)
        self.num_losses = 0
        self.last_loss = ""

    @property
    def known(self) -> Expectation:
        """Read it before requesting a state, and pass both to `judge`."""
        return self._known

    def saw_entry(self, entry_id: str) -> None:
        """Note an entry that was published."""
        newest = newer_entry(self._known.newest, entry_id)
        self._known = Expectation(newest, self._known.has_group, self._known.num_missing)

    def saw_group(self) -> None:
        """Note that the consumer group exists."""
        self._known = Expectation(self._known.newest, True, self._known.num_missing)

    def judge(self, state: StreamState, known: Expectation) -> bool:
        """Compare a state with what was known before the request; return whether labels were lost."""
        if known.newest and not state.newest:
            return self._lost("the stream was deleted, with every label that was not yet consumed", state)
        if known.newest and age_of(state.newest) < age_of(known.newest):
            what = f"the stream ends at {state.newest}, but {known.newest} was published"
            return self._lost(f"{what}: the server went back to older data", state)
        if known.has_group and not state.has_group:
            return self._lost(
                "the stream or its consumer group was deleted and created again; labels may be missing",
                state,
            )
        num_missing = state.num_missing
        if num_missing > known.num_missing:
            return self._lost(f"{num_missing - known.num_missing} labels were deleted before they were consumed", state)
        self._known = Expectation(self._known.newest, self._known.has_group, num_missing)
        return False

    def found_deleted(self, num_deleted: int) -> None:
        """Note pending entries of this consumer that were deleted."""
        known = self._known
        if num_deleted > known.num_missing:
            self._count(f"{num_deleted - known.num_missing} labels were deleted before they were consumed")
        self._known = Expectation(known.newest, known.has_group, max(0, known.num_missing - num_deleted))

    def _lost(self, what: str, state: StreamState) -> bool:
        """Count a loss, and take the present state as the new expectation."""
        self._count(what)
        self._known = Expectation(state.newest, state.has_group, state.num_missing)
        return True

    def _count(self, what: str) -> None:
        self.num_losses += 1
        self.last_loss = what
