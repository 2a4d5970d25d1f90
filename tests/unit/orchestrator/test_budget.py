"""Limits and evaluations by tokens or seconds, across crashes and with steps sampled ahead."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.unit.orchestrator.test_asynchronous_loop import slow_world
from tests.unit.orchestrator.world import Crash, World, drive, settings

from poise.orchestrator import callbacks
from poise.orchestrator.budget import Limits, Usage, passes_multiple
from poise.orchestrator.callbacks import RunClock


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip fsync: tests crash the process, not the machine."""
    monkeypatch.setattr("os.fsync", lambda _: None)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Return a clock that only tests advance."""
    time = SimpleNamespace(s=100.0)
    time.monotonic = lambda: time.s
    monkeypatch.setattr(callbacks, "time", time)
    return time


class Timed(World):
    """A world where sampling a step takes 3 s, and an evaluation 100 s."""

    def __init__(self, now: SimpleNamespace) -> None:
        super().__init__()
        self._now = now

    async def sample(self, run_id: str, *rest: Any) -> Any:
        async for group in super().sample(run_id, *rest):
            yield group
        self._now.s += 3.0 if run_id == "run" else 100.0


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_bytes().splitlines()]


def counted(folder: Path) -> list[int]:
    """Return the response tokens of each step."""
    return [line["response_tokens"]["total"] for line in lines(folder, "metrics.jsonl")]


NO_EVALUATION = {"num_prompts": 0}


def test_the_closest_limit_decides() -> None:
    limits = Limits(10, tokens=200, wall_s=50.0)
    assert limits.fraction(Usage(4, 100, 5.0)) == 0.5
    assert limits.fraction(Usage(4, 20, 45.0)) == 0.9
    assert not limits.are_reached(Usage(9, 199, 49.9))
    assert all(limits.are_reached(usage) for usage in (Usage(10, 0, 0.0), Usage(1, 200, 0.0), Usage(1, 0, 50.0)))
    assert Limits(10).fraction(Usage(4, 10**9, 1e9)) == 0.4


def test_steps_left_are_extrapolated() -> None:
    assert Limits(10).num_steps_left(Usage(4, 0, 0.0)) == pytest.approx(6)
    assert Limits(1000, tokens=300).num_steps_left(Usage(4, 120, 0.0)) == pytest.approx(6)  # 30 a step, 180 to go
    assert Limits(10).num_steps_left(Usage(11, 0, 0.0)) == 0


def test_limits_are_described() -> None:
    assert Limits(8).describe(Usage(3, 99, 7.0)) == "step 3 of 8"
    assert Limits(8, 200, 60.0).describe(Usage(3, 99, 7.4)) == "step 3 of 8, 99 of 200 tokens, 7 of 60 s"


@pytest.mark.parametrize(
    ("every", "before", "now", "passed"),
    [(10, 0, 9, False), (10, 0, 10, True), (10, 10, 19, False), (10, 19, 41, True), (0, 0, 50, False)],
)
def test_a_multiple_is_passed_once(every: int, before: int, now: int, passed: bool) -> None:
    assert passes_multiple(every, before, now) is passed


def test_a_paused_clock_does_not_advance(now: SimpleNamespace) -> None:
    clock = RunClock(5.0)
    now.s += 2
    with clock.paused():
        now.s += 40
        assert clock.now_s() == 7.0
    now.s += 1
    assert clock.now_s() == 8.0


@pytest.mark.parametrize(("extra", "num_steps"), [(-1, 3), (0, 3), (1, 4)])
async def test_the_step_that_reaches_the_tokens_is_the_last(tmp_path: Path, extra: int, num_steps: int) -> None:
    await drive(settings(tmp_path / "long", num_steps=6, evaluation=NO_EVALUATION), World())
    tokens = counted(tmp_path / "long")
    config = settings(tmp_path / "short", num_steps=6, budget={"tokens": sum(tokens[:3]) + extra})
    assert await drive(config, World())
    rows = lines(config.run_dir, "metrics.jsonl")
    assert [row["tokens"] for row in rows] == [sum(tokens[: step + 1]) for step in range(num_steps)]
    after = lines(config.run_dir, "evaluations.jsonl")[-1]
    assert (after["when"], after["step"], after["tokens"]) == ("after", num_steps, rows[-1]["tokens"])


async def test_evaluations_do_not_count_toward_wall_s(tmp_path: Path, now: SimpleNamespace) -> None:
    config = settings(tmp_path, num_steps=9, budget={"wall_s": 10.0})
    assert await drive(config, Timed(now))
    assert [row["wall_s"] for row in lines(tmp_path, "metrics.jsonl")] == [3.0, 6.0, 9.0, 12.0]
    assert [row["time_s"]["total"] for row in lines(tmp_path, "metrics.jsonl")] == [3.0] * 4
    measured = [(line["step"], line["wall_s"]) for line in lines(tmp_path, "evaluations.jsonl")]
    assert measured == [(0, 0.0), (2, 6.0), (4, 12.0)]


async def test_seconds_count_over_restarts(tmp_path: Path, now: SimpleNamespace) -> None:
    assert await drive(settings(tmp_path, num_steps=2, evaluation=NO_EVALUATION), world := Timed(now))
    now.s += 1000  # nobody trains
    config = settings(tmp_path, num_steps=9, budget={"wall_s": 10.0}, evaluation=NO_EVALUATION)
    assert await drive(config, world)
    assert [row["wall_s"] for row in lines(tmp_path, "metrics.jsonl")] == [3.0, 6.0, 9.0, 12.0]


async def test_evaluations_follow_tokens_and_seconds(tmp_path: Path, now: SimpleNamespace) -> None:
    await drive(settings(tmp_path / "plain", num_steps=6, evaluation=NO_EVALUATION), World())
    every = sum(counted(tmp_path / "plain")[:2])
    evaluation = {"num_prompts": 2, "rollouts_per_prompt": 2}
    by_tokens = settings(tmp_path / "tokens", num_steps=6, evaluation=evaluation | {"every_tokens": every})
    await drive(by_tokens, World())
    totals = [row["tokens"] for row in lines(by_tokens.run_dir, "metrics.jsonl")]
    due = [step + 1 for step in range(5) if totals[step] // every > (totals[step - 1] // every if step else 0)]
    assert due[0] == 2
    measured = [(line["step"], line["tokens"]) for line in lines(by_tokens.run_dir, "evaluations.jsonl")]
    assert measured == [(0, 0), *((step, totals[step - 1]) for step in due), (6, totals[5])]

    by_seconds = settings(tmp_path / "seconds", num_steps=6, evaluation=evaluation | {"every_wall_s": 7.0})
    await drive(by_seconds, Timed(now))
    assert [line["step"] for line in lines(by_seconds.run_dir, "evaluations.jsonl")] == [0, 3, 5, 6]  # 9 s, 15 s


@pytest.mark.slow
@pytest.mark.parametrize("max_staleness", [0, 2])
async def test_a_crash_anywhere_keeps_limits_and_evaluations(tmp_path: Path, max_staleness: int) -> None:
    def config(name: str) -> Any:
        return settings(
            tmp_path / name,
            num_steps=9,
            max_staleness=max_staleness,
            budget={"tokens": 32},
            evaluation={"num_prompts": 2, "rollouts_per_prompt": 2, "every_tokens": 12},
        )

    def left(name: str) -> list[tuple[Any, ...]]:
        # What is sampled depends on the version that samples it, and so, with steps ahead, on how fast each side is.
        rows = lines(tmp_path / name, "metrics.jsonl")
        measured = [
            (line["when"], line["step"], line["tokens"]) for line in lines(tmp_path / name, "evaluations.jsonl")
        ]
        totals = counted(tmp_path / name)
        assert [row["tokens"] for row in rows] == [sum(totals[: step + 1]) for step in range(len(rows))]
        assert rows[-1]["tokens"] >= 32 > rows[-1]["tokens"] - totals[-1]
        at = [0, *(row["tokens"] for row in rows)]
        due = [step for step in range(1, len(rows)) if at[step] // 12 > at[step - 1] // 12]
        expected = [("before", 0), *(("step", step) for step in due), ("after", len(rows))]
        assert measured == [(when, step, at[step]) for when, step in expected]
        return measured

    undisturbed = slow_world(max_staleness, slowness=1)
    assert await drive(config("undisturbed"), undisturbed)
    reference = left("undisturbed")
    assert 3 < len(undisturbed.batches) < 9
    for crash_at in range(len(undisturbed.events)):
        world = slow_world(max_staleness, slowness=1)
        world.crash_at = crash_at
        name = str(crash_at)
        try:
            await drive(config(name), world)
        except Crash:
            world.crashed = False
            assert await drive(config(name), world)
        assert len(world.batches) == len(lines(tmp_path / name, "metrics.jsonl"))
        assert left(name) == reference or max_staleness


async def test_sampling_stops_while_the_clock_is_paused(tmp_path: Path) -> None:
    class SlowToSample(World):
        async def sample(self, run_id: str, *rest: Any) -> Any:
            async for group in super().sample(run_id, *rest):
                await asyncio.sleep(0.01 if run_id == "run" else 0.1)
                yield group

    world = SlowToSample()
    world.max_staleness = 2
    evaluation = {"num_prompts": 2, "rollouts_per_prompt": 2, "every_steps": 3}
    assert await drive(settings(tmp_path, num_steps=6, max_staleness=2, evaluation=evaluation), world)
    begun, done = world.events.index("sample run:evaluation 3"), world.events.index("evaluated step 3")
    assert set(world.events[begun + 1 : done]) == {"verify", "append evaluations.jsonl"}
    assert {"journal 3", "journal 4"} <= set(world.events[:begun])  # they were on their way, and in time that counts


async def test_steps_ahead_of_the_end_are_kept_for_a_higher_budget(
    tmp_path: Path,
) -> None:
    def config(tokens: int) -> Any:
        return settings(tmp_path, num_steps=9, max_staleness=2, budget={"tokens": tokens}, evaluation=NO_EVALUATION)

    world = slow_world(2)
    assert await drive(config(1), world)
    assert len(world.batches) == 1
    kept = sorted(path.name for path in (tmp_path / "journal").iterdir())
    assert kept == ["step-00000001", "step-00000002"]
    assert lines(tmp_path, "metrics.jsonl")[-1]["tokens"] == counted(tmp_path)[0]
    assert await drive(config(counted(tmp_path)[0] + 1), world)
    assert [event for event in world.events if event == "sample run 1"] == ["sample run 1"]
    assert len(world.batches) == 2
