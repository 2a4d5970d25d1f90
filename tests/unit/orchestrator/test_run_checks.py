"""Runs that train nothing fail with the reason."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from tests.unit.orchestrator.world import World, drive, settings

from poise.orchestrator import job
from poise.orchestrator.config import OrchestratorConfig
from poise.orchestrator.errors import RunError, SettingsError
from poise.orchestrator.run_checks import UntrainedSteps, check_estimators, untrained_reason
from poise_client.types import Batch, StepMetrics, StepResult

NOT_EVALUATED = {"num_prompts": 0}


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip fsync: tests crash the process, not the machine."""
    monkeypatch.setattr("os.fsync", lambda _: None)


def check_probe_in(tmp_path: Path, domain: str, *row_domains: str, **changes: Any) -> None:
    """Check a run with one rollout of each prompt against a value service with a probe in `domain` only."""
    algorithm = {"kind": "poise", "estimator": "score_prefix"}
    config = settings(tmp_path, **({"algorithm": algorithm, "rollouts_per_prompt": 1} | changes))
    check_estimators(config, "score_prefix", {domain: "probe"}, row_domains)


def test_probes_of_the_runs_domains_need_two_rollouts(tmp_path: Path) -> None:
    gym = {"tasks": [{"kind": "gym", "name": "spell_backward"}]}
    for domain, row_domains, changes in (("digits", (), {}), ("math", ("math",), {}), ("spell_backward", (), gym)):
        with pytest.raises(SettingsError, match=f"estimator_by_domain.{domain} is probe, which needs 2 rollouts"):
            check_probe_in(tmp_path, domain, *row_domains, **changes)
        check_probe_in(tmp_path, domain, *row_domains, **changes | {"rollouts_per_prompt": 2})
        check_probe_in(tmp_path, domain, *row_domains, **changes | {"algorithm": "spo"})
    check_probe_in(tmp_path, "math")


class Rejecting(World):
    """A learner that rejects every rollout for one reason, from a step on."""

    def __init__(self, reason: str, steps: range = range(1000)) -> None:
        super().__init__()
        self.reason = reason
        self.steps = steps

    async def submit_advantages(self, batch: Batch) -> StepResult:
        result = await super().submit_advantages(batch)
        if batch.step not in self.steps:
            return result
        rejected = tuple((rollout.id, self.reason) for rollout in batch.rollouts)
        return dataclasses.replace(result, metrics=StepMetrics(), rejected=rejected)


class Unverified(World):
    """A verifier that fails on every response."""

    async def verify(self, problem: Any, response: str, finish_reason: str) -> Any:
        return dataclasses.replace(await super().verify(problem, "0", finish_reason), error="crashed")


class NonFinite(World):
    """A learner whose updates are never finite."""

    async def submit_advantages(self, batch: Batch) -> StepResult:
        result = await super().submit_advantages(batch)
        metrics = dataclasses.replace(result.metrics, num_updates=0, num_skipped_updates=2)
        return dataclasses.replace(result, metrics=metrics)


class Equal(World):
    """A verifier that gives every response the same reward."""

    async def verify(self, problem: Any, response: str, finish_reason: str) -> Any:
        return await super().verify(problem, "1", finish_reason)


def finished_steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("world", "options", "why"),
    [
        (
            Rejecting("stale"),
            {},
            "rejected all rollouts: 4 older than max_staleness.*lower it",
        ),
        (Rejecting("future_version"), {}, "rejected all rollouts: 4 sampled by a newer policy version"),
        (Rejecting("duplicate"), {}, "rejected all rollouts: 4 trained on before; give the run a new name"),
        (Rejecting("failed"), {}, "training failed repeatedly.*folder `failed`.*micro_batch_tokens"),
        (Rejecting("reason_of_a_later_release"), {}, "rejected all rollouts: 4 reason_of_a_later_release"),
        (Unverified(), {}, "the verifier failed on all 4 rollouts.*Fix the verifier"),
        (NonFinite(), {}, "all 2 updates had a non-finite loss.*learning_rate"),
        (
            Equal(),
            {"algorithm": {"kind": "dapo", "max_draws": 2}, "rollouts_per_prompt": 2},
            r"dapo dropped all 4 groups.*\(mean 1.000\)",
        ),
    ],
)
async def test_steps_in_a_row_without_training_end_the_run(
    tmp_path: Path, world: World, options: dict[str, Any], why: str
) -> None:
    config = settings(tmp_path, num_steps=40, evaluation=NOT_EVALUATED, **options)
    with pytest.raises(RunError, match=rf"last 5 steps trained nothing.*Step 4: .*{why}.*max_untrained_steps"):
        await drive(config, world)
    assert finished_steps(tmp_path) == [0, 1, 2, 3, 4]


async def test_a_step_that_trains_resets_the_count(tmp_path: Path) -> None:
    world = Rejecting("stale", range(2, 6))
    assert await drive(settings(tmp_path, num_steps=12, evaluation=NOT_EVALUATED), world)


async def test_the_limit_is_a_setting(tmp_path: Path) -> None:
    config = settings(tmp_path, num_steps=9, max_untrained_steps=2, evaluation=NOT_EVALUATED)
    with pytest.raises(RunError, match="last 2 steps trained nothing"):
        await drive(config, Rejecting("stale", range(4, 9)))
    assert finished_steps(tmp_path) == [0, 1, 2, 3, 4, 5]


async def test_a_resumed_run_tries_one_more_step(tmp_path: Path) -> None:
    world, config = Rejecting("stale"), settings(tmp_path, num_steps=9, evaluation=NOT_EVALUATED)
    with pytest.raises(RunError, match="last 5 steps"):
        await drive(config, world)

    with pytest.raises(RunError, match="last 6 steps"):
        await drive(config, world)
    world.steps = range(0)

    assert await drive(config, world)
    assert finished_steps(tmp_path) == list(range(9))


async def test_steps_sampled_ahead_count_too(tmp_path: Path) -> None:
    world = Rejecting("stale")
    world.max_staleness = 2
    config = settings(tmp_path, num_steps=30, max_staleness=2, evaluation=NOT_EVALUATED)
    with pytest.raises(RunError, match="last 5 steps trained nothing"):
        await drive(config, world)


def test_a_short_run_without_training_fails_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Clients(Rejecting):
        def __init__(self, endpoints: Any, stopping: asyncio.Event) -> None:
            super().__init__("stale")

        async def __aenter__(self) -> Clients:
            return self

        async def __aexit__(self, *exception: object) -> None: ...

        async def wait_until_up(self, *, with_value: bool) -> None: ...

        async def check_export(self, name: str) -> None: ...

        async def export_model(self, name: str, **options: Any) -> Any:
            raise AssertionError("a model that was not trained is not exported")

    monkeypatch.setattr(job, "ServiceClients", Clients)
    monkeypatch.setattr(job, "configure_logging", lambda _: None)
    config = OrchestratorConfig(
        run_dir=tmp_path, num_steps=2, prompts_per_step=2, tasks=[{"kind": "digits"}], evaluation=NOT_EVALUATED
    )
    assert job.train(config) == job.FAILED
    assert "none of the run's 2 steps trained anything. Step 1: the learner rejected all rollouts" in caplog.text


def line(**changes: Any) -> dict[str, Any]:
    numbers: dict[str, Any] = {
        "step": 0,
        "algorithm": "poise",
        "num_rollouts": 4,
        "num_groups": 2,
        "num_rejected": {},
        "verifier_errors": 0,
        "reward": {"mean": 0.5},
        "learner": {"num_rollouts": 4, "num_updates": 1, "num_skipped_updates": 0},
    }
    return numbers | changes


@pytest.mark.parametrize(
    "partly",
    [
        line(),
        line(num_rejected={"stale": 3}, learner={"num_rollouts": 1, "num_updates": 1, "num_skipped_updates": 0}),
        line(verifier_errors=3),
        line(learner={"num_rollouts": 4, "num_updates": 1, "num_skipped_updates": 5}),
        line(num_filtered_groups=1),
    ],
)
def test_a_partly_rejected_step_counts_as_trained(partly: dict[str, Any]) -> None:
    assert untrained_reason(partly) is None


def test_a_step_without_rollouts_trained_nothing() -> None:
    assert untrained_reason(line(num_rollouts=0, num_groups=0)) == "it has no rollouts"


def test_a_run_may_end_with_an_untrained_step() -> None:
    untrained = UntrainedSteps(5, [line(), line(verifier_errors=4)])
    untrained.check_end()
