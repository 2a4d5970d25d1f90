"""Detects that a stream has lost labels that were published and not acknowledged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from poise.queue.interface import age_of, newer_entry


@dataclass(frozen=True, slots=True)
class StreamState:
    """The stream and its dead letters at one moment, from the script `STATE`."""

    kind: str
    """Type of the stream's key; `none` if the key does not exist."""
    letters_kind: str
    length: int
    newest: str
    """Id of the newest entry ever added; empty if the stream does not exist."""
    has_group: bool
    num_pending: int
    num_unread: int | None
    """Entries that no consumer has got yet; None if the server does not count them."""
    num_letters: int
    """Dead letters ever added."""

    @property
    def num_missing(self) -> int:
        """Entries that were deleted before they were acknowledged; 0 if the server does not count them."""
        if not self.has_group or self.num_unread is None:
            return 0
        return max(0, self.num_unread + self.num_pending - self.length)

    @classmethod
    def parse(cls, reply: Sequence[Any]) -> Self:
        """Parse the reply of the script."""
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
    """What was known of the stream before its state was requested. The stream can only have grown since."""

    newest: str
    """Newest entry known to be published; empty if none is."""
    has_group: bool
    num_missing: int
    """Missing entries that were already reported."""


class LossDetector:
    """Compares what this process knows of a stream with its current state, and counts losses."""

    def __init__(self) -> None:
        self._known = Expectation("", False, 0)
        self.num_losses = 0
        self.last_loss = ""

    @property
    def known(self) -> Expectation:
        """The current expectation. Read it before requesting a state, and pass both to `check`."""
        return self._known

    def record_entry(self, entry_id: str) -> None:
        """Record a published entry."""
        newest = newer_entry(self._known.newest, entry_id)
        self._known = Expectation(newest, self._known.has_group, self._known.num_missing)

    def record_group(self) -> None:
        """Record that the consumer group exists."""
        self._known = Expectation(self._known.newest, True, self._known.num_missing)

    def check(self, state: StreamState, known: Expectation) -> bool:
        """Compare a state with the expectation `known` from before its request; return whether labels were lost."""
        if known.newest and not state.newest:
            return self._record_loss("the stream was deleted with all labels that were not yet consumed", state)
        if known.newest and age_of(state.newest) < age_of(known.newest):
            what = f"the stream ends at {state.newest}, but {known.newest} was published before"
            return self._record_loss(f"{what}: the server restored older data", state)
        if known.has_group and not state.has_group:
            return self._record_loss(
                "the stream or its consumer group was deleted and recreated; labels may be missing",
                state,
            )
        num_missing = state.num_missing
        if num_missing > known.num_missing:
            return self._record_loss(
                f"{num_missing - known.num_missing} labels were deleted before they were consumed", state
            )
        self._known = Expectation(self._known.newest, self._known.has_group, num_missing)
        return False

    def record_deleted(self, num_deleted: int) -> None:
        """Record deleted entries that were pending for this consumer."""
        known = self._known
        if num_deleted > known.num_missing:
            self._count_loss(f"{num_deleted - known.num_missing} labels were deleted before they were consumed")
        self._known = Expectation(known.newest, known.has_group, max(0, known.num_missing - num_deleted))

    def _record_loss(self, what: str, state: StreamState) -> bool:
        """Count a loss and expect the current state from now on."""
        self._count_loss(what)
        self._known = Expectation(state.newest, state.has_group, state.num_missing)
        return True

    def _count_loss(self, what: str) -> None:
        self.num_losses += 1
        self.last_loss = what
