"""SIGTERM to a real process under load."""

from __future__ import annotations

from pathlib import Path

from tests.integration.generation.conftest import Reference
from tests.integration.generation.draining import drain_under_load
from tests.integration.generation.test_process import run


def command(reference: Reference, *settings: str) -> list[str]:
    options = [part for setting in (f"model={reference.folder}", *settings) for part in ("--set", setting)]
    return ["poise.generation", *options]


async def test_drain_finishes_accepted_rollouts_within_its_limit(tmp_path: Path, reference: Reference) -> None:
    with run(tmp_path / "run", *command(reference, "drain_timeout_s=60")) as process:
        process.wait_until_ready()
        outcome = await drain_under_load(process, max_tokens=48, after_s=1.0)
    assert outcome.accepted > 0
    assert (outcome.whole_calls, outcome.broken_calls) == (outcome.calls_in_flight, 0)
    assert outcome.retryable
    assert outcome.exit_status == 0
    assert outcome.drain_s < 60
    assert "Traceback" not in process.log


async def test_rollouts_beyond_the_drain_limit_fail_as_retryable(tmp_path: Path, reference: Reference) -> None:
    with run(tmp_path / "run", *command(reference, "drain_timeout_s=0.5")) as process:
        process.wait_until_ready()
        outcome = await drain_under_load(process, max_tokens=4096, after_s=1.0)
    assert outcome.accepted > 0
    assert outcome.broken_calls > 0
    assert outcome.retryable
    assert outcome.drain_s < 30
    assert "did not finish within drain_timeout_s = 0.5" in process.log
