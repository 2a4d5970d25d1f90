"""The queue of labelled rollouts: what every implementation promises.

Owns the interface and its nouns. Knows neither Redis nor what the entries mean: a payload is bytes.

At-least-once: an entry is delivered again, to the same consumer or to another, until it is acknowledged or
dead-lettered. Consumers are idempotent by the ids inside the payload.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from poise.errors import InvalidRequest, NotFound


@dataclass(frozen=True, slots=True)
class Delivery:
    """One entry handed to a consumer, who now owes an `ack` or a `dead_letter`."""

    entry_id: str
    payload: bytes
    published_s: float
    """When it was published, by the queue's clock, s since 1970."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """An entry that was refused as poison."""

    letter_id: str
    """Names it among the dead letters."""
    entry_id: str
    """The id it had in the queue."""
    payload: bytes
    reason: str
    is_whole: bool
    """Whether the payload is all of it: what exceeds `MAX_DEAD_LETTER_BYTES` is cut off, and cannot be replayed."""


@dataclass(frozen=True, slots=True)
class QueueDepth:
    """How much lies where."""

    num_entries: int
    """Published and not acknowledged: unread and delivered ones together."""
    num_dead_letters: int
    """Entries ever dead-lettered, whether or not still kept."""
    num_losses: int = 0
    """How often this process found published labels missing."""
    last_loss: str = ""
    """Describes the last loss; empty if there was none."""
    problem: str = ""
    """Why the queue answers but accepts no labels; empty if it accepts them."""
    warnings: tuple[str, ...] = ()
    """Server settings that may lose labels in a crash."""


MAX_DEAD_LETTER_BYTES = 4 << 20
"""Payload kept of a dead letter: all of whatever fits a gRPC message."""


class LabelQueue(Protocol):
    """A bounded, durable queue with acknowledgements. Every method may raise `BackendDown`."""

    async def publish(self, payloads: Sequence[bytes]) -> None:
        """Append all payloads or none; durable on return.

        Raises:
            QueueFull: they do not fit under the limit now.
        """
        ...

    async def read(self, *, max_entries: int, wait_s: float) -> list[Delivery]:
        """Return up to `max_entries`: first what this consumer was handed before and still owes, then what dead
        consumers left behind, then new ones. Waits up to `wait_s` for the first; empty when there is none.
        """
        ...

    async def ack(self, entry_ids: Sequence[str]) -> None:
        """Remove entries for good. Unknown ids are ignored."""
        ...

    async def dead_letter(self, delivery: Delivery, reason: str) -> None:
        """Move an entry to the dead letters, in one step."""
        ...

    async def dead_letters(self, *, max_entries: int) -> list[DeadLetter]:
        """Return the newest dead letters, newest first."""
        ...

    async def replay(self, letter_ids: Sequence[str]) -> None:
        """Move dead letters back to the end of the queue, as new entries: all of them in one step, or none.

        Raises:
            NotFound: there is no such letter any more.
            InvalidRequest: a letter that was cut off.
            QueueFull: they do not fit under the limit now.
        """
        ...

    async def discard(self, letter_ids: Sequence[str]) -> int:
        """Delete dead letters for good. Returns how many there were; unknown ids are ignored."""
        ...

    async def depth(self) -> QueueDepth:
        """Count."""
        ...

    async def newest(self) -> str | None:
        """Return the id of the entry published last among those not acknowledged; None when there is none."""
        ...

    async def holds(self, entry_id: str) -> bool:
        """Whether an entry as old as `entry_id`, or older, is not acknowledged."""
        ...

    def expect(self, entry_id: str) -> None:
        """Note an entry known from before a restart. A stream whose newest entry is older has lost labels."""
        ...

    async def close(self) -> None:
        """Release connections. Entries delivered and not acknowledged stay owed."""
        ...


def age_of(entry_id: str) -> tuple[int, int]:
    """Return a sort key for entry ids: the oldest entry sorts first."""
    milliseconds, _, number = entry_id.partition("-")
    return int(milliseconds), int(number or 0)


def newer_entry(one: str, other: str) -> str:
    """Return the newer of two entry ids, either of which may be empty."""
    return max(filter(None, (one, other)), key=age_of, default="")


def queue_is_full(num_entries: int, num_bytes: int, max_entries: int, max_bytes: int, num_more: int) -> str:
    """Return what `QueueFull` says of a queue that holds so much."""
    return (
        f"the label queue holds {num_entries} of {max_entries} entries and {num_bytes} of {max_bytes} bytes; "
        f"{num_more} more entries do not fit. "
        "Wait for the value service to consume, or raise queue.max_entries or queue.max_bytes"
    )


def no_such_letter(letter_id: str) -> NotFound:
    """Return the error of `replay` for a letter that is not there."""
    return NotFound(
        f"there is no dead letter {letter_id!r}: it was replayed, discarded, or pushed out by newer ones",
        remedy="List the dead letters for those that are kept.",
    )


def letter_was_cut(letter_id: str) -> InvalidRequest:
    """Return the error of `replay` for a letter that is not whole."""
    return InvalidRequest.field(
        "ids",
        f"dead letter {letter_id!r} does not hold the whole entry, of which {MAX_DEAD_LETTER_BYTES} bytes are kept; it "
        "cannot be replayed",
    )
