"""The settings of a comparison's runs, before and after they have started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from poise.local.comparison.file import CompareFile
from poise.local.comparison.plan import Plan, make_plan, reject_changes
from poise.runtime.config.settings import ConfigError


def plan(folder: Path, **changes: Any) -> Plan:
    values: dict[str, Any] = {
        "name": "trial",
        "dir": folder / "trial",
        "base": "tiny",
        "budget": {"tokens": 1000},
        "seeds": [0, 7],
        "runs": {"rloo": {"algorithm": "rloo"}, "poise": {"algorithm": "poise"}},
    }
    return make_plan(CompareFile(**(values | changes)), folder / "compare.yaml")


def own(algorithm: str = "rloo", **settings: Any) -> dict[str, Any]:
    return {"runs": {"a": {"algorithm": algorithm, "set": settings}}}


def test_runs_are_ordered_seed_by_seed(tmp_path: Path) -> None:
    runs = plan(tmp_path).runs
    assert [run.label for run in runs] == ["rloo-seed0", "poise-seed0", "rloo-seed7", "poise-seed7"]
    assert [run.local.train.algorithm.kind for run in runs] == ["rloo", "poise", "rloo", "poise"]
    assert {run.local.train.seed for run in runs[2:]} == {run.local.learner.seed for run in runs[2:]} == {7}
    assert [run.local.dir for run in runs] == [tmp_path / "trial" / "runs" / run.label for run in runs]
    assert len({run.local.learner.state_dir for run in runs}) == len({run.local.socket for run in runs}) == 4


def test_run_may_have_its_own_seeds(tmp_path: Path) -> None:
    runs = plan(tmp_path, runs={"rloo": {"algorithm": "rloo"}, "poise": {"algorithm": "poise", "seeds": [7, 8]}}).runs
    assert [run.label for run in runs] == ["rloo-seed0", "rloo-seed7", "poise-seed7", "poise-seed8"]


def test_settings_of_all_runs_yield_to_those_of_one(tmp_path: Path) -> None:
    common = {"train.evaluation.num_prompts": 9, "train.prompts_per_step": 3, "learner.threads": 2}
    runs = {"a": {"algorithm": "rloo"}, "b": {"algorithm": "rloo", "set": {"train.prompts_per_step": 5}}}
    trains = [run.local.train for run in plan(tmp_path, set=common, runs=runs).runs[:2]]
    assert [train.evaluation.num_prompts for train in trains] == [9, 9]
    assert [train.prompts_per_step for train in trains] == [3, 5]


@pytest.mark.parametrize(
    ("budget", "limits", "every"),
    [
        ({"tokens": 1000}, (10**9, 1000, None), (0, 334, 0)),
        ({"wall_s": 60}, (10**9, None, 60), (0, 0, 20)),
        ({"updates": 10}, (10, None, None), (4, 0, 0)),
    ],
)
def test_budget_limits_runs_and_spaces_evaluations(
    tmp_path: Path, budget: dict[str, Any], limits: tuple[Any, ...], every: tuple[Any, ...]
) -> None:
    train = plan(tmp_path, budget=budget, num_evaluations=2).runs[0].local.train
    assert (train.limits.num_steps, train.limits.tokens, train.limits.wall_s) == limits
    evaluation = train.evaluation
    assert (evaluation.every_steps, evaluation.every_tokens, evaluation.every_wall_s) == every


def test_run_has_its_own_settings(tmp_path: Path) -> None:
    settings = {
        "train.rollouts_per_prompt": 8,
        "learner.optimizer.learning_rate": 1e-5,
        "train.sampling.stop": ["}", "a: b"],
    }
    local = plan(tmp_path, **own("grpo", **settings)).runs[0].local
    assert local.train.rollouts_per_prompt == 8
    assert local.learner.optimizer.learning_rate == 1e-5
    assert local.train.sampling.stop == ("}", "a: b")


def test_base_may_be_a_file_in_the_same_folder(tmp_path: Path) -> None:
    base = {"model": "org/model", "seed": 5, "run": {"name": "other"}, "train": {"tasks": [{"kind": "digits"}]}}
    base["train"] |= {"budget": {"wall_s": 5}}  # type: ignore[operator]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(base))
    run = plan(tmp_path, base="run.yaml").runs[0].local
    assert (run.model, run.name, run.train.seed, run.learner.seed) == ("org/model", "rloo-seed0", 0, 0)
    assert run.train.budget.wall_s is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": "huge"}, "base: 'huge' is neither a preset (smollm2, tiny) nor a file at"),
        (own("rlo"), "runs.a: "),
        (own(**{"train.rollouts": 8}), "rollouts: unknown; known: "),
        (own(**{"trian.num_steps": 8}), "trian: unknown; did you mean 'train'?"),
        (own(**{"train.num_steps": 8}), "runs.a: set: train.num_steps: cannot differ between runs: set `budget`"),
        (own(**{"train.budget.tokens": 8}), "set: train.budget.tokens: cannot differ"),
        (own(**{"train": {"num_steps": 8}}), "set: train: cannot differ"),
        (own(**{"seed": 8}), "set: seed: cannot differ"),
        (own(**{"train.evaluation.num_prompts": 8}), "all runs are evaluated alike"),
        ({"set": {"seed": 8}}, "yaml: set: seed: cannot be set here: set `seeds`"),
        ({"set": {"train.budget.tokens": 8}}, "yaml: set: train.budget.tokens: cannot be set here: set `budget`"),
        (own(**{"train.algorithm": "grpo"}), "set `algorithm` of the run"),
        (own(**{"learner.state_dir": "/var/x"}), "learner.state_dir: is set in the base"),
    ],
)
def test_problem_of_any_run_is_reported_first(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(tmp_path, **changes)
    assert message in str(caught.value)


def test_problems_of_all_runs_are_listed(tmp_path: Path) -> None:
    runs = {"a": {"algorithm": "rlo"}, "b": {"algorithm": "rloo", "set": {"seed": 1}}}
    with pytest.raises(ConfigError) as caught:
        plan(tmp_path, runs=runs)
    assert [line.split(": ")[1] for line in str(caught.value).splitlines()] == ["runs.a", "runs.b"]


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (
            {"train": {"evaluation": {"num_prompts": 0}}},
            "num_prompts: is 0 in the base, so there is nothing to compare",
        ),
        ({"value": {"queue": {"url": "redis://:secret@host:6379/0"}}}, "value.queue.url: is set in the base"),
        ({"train": {"run_id": "mine"}}, "train.run_id: unknown here; set `run.name`"),
        ({"train": {"tasks": [{"kind": "jsonl", "path": "absent.jsonl"}]}}, "absent.jsonl: is not readable"),
    ],
)
def test_base_with_shared_state_or_no_evaluation_is_rejected(
    tmp_path: Path, base: dict[str, Any], message: str
) -> None:
    train = {"tasks": [{"kind": "digits"}]} | base.pop("train", {})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"model": "org/model", "train": train} | base))
    with pytest.raises(ConfigError) as caught:
        plan(tmp_path, base="run.yaml")
    assert message in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("said_by_base", "own_settings", "found"),
    [({}, {}, 9), ({"weight_decay": 3}, {}, 3), ({}, {"learner.optimizer.weight_decay": 4}, 4)],
)
def test_base_and_run_override_common_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said_by_base: Any, own_settings: Any, found: float
) -> None:
    monkeypatch.setattr("poise.local.comparison.plan.COMMON_DEFAULTS", {"learner.optimizer.weight_decay": 9})
    base = {"model": "m", "learner": {"optimizer": said_by_base}, "train": {"tasks": [{"kind": "digits"}]}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(base))
    run = plan(tmp_path, base="run.yaml", **own(**own_settings)).runs[0]
    assert run.local.learner.optimizer.weight_decay == found


def begin(begun: Plan) -> None:
    for run in begun.runs:
        run.record.write_text(json.dumps({"settings": run.settings, "has_failed": False}))


def test_started_runs_keep_their_settings(tmp_path: Path) -> None:
    begin(plan(tmp_path))
    reject_changes(plan(tmp_path, levels=[0.5], reference="poise", keep_state=True))  # of the report and the folder
    with pytest.raises(ConfigError) as caught:
        reject_changes(plan(tmp_path, budget={"tokens": 2000}))
    assert "rloo-seed0: train.budget.tokens: 1000 -> 2000" in str(caught.value)
    assert "poise-seed7: train.budget.tokens: 1000 -> 2000" in str(caught.value)
    assert "Give this comparison another name or dir" in str(caught.value)


def test_runs_and_seeds_may_be_added(tmp_path: Path) -> None:
    begin(plan(tmp_path, seeds=[0], runs={"rloo": {"algorithm": "rloo"}}))
    reject_changes(plan(tmp_path))


def test_moved_folders_are_not_changes(tmp_path: Path) -> None:
    begin(plan(tmp_path))
    for ports in tmp_path.glob("trial/runs/*/services/ports.json"):
        ports.unlink()
    (tmp_path / "trial").rename(tmp_path / "moved")
    reject_changes(plan(tmp_path, dir=tmp_path / "moved"))
