from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from poise.report.tensorboard import TensorBoardLog

Metrics = Callable[..., dict[str, Any]]


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return (step, value) of every tag, as TensorBoard itself reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]
    }


def test_numbers_become_scalars_named_by_their_path(tmp_path: Path, new_step_metrics: Metrics) -> None:
    log = TensorBoardLog(tmp_path / "tensorboard")
    for step in range(3):
        log.write(new_step_metrics(step, reward=step / 4))
    log.close()
    scalars = read(tmp_path / "tensorboard")
    assert scalars["reward/mean"] == [(0, 0.0), (1, 0.25), (2, 0.5)]
    assert scalars["reward/by_domain/sums"] == [(0, 0.0), (1, 0.25), (2, 0.5)]
    assert scalars["time_s/total"] == [(0, 2.0), (1, 2.0), (2, 2.0)]
    assert {"learner/staleness/1", "num_rejected/stale", "verifier_errors"} <= set(scalars)
    assert not {"step", "algorithm", "baseline/source"} & set(scalars)


def test_non_finite_numbers_are_left_out(tmp_path: Path) -> None:
    log = TensorBoardLog(tmp_path)
    log.write({"step": 4, "a": None, "b": float("nan"), "c": float("inf"), "d": [1.0], "e": "1", "f": 7})
    log.close()
    assert read(tmp_path) == {"f": [(4, 7.0)]}


def test_step_is_readable_as_soon_as_it_is_written(tmp_path: Path) -> None:
    log = TensorBoardLog(tmp_path)
    log.write({"step": 0, "reward": 0.5})
    scalars = read(tmp_path)
    log.close()
    assert scalars == {"reward": [(0, 0.5)]}


def test_resumed_run_adds_a_file_and_repeats_no_step(tmp_path: Path) -> None:
    first = TensorBoardLog(tmp_path)
    for step in range(4):
        first.write({"step": step, "reward": 0.0})
    first.close()
    second = TensorBoardLog(tmp_path)
    for step in (2, 3, 4):
        second.write({"step": step, "reward": 1.0})
    second.close()
    assert len(list(tmp_path.iterdir())) == 2
    assert read(tmp_path) == {"reward": [(0, 0.0), (1, 0.0), (2, 1.0), (3, 1.0), (4, 1.0)]}


def test_metrics_without_a_step_are_rejected(tmp_path: Path) -> None:
    log = TensorBoardLog(tmp_path)
    with pytest.raises(KeyError, match="step"):
        log.write({"reward": 1.0})
    log.close()


def test_closing_twice_is_fine(tmp_path: Path) -> None:
    log = TensorBoardLog(tmp_path)
    log.close()
    log.close()


def test_writing_does_not_import_tensorflow(tmp_path: Path) -> None:
    (tmp_path / "tensorflow.py").write_text("raise SystemExit('tensorflow was imported')")
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    script = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[1]); from poise.report import TensorBoardLog; "
        "log = TensorBoardLog(pathlib.Path(sys.argv[1]) / 'events'); log.write({'step': 0, 'a': 1}); log.close()"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
