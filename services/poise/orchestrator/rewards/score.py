"""A reward that says why."""

from __future__ import annotations


class Score(float):
    """A reward in [0, 1] with the reason for it."""

    reason: str

    def __new__(cls, reward: float, reason: str = "") -> Score:
        """Return `reward`, with its reason."""
        score = super().__new__(cls, reward)
        score.reason = reason
        return score
