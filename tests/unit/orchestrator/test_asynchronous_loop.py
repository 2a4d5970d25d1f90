"""Sampling ahead of the learner: within the limit, in order, and each step trains once after a crash."""

from __future__ import annotations

import asyncio
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from tests.unit.orchestrator.world import Crash, World, drive, settings

from poise.orchestrator.config import OrchestratorConfig
from poise.orchestrator.errors import RunError

NUM_STEPS = 6


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip fsync: tests crash the process, not the machine."""
    monkeypatch.setattr("os.fsync", lambda _: None)


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_bytes().splitlines()]


def ahead(folder: Path, max_staleness: int, **values: Any) -> OrchestratorConfig:
    return settings(
        folder, num_steps=NUM_STEPS, max_staleness=max_staleness, **({"evaluation": {"num_prompts": 0}} | values)
    )


def slow_world(max_staleness: int, slowness: int = 20) -> World:
    """Return a world whose learner is slower than its generation service."""
    world = World()
    world.max_staleness, world.slowness = max_staleness, slowness
    return world


def num_in_hand(events: list[str]) -> list[int]:
    """Return the number of unfinished earlier steps at the start of each step's sampling."""
    finished, found = 0, []
    for event in events:
        name, *rest = event.split()
        if name == "state":
            finished = int(rest[-1])
        elif name == "sample":
            found.append(int(rest[-1]) - finished)
    return found


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
async def test_sampling_is_ahead_by_at_most_max_staleness(tmp_path: Path, max_staleness: int) -> None:
    world = slow_world(max_staleness)
    assert await drive(ahead(tmp_path, max_staleness), world)
    distances = num_in_hand(world.events)
    assert max(distances) == max_staleness
    assert distances[max_staleness:] == [max_staleness] * (NUM_STEPS - max_staleness)
    # What is sampled ahead is as old as that when it is trained on: the learner's word for it, which all figures show.
    rows = lines(tmp_path, "metrics.jsonl")
    expected = [min(step, max_staleness) for step in range(NUM_STEPS)]
    assert [row["steps_ahead"] for row in rows] == expected
    assert [row["staleness"] for row in rows] == [{"mean": age, "max": age} for age in expected]


async def test_generation_and_learner_work_at_the_same_time(tmp_path: Path) -> None:
    world = slow_world(1)
    assert await drive(ahead(tmp_path, 1), world)
    events = world.events
    for step in range(NUM_STEPS - 1):
        trained = events.index(f"trained {step}")
        assert events.index(f"sample run {step + 1}") < trained
        assert events.index(f"journal {step + 1}") < trained


@pytest.mark.parametrize("max_staleness", [1, 3])
async def test_steps_train_in_order(tmp_path: Path, max_staleness: int) -> None:
    world = slow_world(max_staleness, slowness=2)
    assert await drive(ahead(tmp_path, max_staleness), world)
    events = world.events
    for step in range(NUM_STEPS):
        within = [f"sample run {step}", f"baselines {step}", f"journal {step}", f"publish {step}", f"submit {step}"]
        assert [event for event in events if event in within] == within
    assert [event for event in events if event.startswith("submit")] == [f"submit {step}" for step in range(NUM_STEPS)]
    published = [event for event in events if event.startswith(("publish", "state"))]
    assert published == [event for step in range(NUM_STEPS) for event in (f"publish {step}", f"state {step + 1}")]


@pytest.mark.slow
async def test_a_crash_anywhere_trains_every_step_once(tmp_path: Path) -> None:
    undisturbed = slow_world(2, slowness=1)
    evaluation = {"num_prompts": 2, "rollouts_per_prompt": 2, "every_steps": 2}
    assert await drive(ahead(tmp_path / "undisturbed", 2, evaluation=evaluation), undisturbed)
    asked = {call[1]: call[2:5] for call in undisturbed.asked if call[0] == "run"}
    for crash_at in range(len(undisturbed.events)):
        world = slow_world(2, slowness=1)
        world.crash_at = crash_at
        config = ahead(tmp_path / str(crash_at), 2, evaluation=evaluation)
        try:
            await drive(config, world)
        except Crash:
            kept = [path.name for path in (config.run_dir / "journal").glob("step-*")]
            journalled_before = len(world.events)
            world.crashed = False
            assert await drive(config, world)
            sampled_again = [event for event in world.events[journalled_before:] if event.startswith("sample run ")]
            assert not {f"step-{int(event.split()[2]):08d}" for event in sampled_again} & set(kept)
        # Every step once, as the world itself asserts of content and age; in the order of steps.
        assert list(world.batches) == [f"step-{step:08d}" for step in range(NUM_STEPS)]
        assert sorted(world.labels) == [(step, f"{group:05d}") for step in range(NUM_STEPS) for group in range(2)]
        rows = lines(config.run_dir, "metrics.jsonl")
        assert [row["step"] for row in rows] == list(range(NUM_STEPS))
        assert [row["policy_version"] for row in rows] == list(range(1, NUM_STEPS + 1))
        assert all(now["wall_s"] <= later["wall_s"] for now, later in itertools.pairwise(rows))
        assert {call[1]: call[2:5] for call in world.asked if call[0] == "run"} == asked
        evaluations = [
            (line["when"], line["step"], line["policy_version"]) for line in lines(config.run_dir, "evaluations.jsonl")
        ]
        assert evaluations == [("before", 0, 0), ("step", 2, 2), ("step", 4, 4), ("after", 6, 6)]
        assert not list((config.run_dir / "journal").iterdir())


async def test_evaluations_are_between_steps_when_sampling_ahead(tmp_path: Path) -> None:
    world = slow_world(2)
    await drive(ahead(tmp_path, 2, evaluation={"num_prompts": 2, "rollouts_per_prompt": 2, "every_steps": 3}), world)
    found = [(line["when"], line["step"], line["policy_version"]) for line in lines(tmp_path, "evaluations.jsonl")]
    assert found == [("before", 0, 0), ("step", 3, 3), ("after", 6, 6)]
    assert world.events.index("trained 2") < world.events.index("evaluated step 3") < world.events.index("submit 3")


async def test_a_stop_finishes_sampled_steps_and_starts_none(tmp_path: Path) -> None:
    class Stopper(World):
        async def publish_labels(self, groups: Any) -> int:
            if groups[0].step == 1:
                stopping.set()
            return await super().publish_labels(groups)

    world, stopping = Stopper(), asyncio.Event()
    world.max_staleness, world.slowness = 2, 20
    assert not await drive(ahead(tmp_path, 2), world, stopping)
    assert list(world.batches) == [f"step-{step:08d}" for step in range(4)]  # 1 in hand, 2 and 3 ahead of it
    assert not list((tmp_path / "journal").iterdir())
    assert await drive(ahead(tmp_path, 2), world)
    assert len(world.batches) == NUM_STEPS


async def test_an_immediate_stop_keeps_journalled_steps(tmp_path: Path) -> None:
    world = slow_world(2, slowness=60_000)
    driven = asyncio.create_task(drive(ahead(tmp_path, 2), world))
    while "journal 2" not in world.events:
        await asyncio.sleep(0.001)
    driven.cancel()
    with pytest.raises(asyncio.CancelledError):
        await driven
    assert sorted(path.name for path in (tmp_path / "journal").iterdir()) == [f"step-{step:08d}" for step in range(3)]
    world.slowness = 0
    assert await drive(ahead(tmp_path, 2), world)
    assert [call[1] for call in world.asked] == list(range(NUM_STEPS))  # none of them was sampled twice


async def test_lower_staleness_samples_distant_steps_again(tmp_path: Path) -> None:
    class Dying(World):
        async def submit_advantages(self, batch: Any) -> Any:
            while batch.step == 1 and "journal 3" not in self.events:
                await asyncio.sleep(0.001)
            if batch.step == 1:
                raise Crash
            return await super().submit_advantages(batch)

    world = Dying()
    world.max_staleness, world.slowness = 2, 20
    with pytest.raises(Crash):
        await drive(ahead(tmp_path, 2), world)
    successor = World()
    successor.__dict__.update(world.__dict__ | {"events": []})
    # Step 1 may have left, however old it is by now; 2 and 3 were sampled two steps ahead.
    await drive(ahead(tmp_path, 1), successor)
    sampled = [event for event in successor.events if event.startswith("sample")]
    assert sampled == [f"sample run {step}" for step in range(2, NUM_STEPS)]
    assert [row["staleness"]["max"] for row in lines(tmp_path, "metrics.jsonl")] == [0, 1, 1, 1, 1, 1]


async def test_errors_of_steps_ahead_are_raised_in_order(tmp_path: Path) -> None:
    class Consumed(World):
        async def estimate_baselines(self, run_id: str, step: int, groups: Any, wait_for_labels_s: float) -> Any:
            if step == 2:
                raise RunError("step 2 cannot be valued")
            return await super().estimate_baselines(run_id, step, groups, wait_for_labels_s)

    world = Consumed()
    world.max_staleness, world.slowness = 3, 20
    with pytest.raises(RunError, match="step 2 cannot be valued"):
        await drive(ahead(tmp_path, 3), world)
    assert list(world.batches) == ["step-00000000", "step-00000001"]
    assert not [event for event in world.events if event == "sample run 3"]


@pytest.mark.parametrize(("learners", "message"), [(0, r"max_staleness of this run is 2.*learner accepts 0"), (2, "")])
async def test_too_little_staleness_is_rejected_at_the_start(tmp_path: Path, learners: int, message: str) -> None:
    world = slow_world(learners)
    if not message:
        assert await drive(ahead(tmp_path, 2), world)
        return
    with pytest.raises(RunError, match=message) as refused:
        await drive(ahead(tmp_path, 2), world)
    assert "run.yaml has one `max_staleness` for both" in str(refused.value)
    assert world.events == []
