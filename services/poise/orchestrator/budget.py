"""The limits of a run and its usage: steps, response tokens, seconds of training.

Tokens of a step count when the step is finished. Groups that were sampled ahead but never trained on do not count, so
the step at which a run ends does not depend on restarts.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Usage:
    """What the finished steps of a run used, over all its processes."""

    num_steps: int = 0
    tokens: int = 0
    """Response tokens sampled for training."""
    wall_s: float = 0.0
    """Seconds of training, without evaluations."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of a run. It ends after the step that reaches the first of them; None is no limit."""

    num_steps: int
    tokens: int | None = None
    wall_s: float | None = None

    def are_reached(self, usage: Usage) -> bool:
        """Return whether any limit is reached."""
        return self.fraction(usage) >= 1

    def fraction(self, usage: Usage) -> float:
        """Return the used fraction of the limit that is closest; at least 1 once it is reached."""
        fractions = [usage.num_steps / self.num_steps]
        if self.tokens is not None:
            fractions.append(usage.tokens / self.tokens)
        if self.wall_s is not None:
            fractions.append(usage.wall_s / self.wall_s)
        return max(fractions)

    def num_steps_left(self, usage: Usage) -> float:
        """Return the expected number of steps left if they use as much as those before. Needs a finished step."""
        fraction = self.fraction(usage)
        return max(0.0, (1 - fraction) / fraction * usage.num_steps)

    def describe(self, usage: Usage) -> str:
        """Return the usage and the limits as text."""
        parts = [f"step {usage.num_steps} of {self.num_steps}"]
        if self.tokens is not None:
            parts.append(f"{usage.tokens} of {self.tokens} tokens")
        if self.wall_s is not None:
            parts.append(f"{usage.wall_s:.0f} of {self.wall_s:g} s")
        return ", ".join(parts)


def passes_multiple(every: float, before: float, now: float) -> bool:
    """Return whether a multiple of `every` is in (before, now]; False if `every` is 0."""
    return every > 0 and now // every > before // every
