"""Replicas are killed, added and drained during a run: no rollout is lost or duplicated, and load is balanced."""

from __future__ import annotations

from pathlib import Path

from tests.integration.orchestrator.elastic import drive_elastic_run


def assert_balanced(shares: dict[str, float], *among: str) -> None:
    """Check that each of the replicas `among` returned a good share, and others nothing.

    Shares follow the replicas' speed, which on a busy machine differs.
    """
    assert all(shares[name] > 0.25 / len(among) for name in among), shares
    assert all(not share for name, share in shares.items() if name not in among), shares


async def test_no_rollout_is_lost_while_replicas_change(tmp_path: Path) -> None:
    outcome = await drive_elastic_run(tmp_path)
    assert_balanced(outcome.shares["three replicas"], "killed", "drained", "steady")
    assert_balanced(outcome.shares["one killed, one added"], "drained", "steady", "added")
    assert_balanced(outcome.shares["one drained"], "steady", "added")
    assert outcome.drained_status == 0, outcome.drained_log
    # Each rollout of each step once: in what was written down, and in what the learner trained on.
    assert (outcome.num_lost, outcome.num_doubled) == (0, 0)
    assert outcome.num_written == outcome.num_trained == outcome.num_expected > 0
    assert (outcome.num_rejected, outcome.policy_version) == (0, outcome.num_steps)
    assert outcome.max_staleness == 1
