"""SIGTERM during a step, to a real process."""

from __future__ import annotations

from pathlib import Path

from tests.integration.learner.draining import drain_within_a_step


async def test_current_batch_is_answered_and_kept_at_a_stop(model: Path, tmp_path: Path) -> None:
    outcome = await drain_within_a_step(model, tmp_path)
    assert (outcome.policy_version, outcome.version_after, outcome.exit_status) == (1, 1, 0)
