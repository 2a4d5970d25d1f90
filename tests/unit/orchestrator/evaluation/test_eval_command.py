"""The files and the table of `poise eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from poise.orchestrator.evaluation.eval_command import describe, evaluation_folder
from poise.report.scores import score_table
from poise.runtime.config.settings import ConfigError


def test_an_interrupted_evaluation_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), evaluation_folder(tmp_path / "a" / "b") as folder:
        (folder / "generation.log").touch()
        raise KeyboardInterrupt
    assert not (tmp_path / "a" / "b").exists()


def test_an_interrupt_deletes_no_existing_files(tmp_path: Path) -> None:
    for path in (tmp_path / "new", tmp_path):
        with pytest.raises(KeyboardInterrupt), evaluation_folder(path) as folder:
            (folder / "evaluation.json").touch()
            raise KeyboardInterrupt
        assert (path / "evaluation.json").exists()
    (tmp_path / "evaluation.json").unlink()
    (tmp_path / "notes").touch()
    with pytest.raises(KeyboardInterrupt), evaluation_folder(tmp_path):
        raise KeyboardInterrupt
    assert (tmp_path / "notes").exists()


def test_a_failed_evaluation_leaves_its_log(tmp_path: Path) -> None:
    for name in ("with-log", "empty"):
        with pytest.raises(RuntimeError), evaluation_folder(tmp_path / name) as folder:
            if name == "with-log":
                (folder / "generation.log").touch()
            raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["with-log"]


def test_a_folder_with_an_evaluation_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").touch()
    with pytest.raises(ConfigError, match="already contains an evaluation"), evaluation_folder(tmp_path):
        pass


def test_the_table_has_scores_intervals_and_errors() -> None:
    evaluation: dict[str, Any] = {
        "model": "org/model",
        "policy_version": None,
        "num_prompts": 2,
        "rollouts_per_prompt": 2,
        "sampling": {"temperature": 0.6, "top_p": 1.0},
        "pass_threshold": 1.0,
        "seconds": 3.2,
        "verifier_errors": 0,
        "scores": score_table([[1.0, 0.5]] * 2, ["math"] * 2, ["gsm8k"] * 2, 1.0),
    }
    assert describe(evaluation) == [
        "org/model",
        "2 held-out prompts x 2 rollouts at temperature 0.6, top_p 1, in 3 s; a rollout passes with a reward of at "
        "least 1; 95 % intervals over prompts",
        "",
        "             prompts                avg@2               pass@1               pass@2",
        "overall            2  0.750 (0.750-0.750)  0.500 (0.500-0.500)  1.000 (1.000-1.000)",
        "task gsm8k         2  0.750 (0.750-0.750)  0.500 (0.500-0.500)  1.000 (1.000-1.000)",
        "domain math        2  0.750 (0.750-0.750)  0.500 (0.500-0.500)  1.000 (1.000-1.000)",
        "",
    ]
    said = describe(evaluation | {"policy_version": 7, "verifier_errors": 3})
    assert said[0] == "org/model, policy version 7"
    assert "the verifier failed on 3 rollouts; their reward is 0" in said
