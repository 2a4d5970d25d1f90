"""SIGTERM under load, to a real process."""

from __future__ import annotations

from pathlib import Path

from tests.integration.value.draining import drain_under_load


async def test_every_published_label_is_learnt_once(tmp_path: Path) -> None:
    outcome = await drain_under_load(tmp_path, after_s=0.5)
    assert outcome.published and outcome.num_requests
    assert (outcome.lost, outcome.doubled) == (set(), set())
    assert outcome.retryable
    assert outcome.exit_statuses == [0, 0]
