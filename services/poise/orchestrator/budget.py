"""What a run may spend, and what it has spent: steps, response tokens, seconds of training.

Pure. A step's tokens count when it is finished, in the order of steps: what was sampled ahead and is never trained on
counts nowhere, so that where a run ends follows from its steps alone, however often it was restarted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Spent:
    """What the finished steps of a run took, over all its processes."""

    num_steps: int = 0
    tokens: int = 0
    """Response tokens sampled for training."""
    wall_s: float = 0.0
    """Seconds of training, without evaluations."""


@dataclass(frozen=True, slots=True)
class Limits:
    """A run ends after the step that reaches the first of them. None limits nothing."""

    num_steps: int
    tokens: int | None = None
    wall_s: float | None = None

    def are_reached(self, spent: Spent) -> bool:
        """Whether nothing is left to spend."""
        return self.share(spent) >= 1

    def share(self, spent: Spent) -> float:
        """Return how much of the limit that is nearest has been spent; 1 and more when it is reached."""
        shares = [spent.num_steps / self.num_steps]
        if self.tokens is not None:
            shares.append(spent.tokens / self.tokens)
        if self.wall_s is not None:
            shares.append(spent.wall_s / self.wall_s)
        return max(shares)

    def num_steps_left(self, spent: Spent) -> float:
        """Return how many steps are left, if those to come take what those so far took; at least one was finished."""
        share = self.share(spent)
        return max(0.0, (1 - share) / share * spent.num_steps)

    def describe(self, spent: Spent) -> str:
        """Say how far a run is."""
        parts = [f"step {spent.num_steps} of {self.num_steps}"]
        if self.tokens is not None:
            parts.append(f"{spent.tokens} of {self.tokens} tokens")
        if self.wall_s is not None:
            parts.append(f"{spent.wall_s:.0f} of {self.wall_s:g} s")
        return ", ".join(parts)


def sampled_tokens(numbers: Mapping[str, Any]) -> int:
    """Return the response tokens sampled for a step, those of groups that its algorithm dropped among them.

    `numbers` is its line of metrics.jsonl: `sampled_tokens` there, or, where nothing is dropped, those trained on.
    """
    return int(numbers.get("sampled_tokens", numbers["response_tokens"]["total"]))


def passes_multiple(every: float, before: float, now: float) -> bool:
    """Whether a multiple of `every` lies beyond `before` and not beyond `now`; never for an `every` of 0."""
    return every > 0 and now // every > before // every
