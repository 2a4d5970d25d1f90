"""The training loop: order of calls, recovery from crashes anywhere, and checks."""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.unit.orchestrator.world import Crash, World, drive, settings

from poise.orchestrator.errors import RunError, SettingsError


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip fsync: tests crash the process, not the machine."""
    monkeypatch.setattr("os.fsync", lambda _: None)


def world_of(algorithm: str | dict[str, Any]) -> World:
    """Return a world whose value service has the algorithm's estimator."""
    world = World()
    if isinstance(algorithm, dict):
        world.estimator = algorithm.get("estimator", "probe")
    return world


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_bytes().splitlines()]


async def test_a_step_is_journalled_before_labels_are_published(tmp_path: Path) -> None:
    world = World()
    assert await drive(settings(tmp_path, num_steps=1, evaluation={"num_prompts": 0}), world)
    assert world.events == [
        "sample run 0",
        *["verify"] * 4,
        "baselines 0",
        "journalling 0",
        "journal 0",
        "publish 0",
        "submit 0",
        "trained 0",
        "append metrics.jsonl",
        "append values.jsonl",
        "append rollouts.jsonl",
        "append step_states.jsonl",
        "state 1",
        "shown 0",
    ]


PREFIX = {"kind": "poise", "estimator": "score_prefix"}


@pytest.mark.parametrize("algorithm", ["poise", {"kind": "dapo", "max_draws": 3}, "spo", PREFIX])
async def test_a_crash_anywhere_changes_no_output(tmp_path: Path, algorithm: str | dict[str, Any]) -> None:
    undisturbed = world_of(algorithm)
    assert await drive(settings(tmp_path / "undisturbed", algorithm=algorithm), undisturbed)
    assert sorted(undisturbed.batches) == [f"step-{step:08d}" for step in range(3)]
    reference = tmp_path / "undisturbed"
    for crash_at, event in enumerate(undisturbed.events):
        world = world_of(algorithm)
        world.crash_at = crash_at
        config = settings(tmp_path / str(crash_at), algorithm=algorithm)
        with pytest.raises(Crash):
            await drive(config, world)
        world.crashed = False
        assert await drive(config, world), event
        assert repr(world.batches) == repr(undisturbed.batches), event
        assert repr(world.labels) == repr(undisturbed.labels), event
        assert world.version == 3
        for name in ("metrics.jsonl", "rollouts.jsonl", "step_states.jsonl", "evaluations.jsonl"):
            found, expected = lines(config.run_dir, name), lines(reference, name)
            for line in (*found, *expected):
                for clock in ("time_s", "wall_s", "tokens_per_s", "seconds"):
                    line.pop(clock, None)
            assert found == expected, (event, name)
        values = [
            (folder / "values.jsonl").read_text()
            for folder in (config.run_dir, reference)
            if (folder / "values.jsonl").exists()
        ]
        assert len(set(values)) <= 1, event
        assert not list((config.run_dir / "journal").iterdir()), event
        kept, expected = (
            {path.name: path.read_text() for path in (folder / "generations").iterdir()}
            for folder in (config.run_dir, reference)
        )
        assert kept == expected, event


async def test_every_evaluation_happens_once(tmp_path: Path) -> None:
    world, config = World(), settings(tmp_path, num_steps=4)
    await drive(config, world)
    await drive(config, world)
    found = [(line["when"], line["step"], line["policy_version"]) for line in lines(tmp_path, "evaluations.jsonl")]
    assert found == [("before", 0, 0), ("step", 2, 2), ("after", 4, 4)]


async def test_last_evaluation_may_have_more_rollouts(tmp_path: Path) -> None:
    evaluation = {"num_prompts": 2, "rollouts_per_prompt": 1, "final_rollouts_per_prompt": 4}
    await drive(settings(tmp_path, num_steps=1, evaluation=evaluation), World())
    before, after = lines(tmp_path, "evaluations.jsonl")
    assert [len(rewards) for rewards in (*before["rewards"], *after["rewards"])] == [1, 1, 4, 4]
    assert "pass@4" in after["scores"]["overall"]


async def test_an_evaluation_records_responses_and_sampling(tmp_path: Path) -> None:
    world = World()
    tasks = [{"kind": "digits", "domain": "easy"}, {"kind": "digits", "domain": "hard"}]
    evaluation = {"num_prompts": 4, "rollouts_per_prompt": 2, "temperature": 0.6, "top_p": 0.9}
    await drive(settings(tmp_path, num_steps=1, tasks=tasks, evaluation=evaluation, sampling={"max_tokens": 9}), world)
    before, after = lines(tmp_path, "evaluations.jsonl")
    seed = before["sampling"].pop("seed")
    assert before["sampling"] == {"temperature": 0.6, "top_p": 0.9, "top_k": 0, "max_tokens": 9} | {
        "stop": [],
        "stop_token_ids": [],
    }
    assert after["sampling"]["seed"] == seed == world.asked[0][4].seed
    for one in (before, after):
        kept = lines(tmp_path, one["generations"])
        assert [(line["when"], line["step"]) for line in kept] == [(one["when"], one["step"])] * 8
        assert [line["reward"] for line in kept] == [reward for prompt in one["rewards"] for reward in prompt]
        assert [(line["prompt_index"], line["rollout_index"]) for line in kept] == [
            (p, r) for p in range(4) for r in (0, 1)
        ]
        assert [line["task"] for line in kept] == ["digits-1"] * 4 + ["digits-2"] * 4
        assert [line["domain"] for line in kept] == ["easy"] * 4 + ["hard"] * 4
        assert [line["prompt"] for line in kept[::2]] == [prompt.content for prompt in world.asked[0][2]]
        assert all(line["response"] == str(int(line["reward"])) for line in kept)
        assert {line["finish_reason"] for line in kept} == {"stop"}
        assert {tuple(line["policy_versions"]) for line in kept} == {(one["policy_version"],)}
        assert all(1 <= line["num_tokens"] <= 3 for line in kept)
        assert one["scores"]["overall"]["avg@2"]["mean"] == sum(line["reward"] for line in kept) / 8
        passed = [max(prompt) for prompt in one["rewards"]]
        assert one["scores"]["overall"]["pass@2"]["mean"] == sum(passed) / 4
        assert one["scores"]["by_task"]["digits-2"]["pass@2"]["mean"] == sum(passed[2:]) / 2


async def test_evaluations_repeat_the_same_requests(tmp_path: Path) -> None:
    world = World()
    await drive(settings(tmp_path), world)
    asked = [call for call in world.asked if call[0] != "run"]
    assert {call[0] for call in asked} == {"run:evaluation"}
    assert len({(call[2], call[3], call[4]) for call in asked}) == 1
    trained = {call[2][0].content for call in world.asked if call[0] == "run"}
    assert not trained & {prompt.content for prompt in asked[0][2]}
    assert not any(":evaluation" in repr(batch) for batch in world.batches.values())


async def test_a_stop_ends_the_run_after_the_current_step(tmp_path: Path) -> None:
    class Stopper(World):
        async def publish_labels(self, groups: Any) -> int:
            stopping.set()
            return await super().publish_labels(groups)

    world, stopping = Stopper(), asyncio.Event()
    assert not await drive(settings(tmp_path), world, stopping)
    assert list(world.batches) == ["step-00000000"]
    assert [line["step"] for line in lines(tmp_path, "metrics.jsonl")] == [0]
    assert await drive(settings(tmp_path), world)
    assert len(world.batches) == 3


@pytest.mark.parametrize("algorithm", ["grpo", "dapo", "spo", "ppo", "none", "batch_mean"])
async def test_other_algorithms_do_not_use_the_value_service(tmp_path: Path, algorithm: str) -> None:
    world = World()
    world.has_critic = algorithm == "ppo"
    await drive(settings(tmp_path, algorithm=algorithm), world)
    assert not [event for event in world.events if event.startswith(("baselines", "publish"))]
    assert not world.labels
    assert len(world.batches) == 3
    assert all(line["algorithm"] == algorithm for line in lines(tmp_path, "metrics.jsonl"))


async def test_a_critic_gets_rewards(tmp_path: Path) -> None:
    world = World()
    world.has_critic = True
    await drive(settings(tmp_path, algorithm="ppo", num_steps=1), world)
    (batch,) = world.batches.values()
    assert len(batch.rollouts) == 2  # one a prompt, as PPO is used
    assert {rollout.reward for rollout in batch.rollouts} <= {0, 1}
    assert {rollout.advantage for rollout in batch.rollouts} == {0}


@pytest.mark.parametrize(("algorithm", "has_critic"), [("ppo", False), ("poise", True)])
async def test_a_learner_without_the_right_critic_is_rejected(tmp_path: Path, algorithm: str, has_critic: bool) -> None:
    world = World()
    world.has_critic = has_critic
    with pytest.raises(RunError, match=rf"algorithm {algorithm} .*critic.*in a new state_dir"):
        await drive(settings(tmp_path, algorithm=algorithm), world)
    assert not world.events


async def test_dapo_samples_until_it_has_groups_of_unequal_rewards(tmp_path: Path) -> None:
    world, config = (
        World(),
        settings(
            tmp_path, algorithm={"kind": "dapo", "max_draws": 4}, rollouts_per_prompt=2, prompts_per_step=3, num_steps=6
        ),
    )
    await drive(config, world)
    metrics = lines(tmp_path, "metrics.jsonl")
    assert max(line["num_draws"] for line in metrics) > 1
    assert [line["num_groups"] for line in metrics] == [3 * line["num_draws"] for line in metrics]
    for line, batch in zip(metrics, world.batches.values(), strict=True):
        assert line["num_kept_groups"] == 3 or line["num_draws"] == 4
        by_group: dict[str, list[float]] = {}
        for rollout in batch.rollouts:
            by_group.setdefault(rollout.id.group_id, []).append(rollout.advantage)
        assert len(by_group) == line["num_kept_groups"] <= 3
        assert all(min(advantages) < 0 < max(advantages) for advantages in by_group.values())
    # No draw is asked twice, in whatever step: prompts go on after those that were drawn before.
    asked = [tuple(prompt.content for prompt in call[2]) for call in world.asked if call[0] == "run"]
    assert len(set(asked)) == len(asked) == sum(line["num_draws"] for line in metrics)
    seeds = [call[4].seed for call in world.asked if call[0] == "run"]
    assert len(set(seeds)) == len(seeds)
    names = [(call[1], prompt.group_id) for call in world.asked if call[0] == "run" for prompt in call[2]]
    assert len(set(names)) == len(names)


async def test_without_kept_groups_the_last_draw_is_used(tmp_path: Path) -> None:
    class Failing(World):
        async def verify(self, problem: Any, response: str, finish_reason: str) -> Any:
            return await super().verify(problem, "0", finish_reason)

    world = Failing()
    await drive(settings(tmp_path, algorithm={"kind": "dapo", "max_draws": 2}, num_steps=1), world)
    (line,) = lines(tmp_path, "metrics.jsonl")
    assert (line["num_draws"], line["num_kept_groups"], line["zero_advantage_share"]) == (2, 2, 1)
    (batch,) = world.batches.values()
    assert {rollout.advantage for rollout in batch.rollouts} == {0}


async def test_a_run_id_used_before_is_rejected(tmp_path: Path) -> None:
    world = World()
    await drive(settings(tmp_path / "first"), world)
    with pytest.raises(RunError, match=r"already consumed labels of step 0 of run 'run'.*another run_id"):
        await drive(settings(tmp_path / "second"), world)


async def test_a_learner_that_lost_its_state_is_rejected(tmp_path: Path) -> None:
    world = World()
    await drive(settings(tmp_path), world)
    batches = dict(world.batches)
    for version in (0, 2):  # lost altogether, or set back
        world.version = version
        with pytest.raises(RunError, match=rf"at version {version}.*left it at version 3.*lost its state"):
            await drive(settings(tmp_path, num_steps=5), world)
    assert world.batches == batches
    world.version = 3
    assert await drive(settings(tmp_path, num_steps=5), world)


async def test_num_steps_below_the_finished_steps_is_rejected(tmp_path: Path) -> None:
    world = World()
    await drive(settings(tmp_path), world)
    with pytest.raises(RunError, match=r"num_steps is 2, but this run has finished 3 steps. Set num_steps to 3"):
        await drive(settings(tmp_path, num_steps=2), world)


async def test_prompts_depend_only_on_seed_and_step(tmp_path: Path) -> None:
    def asked(world: World) -> dict[int, tuple[Any, Any]]:
        return {call[1]: (call[2], call[4]) for call in world.asked if call[0] == "run"}

    whole, late, other = World(), World(), World()
    await drive(settings(tmp_path / "whole"), whole)
    late.version = 7  # whatever happened before
    late.probed = False
    await drive(settings(tmp_path / "late", run_id="late", evaluation={"num_prompts": 0}), late)
    assert asked(whole) == {call[1]: (call[2], call[4]) for call in late.asked}
    await drive(settings(tmp_path / "other", seed=1), other)
    assert all(asked(whole)[step] != asked(other)[step] for step in range(3))
    seeds = {sampling.seed for _, sampling in asked(whole).values()}
    assert len(seeds) == 3
    assert all(seed is not None and 0 <= seed < 2**63 for seed in seeds)


async def test_groups_are_taken_in_the_order_of_their_prompts(tmp_path: Path) -> None:
    world = World()
    await drive(settings(tmp_path, prompts_per_step=5, num_steps=1), world)
    (batch,) = world.batches.values()
    ids = [(rollout.id.group_id, rollout.id.rollout_index) for rollout in batch.rollouts]
    assert ids == [(f"{group:05d}", sibling) for group in range(5) for sibling in range(2)]


async def test_baselines_of_the_probe_are_subtracted(tmp_path: Path) -> None:
    world = World()
    await drive(settings(tmp_path, num_steps=2), world)
    labels = [world.labels[1, f"{group:05d}"] for group in range(2)]
    expected = [float(r - b) for label in labels for r, b in zip(label.rewards, (0.75, 0.25), strict=True)]
    assert [rollout.advantage for rollout in world.batches["step-00000001"].rollouts] == expected
    line = lines(tmp_path, "metrics.jsonl")[1]
    assert (line["baseline"]["source"], line["baseline"]["probe_version"]) == ("probe", {"digits": 1})


async def test_token_baselines_reach_the_learner(tmp_path: Path) -> None:
    world = world_of(PREFIX)
    await drive(settings(tmp_path, algorithm=PREFIX, num_steps=2), world)
    first, second = (world.batches[f"step-{step:08d}"].rollouts for step in (0, 1))
    labels = {key: label.rollouts[0] for key, label in world.labels.items()}
    assert [rollout.advantage for rollout in first] == [labels[0, rollout.id.group_id].reward for rollout in first]
    for rollout in second:
        label = labels[1, rollout.id.group_id]
        assert rollout.advantage is None and rollout.reward is None
        assert (rollout.advantages == np.float32(label.reward) - label.sum_squared_probs.astype(np.float32)).all()
    bootstrap, estimated = (line["baseline"] for line in lines(tmp_path, "metrics.jsonl"))
    assert (bootstrap["source"], bootstrap["estimator"]) == ("bootstrap", {})
    assert (estimated["source"], estimated["estimator"]) == ("score", {"digits": "score_prefix"})


async def test_biases_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    await drive(settings(tmp_path / "exact", num_steps=1), world)
    assert "biased" not in caplog.text
    world = World()
    world.aggregation = "token_mean"
    with caplog.at_level("INFO"):
        await drive(settings(tmp_path / "biased", num_steps=1, algorithm="opo"), world)
    (warning,) = (record.message for record in caplog.records if record.levelname == "WARNING")
    assert "the gradient is biased: the baseline contains the rollout's own reward. See" in warning
    (note,) = (record.message for record in caplog.records if "the loss is divided by the number" in record.message)
    assert note.startswith("the gradient is biased: ")
    found = [lines(tmp_path / name, "metrics.jsonl")[0]["biases"] for name in ("exact", "biased")]
    assert found == [[], ["own_reward", "token_mean"]]


async def test_domains_may_have_their_own_estimators(tmp_path: Path) -> None:
    world = World()
    world.estimator, world.domain_estimators = "score_prefix", {"b": "probe", "c": "score_mean"}
    tasks = [{"kind": "digits", "domain": domain} for domain in "abc"]
    config = settings(tmp_path, algorithm=PREFIX, num_steps=2, tasks=tasks, prompts_per_step=6, rollouts_per_prompt=2)
    await drive(config, world)
    for label in world.labels.values():
        has_hidden = bool(label.rollouts[0].features.prompt_hidden.size)
        has_tokens = bool(label.rollouts[0].sum_squared_probs.size)
        assert (has_hidden, has_tokens) == ((True, False) if label.domain == "b" else (False, True))
    domains = {key[1]: label.domain for key, label in world.labels.items() if key[0] == 1}
    assert {*domains.values()} == {*"abc"}
    for rollout in world.batches["step-00000001"].rollouts:
        assert (rollout.advantages is not None) == (domains[rollout.id.group_id] == "a")
        assert (rollout.advantage is None) == (domains[rollout.id.group_id] == "a")
    assert lines(tmp_path, "metrics.jsonl")[1]["baseline"]["source"] == "mixed"


@pytest.mark.parametrize(
    ("estimator", "by_domain", "options", "message"),
    [
        ("probe", {}, PREFIX, "train.algorithm.estimator is score_prefix, but value.estimator .* is probe"),
        ("auto", {}, "poise", "train.algorithm.estimator is probe, but value.estimator .* is auto"),
        (
            "score_prefix",
            {"digits": "probe"},
            PREFIX,
            "value.estimator_by_domain.digits is probe, .*rollouts_per_prompt is 1",
        ),
    ],
)
async def test_another_estimator_is_rejected_before_the_first_step(
    tmp_path: Path, estimator: Any, by_domain: Any, options: Any, message: str
) -> None:
    world = World()
    world.estimator, world.domain_estimators = estimator, by_domain
    with pytest.raises(SettingsError, match=message):
        await drive(settings(tmp_path, algorithm=options), world)
    assert not world.events


@pytest.mark.parametrize(
    ("options", "wait_s"), [({}, 30), ({"wait_for_labels_s": 7}, 7), ({"wait_for_labels_s": 0}, 0)]
)
async def test_on_policy_steps_wait_for_the_probe(tmp_path: Path, options: dict[str, Any], wait_s: float) -> None:
    world = World()
    await drive(settings(tmp_path, **options), world)
    assert world.wait_for_labels_s == [wait_s] * 3
    assert [line["baseline"]["probe_up_to_date"] for line in lines(tmp_path, "metrics.jsonl")] == [True] * 3


async def test_steps_sampled_ahead_do_not_wait_for_the_probe(tmp_path: Path) -> None:
    world = World()
    world.max_staleness = 1
    world.behind = {0, 1, 2}
    await drive(settings(tmp_path, max_staleness=1), world)
    assert world.wait_for_labels_s == [0] * 3
    assert [line["baseline"]["probe_up_to_date"] for line in lines(tmp_path, "metrics.jsonl")] == [False] * 3


async def test_a_probe_that_falls_behind_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    world.behind = {1, 2, 4}
    with caplog.at_level(logging.INFO, "poise.orchestrator.loop"):
        await drive(settings(tmp_path, num_steps=5), world)
    said = [(record.levelname, record.getMessage().split(" uses")[0]) for record in caplog.records]
    for cause in ("consuming is paused", "queue is down", "fit failed"):
        assert cause in caplog.records[0].getMessage()
    assert said == [("WARNING", "step 1"), ("INFO", "step 3"), ("WARNING", "step 4")]
    up_to_date = [line["baseline"]["probe_up_to_date"] for line in lines(tmp_path, "metrics.jsonl")]
    assert up_to_date == [True, False, False, True, False]


async def test_other_algorithms_do_not_wait_for_labels(tmp_path: Path) -> None:
    world = World()
    await drive(settings(tmp_path, algorithm="rloo"), world)
    assert [line["baseline"]["probe_up_to_date"] for line in lines(tmp_path, "metrics.jsonl")] == [None] * 3


async def test_verifier_failures_are_counted(tmp_path: Path) -> None:
    class Failing(World):
        async def verify(self, problem: Any, response: str, finish_reason: str) -> Any:
            return replace(await super().verify(problem, "0", finish_reason), error="crashed")

    world = Failing()
    await drive(settings(tmp_path, num_steps=1), world)
    assert lines(tmp_path, "metrics.jsonl")[0]["verifier_errors"] == 4
    assert lines(tmp_path, "evaluations.jsonl")[0]["verifier_errors"] == 4


@pytest.mark.parametrize(("found", "allowed"), [(0.051, 0.05), (11.0, 0.05), (0.3, 0.2), (float("inf"), 10.0)])
async def test_a_run_stops_if_engine_and_learner_disagree(tmp_path: Path, found: float, allowed: float) -> None:
    world = World()
    world.mismatch_kl = found
    with pytest.raises(SettingsError, match=r"step 0: KL .*max_mismatch_kl.*poise models check") as caught:
        await drive(settings(tmp_path, max_mismatch_kl=allowed), world)
    assert f"max_mismatch_kl is {allowed:g}" in str(caught.value)
    assert list(world.batches) == ["step-00000000"]
    with pytest.raises(SettingsError):  # the same command stops again
        await drive(settings(tmp_path, max_mismatch_kl=allowed), world)


@pytest.mark.parametrize(
    ("found", "allowed"), [(0.04, 0.05), (11.0, None), (11.0, 12.0), (float("nan"), 0.05)], ids=str
)
async def test_a_run_continues_within_the_mismatch_limit(tmp_path: Path, found: float, allowed: float | None) -> None:
    world = World()
    world.mismatch_kl = found
    assert await drive(settings(tmp_path, max_mismatch_kl=allowed), world)


async def test_a_raised_mismatch_limit_resumes_the_run(tmp_path: Path) -> None:
    world = World()
    world.mismatch_kl = 0.5
    with pytest.raises(RunError):
        await drive(settings(tmp_path), world)
    assert await drive(settings(tmp_path, max_mismatch_kl=1.0), world)
    assert len(world.batches) == 3


async def test_a_later_mismatch_does_not_stop_the_run(tmp_path: Path) -> None:
    world = World()
    assert await drive(settings(tmp_path, num_steps=1), world)
    world.mismatch_kl = 3.0
    assert await drive(settings(tmp_path, num_steps=3), world)
