"""The interface of the queue of labelled groups. A payload is opaque bytes.

Delivery is at-least-once: an entry is delivered again, to the same consumer or to another, until it is acknowledged or
dead-lettered. Consumers use the ids in the payload to learn each group once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from poise.errors import InvalidRequest, NotFound


@dataclass(frozen=True, slots=True)
class Delivery:
    """One entry delivered to a consumer, which must `ack` or `dead_letter` it."""

    entry_id: str
    payload: bytes
    published_s: float
    """Time of publishing by the queue's clock, s since 1970."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """An entry that could not be learnt."""

    letter_id: str
    """Its id among the dead letters."""
    entry_id: str
    """Its id in the queue."""
    payload: bytes
    reason: str
    is_whole: bool
    """False if the payload was truncated to `MAX_DEAD_LETTER_BYTES`. Such a letter cannot be replayed."""


@dataclass(frozen=True, slots=True)
class QueueDepth:
    """Queue sizes and health."""

    num_entries: int
    """Entries that are published and not acknowledged, delivered or not."""
    num_dead_letters: int
    """Entries ever dead-lettered, including those no longer kept."""
    num_losses: int = 0
    """Number of times this process found published labels missing."""
    last_loss: str = ""
    """Description of the last loss; empty if there was none."""
    problem: str = ""
    """Why the queue accepts no labels although it is reachable; empty if it accepts them."""
    warnings: tuple[str, ...] = ()
    """Settings of the server that may lose labels in a crash."""


MAX_DEAD_LETTER_BYTES = 4 << 20
"""Maximum payload kept of a dead letter. It fits in a gRPC message."""


class LabelQueue(Protocol):
    """A bounded, durable queue with acknowledgements. Every coroutine may raise `BackendDown`."""

    async def publish(self, payloads: Sequence[bytes]) -> None:
        """Append all payloads or none, durable on return.

        Raises:
            QueueFull: they exceed a limit of the queue now.
        """
        ...

    async def read(self, *, max_entries: int, wait_s: float) -> list[Delivery]:
        """Return up to `max_entries` entries, or none after `wait_s`.

        The order: entries already delivered to this consumer and not acknowledged, entries of dead consumers, new
        entries.
        """
        ...

    async def ack(self, entry_ids: Sequence[str]) -> None:
        """Remove entries permanently. Unknown ids are ignored."""
        ...

    async def dead_letter(self, delivery: Delivery, reason: str) -> None:
        """Move an entry to the dead letters, in one step."""
        ...

    async def dead_letters(self, *, max_entries: int) -> list[DeadLetter]:
        """Return the newest dead letters, newest first."""
        ...

    async def replay(self, letter_ids: Sequence[str]) -> None:
        """Move dead letters to the end of the queue as new entries: all in one step, or none.

        Raises:
            NotFound: a letter does not exist.
            InvalidRequest: a letter was truncated.
            QueueFull: they exceed a limit of the queue now.
        """
        ...

    async def discard(self, letter_ids: Sequence[str]) -> int:
        """Delete dead letters permanently; return how many. Unknown ids are ignored."""
        ...

    async def depth(self) -> QueueDepth:
        """Return the queue's sizes and health."""
        ...

    async def newest_unacked(self) -> str | None:
        """Return the id of the newest entry that is not acknowledged; None if there is none."""
        ...

    async def has_unacked_up_to(self, entry_id: str) -> bool:
        """Whether `entry_id` or an older entry is not acknowledged."""
        ...

    def expect_at_least(self, entry_id: str) -> None:
        """Set the newest entry known from before a restart. A stream that ends before it has lost labels."""
        ...

    async def close(self) -> None:
        """Close connections. Delivered entries that are not acknowledged are delivered again."""
        ...


def age_of(entry_id: str) -> tuple[int, int]:
    """Return a sort key for entry ids, oldest first."""
    milliseconds, _, number = entry_id.partition("-")
    return int(milliseconds), int(number or 0)


def newer_entry(one: str, other: str) -> str:
    """Return the newer of two entry ids. Either may be empty."""
    return max(filter(None, (one, other)), key=age_of, default="")


def queue_is_full(num_entries: int, num_bytes: int, max_entries: int, max_bytes: int, num_more: int) -> str:
    """Return the message of `QueueFull`."""
    return (
        f"the label queue has {num_entries} of {max_entries} entries and {num_bytes} of {max_bytes} bytes; "
        f"{num_more} more entries do not fit. "
        "Wait until the value service consumes some, or raise queue.max_entries or queue.max_bytes"
    )


def no_such_letter(letter_id: str) -> NotFound:
    """Return the error of `replay` for a missing letter."""
    return NotFound(
        f"dead letter {letter_id!r} does not exist: it was replayed, discarded, or dropped for newer ones",
        remedy="List the dead letters to see those that are kept.",
    )


def letter_was_truncated(letter_id: str) -> InvalidRequest:
    """Return the error of `replay` for a truncated letter."""
    return InvalidRequest.field(
        "ids",
        f"dead letter {letter_id!r} was truncated to {MAX_DEAD_LETTER_BYTES} bytes and cannot be replayed; discard it",
    )
