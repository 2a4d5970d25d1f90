"""Problems drawn by a run across restarts, changed step sizes and rejected prompts."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tests.unit.orchestrator.world import World, drive, settings

from poise.orchestrator.errors import SettingsError
from poise.orchestrator.tasks.mixture import Mixture

NUM_ROWS = 90


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip fsync: tests crash the process, not the machine."""
    monkeypatch.setattr("os.fsync", lambda _: None)


@pytest.fixture
def tasks(tmp_path: Path) -> list[dict[str, Any]]:
    """Return a task of 90 problems to train on, and some that are held out."""
    path, held_out = tmp_path / "own.jsonl", tmp_path / "eval.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"q{i}", "answer": "1"}) + "\n" for i in range(NUM_ROWS)))
    held_out.write_text("".join(json.dumps({"prompt": f"e{i}", "answer": "1"}) + "\n" for i in range(4)))
    return [{"kind": "jsonl", "path": path, "eval_path": held_out}]


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_bytes().splitlines()]


def drawn(world: World) -> list[Any]:
    """Return the prompts of training, in the order of steps."""
    return [prompt.content for call in world.asked if call[0] == "run" for prompt in call[2]]


NO_EVALUATION = {"num_prompts": 0}
DAPO = {"kind": "dapo", "max_draws": 3}


@pytest.mark.parametrize("algorithm", ["poise", DAPO, "spo"])
@pytest.mark.parametrize("max_staleness", [0, 2])
@pytest.mark.parametrize("sizes", [(8, 16, 4), (16, 8, 8), (3, 29, 1)])
async def test_step_sizes_may_change_within_an_epoch(
    tmp_path: Path, tasks: list[dict[str, Any]], algorithm: Any, max_staleness: int, sizes: tuple[int, ...]
) -> None:
    world = World()
    world.max_staleness = max_staleness
    options = {"tasks": tasks, "evaluation": NO_EVALUATION, "algorithm": algorithm, "max_staleness": max_staleness}
    for index, size in enumerate(sizes):
        config = settings(tmp_path / "run", num_steps=2 * (index + 1), prompts_per_step=size, **options)
        assert await drive(config, world)

    found = drawn(world)

    for start in range(0, len(found), NUM_ROWS):
        epoch = found[start : start + NUM_ROWS]
        assert len(set(epoch)) == len(epoch)


async def test_weighted_tasks_keep_positions_when_sizes_change(tmp_path: Path, tasks: list[dict[str, Any]]) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"prompt": f"o{i}", "answer": "1"}) + "\n" for i in range(60)))
    mixed = [*tasks, tasks[0] | {"path": other, "weight": 0.5}, {"kind": "digits"}]
    world = World()
    for index, size in enumerate((8, 16, 5, 40)):
        options = {"tasks": mixed, "evaluation": NO_EVALUATION, "num_steps": 2 * (index + 1)}
        await drive(settings(tmp_path / "run", prompts_per_step=size, **options), world)

    found = drawn(world)

    for first, size in (("q", NUM_ROWS), ("o", 60)):
        of_task = [prompt for prompt in found if prompt.startswith(first)]
        assert len(of_task) > 10
        assert len(set(of_task[:size])) == len(of_task[:size])


@pytest.mark.parametrize("has_positions", [False, True])
async def test_a_folder_of_an_older_release_resumes(
    tmp_path: Path, tasks: list[dict[str, Any]], has_positions: bool
) -> None:
    options = {"tasks": tasks, "evaluation": NO_EVALUATION, "algorithm": DAPO, "rollouts_per_prompt": 2}
    world = World()
    await drive(settings(tmp_path / "run", num_steps=4, prompts_per_step=4, **options), world)
    states = lines(tmp_path / "run", "step_states.jsonl")
    assert any(state["num_draws"] > 1 for state in states)
    for state in states:
        num_drawn = state.pop("num_drawn")
        if has_positions:
            state["given"] = num_drawn
    (tmp_path / "run" / "step_states.jsonl").unlink()
    (tmp_path / "run" / "memory.jsonl").write_text("".join(json.dumps(state) + "\n" for state in states))

    await drive(settings(tmp_path / "run", num_steps=6, prompts_per_step=9, **options), world)

    found = drawn(world)[:NUM_ROWS]
    assert len(set(found)) == len(found) > 40


async def test_a_rejected_prompt_is_replaced(
    tmp_path: Path, tasks: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    world, options = World(), {"tasks": tasks, "evaluation": NO_EVALUATION, "prompts_per_step": 8}
    world.rejected = {f"q{i}" for i in range(0, NUM_ROWS, 4)}
    config = settings(tmp_path / "run", num_steps=6, **options)
    with caplog.at_level(logging.WARNING):
        assert await drive(config, world)

    metrics = lines(tmp_path / "run", "metrics.jsonl")
    assert [line["num_groups"] for line in metrics] == [8] * 6  # others came in their place
    asked = drawn(world)
    assert len(set(asked)) == len(asked)
    num_rejected = sum(line["num_rejected_prompts"] for line in metrics)
    assert num_rejected == len([prompt for prompt in asked if prompt in world.rejected]) > 0
    line = Mixture(config.tasks, 0).files[0].problems[0].file
    assert f"{line}:1: skipped because generation rejects the prompt: text: is too long" in caplog.text
    names = [(call[1], prompt.group_id) for call in world.asked for prompt in call[2]]
    assert len(set(names)) == len(names)


async def test_rejected_prompts_and_restarts_keep_the_order(tmp_path: Path, tasks: list[dict[str, Any]]) -> None:
    rejected = {f"q{i}" for i in range(0, NUM_ROWS, 5)}
    options = {"tasks": tasks, "evaluation": NO_EVALUATION, "prompts_per_step": 8}
    whole, parts = World(), World()
    whole.rejected = parts.rejected = rejected
    await drive(settings(tmp_path / "whole", num_steps=8, **options), whole)
    for num_steps in (3, 4, 8):
        await drive(settings(tmp_path / "parts", num_steps=num_steps, **options), parts)
    assert drawn(parts) == drawn(whole)
    assert max(Counter(drawn(whole)[:NUM_ROWS]).values()) == 1


async def test_a_run_without_valid_prompts_fails(tmp_path: Path, tasks: list[dict[str, Any]]) -> None:
    world = World()
    world.rejected = {f"q{i}" for i in range(NUM_ROWS)}
    with pytest.raises(
        SettingsError, match=r"step 0: generation rejects all 18 prompts.*own\.jsonl:\d+: text: is too long"
    ):
        await drive(settings(tmp_path / "run", tasks=tasks, evaluation=NO_EVALUATION), world)


async def test_rejected_held_out_prompts_are_counted(tmp_path: Path, tasks: list[dict[str, Any]]) -> None:
    world = World()
    world.rejected = {"e1", "e3"}
    evaluation = {"num_prompts": 4, "rollouts_per_prompt": 2}
    await drive(settings(tmp_path / "run", num_steps=1, tasks=tasks, evaluation=evaluation), world)
    before, after = lines(tmp_path / "run", "evaluations.jsonl")
    for line in (before, after):
        assert (line["num_prompts"], line["num_rejected_prompts"], len(line["rewards"])) == (2, 2, 2)
    prompts = {line["prompt"] for line in lines(tmp_path / "run", before["generations"])}
    assert prompts == {"e0", "e2"}


async def test_an_evaluation_without_valid_prompts_fails(tmp_path: Path, tasks: list[dict[str, Any]]) -> None:
    world = World()
    world.rejected = {f"e{i}" for i in range(4)}
    with pytest.raises(
        SettingsError, match=r"rejects all 4 held-out prompts. The last one, from .*eval\.jsonl:\d: text: is too"
    ):
        await drive(settings(tmp_path / "run", tasks=tasks, evaluation={"num_prompts": 4}), world)
