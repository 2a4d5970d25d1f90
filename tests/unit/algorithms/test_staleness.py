"""Staleness of a rollout, in policy versions."""

import pytest

from poise.algorithms.staleness import staleness


def test_the_oldest_token_counts() -> None:
    assert staleness([3, 5], current_version=6) == 3


def test_a_current_rollout_is_not_stale() -> None:
    assert staleness([6], current_version=6) == 0


def test_a_newer_version_gives_negative_staleness() -> None:
    assert staleness([5, 9], current_version=6) == -3


def test_a_rollout_without_spans_is_rejected() -> None:
    with pytest.raises(ValueError, match="span"):
        staleness([], current_version=0)
