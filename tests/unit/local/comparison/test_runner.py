"""The order of a comparison's runs, and the handling of failed, stopped and finished ones."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.unit.report.comparison.conftest import evaluation_row, step_row

from poise.local.comparison import runner
from poise.local.run_file import LocalRun
from poise.runtime.config.settings import ConfigError

STEPS = 2


class Maker:
    """Makes runs as `run_services` does, without a service."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.reloaded: LocalRun | None = None
        """The last run, read again."""
        self.outcomes: dict[str, int | type[BaseException]] = {}

    def __call__(self, run: LocalRun, reload: Callable[[], LocalRun], *, train: bool, training_log: Path) -> int:
        assert train
        self.reloaded = reload()
        assert training_log == run.dir / "logs" / "train.log"
        self.made.append(run.name)
        outcome = self.outcomes.get(run.name, 0)
        if isinstance(outcome, type):
            raise outcome("model: cannot be made")
        for name in ("learner", "value", "valkey"):
            (run.services_dir / name).mkdir(parents=True)
        num_steps = STEPS if outcome == 0 else 1
        rows = [step_row(step, 500, used=0.2, variance=0.1, zero_share=None) for step in range(num_steps)]
        rows = [row | {"reward": {"mean": 0.5}} for row in rows]
        (run.dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        lines = [evaluation_row("step", step, 500 * step, 0.1 * step) for step in range(num_steps + 1)]
        (run.dir / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        state = {"run_id": run.name, "next_step": num_steps, "tokens": 500 * num_steps, "is_reported": outcome == 0}
        (run.dir / "state.json").write_text(json.dumps(state))
        training_log.parent.mkdir(exist_ok=True)
        training_log.write_text("one\ntwo\nthree\nERROR four\n")
        return outcome


@pytest.fixture
def maker(monkeypatch: pytest.MonkeyPatch) -> Maker:
    maker = Maker()
    monkeypatch.setattr(runner, "run_services", maker)
    return maker


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "compare.yaml"
    write(path)
    return path


def write(path: Path, **changes: Any) -> None:
    values: dict[str, Any] = {
        "name": "trial",
        "dir": str(path.parent / "trial"),
        "base": "tiny",
        "budget": {"tokens": 1000},
        "seeds": [0],
        "runs": {"rloo": {"algorithm": "rloo"}, "poise": {"algorithm": "poise"}},
    }
    path.write_text(yaml.safe_dump(values | changes, sort_keys=False))


def compare(path: Path, *, report_only: bool = False, part: tuple[int, int] = (1, 1)) -> int:
    return runner.compare_runs(path, report_only=report_only, part=part)


def states(path: Path) -> dict[str, str]:
    tree = json.loads((path.parent / "trial" / "comparison.json").read_text())
    return {name: run["seeds"]["0"]["state"] for name, run in tree["runs"].items()}


def left(path: Path) -> list[str]:
    return sorted(
        str(one.relative_to(path.parent / "trial" / "runs")) for one in path.parent.glob("trial/runs/*/services/*/")
    )


def test_each_run_is_trained_once_and_its_state_removed(
    path: Path, maker: Maker, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(path) == 0
    assert maker.made == ["rloo-seed0", "poise-seed0"]
    assert states(path) == {"rloo": "finished", "poise": "finished"}
    assert left(path) == []
    said = capsys.readouterr().out
    assert "run 2 of 2, poise-seed0: starting" in said
    assert "run 2 of 2, poise-seed0: held-out reward 0.200 after 2 steps, 1000 tokens, 0m04s" in said
    assert "rloo   rloo       0.200" in said
    assert compare(path) == 0
    assert maker.made == ["rloo-seed0", "poise-seed0"]
    assert "run 1 of 2, rloo-seed0: already finished" in capsys.readouterr().out


def test_state_is_kept_on_request(path: Path, maker: Maker) -> None:
    write(path, keep_state=True)
    assert compare(path) == 0
    assert "rloo-seed0/services/learner" in left(path)


def test_failed_run_does_not_stop_others_and_is_retried(
    path: Path, maker: Maker, capsys: pytest.CaptureFixture[str]
) -> None:
    maker.outcomes["rloo-seed0"] = 1
    assert compare(path) == 1
    assert maker.made == ["rloo-seed0", "poise-seed0"]
    assert states(path) == {"rloo": "failed", "poise": "finished"}
    assert "rloo-seed0/services/learner" in left(path)
    said = capsys.readouterr().out
    assert "1 of 2 runs failed: rloo-seed0" in said
    logs = path.parent / "trial" / "runs" / "rloo-seed0" / "logs"
    assert f"failed with status 1; logs in {logs}\n  two\n  three\n  ERROR four\n" in said
    for folder in path.parent.glob("trial/runs/rloo-seed0/services/*/"):
        folder.rmdir()
    maker.outcomes.clear()
    assert compare(path) == 0
    assert maker.made[2:] == ["rloo-seed0"]
    assert states(path) == {"rloo": "finished", "poise": "finished"}
    assert "run 1 of 2, rloo-seed0: resuming after step 1" in capsys.readouterr().out


def test_problem_of_the_machine_fails_only_one_run(path: Path, maker: Maker, caplog: pytest.LogCaptureFixture) -> None:
    maker.outcomes["rloo-seed0"] = ConfigError
    assert compare(path) == 1
    assert states(path) == {"rloo": "failed", "poise": "finished"}
    assert "model: cannot be made" in caplog.text


def test_run_is_reloaded_after_its_ports_changed(path: Path, maker: Maker) -> None:
    assert compare(path, report_only=True) == 0
    changed = path.parent / "trial" / "runs" / "poise-seed0" / "services" / "ports.json"
    ports = json.loads(changed.read_text())
    maker.outcomes["rloo-seed0"] = 1
    changed.write_text(json.dumps(ports | {"generation.grpc": 1}))
    assert compare(path) == 1
    assert maker.reloaded is not None
    assert (maker.reloaded.name, maker.reloaded.generation.grpc.port) == ("poise-seed0", 1)


def test_interrupted_comparison_writes_a_report(path: Path, maker: Maker) -> None:
    maker.outcomes["rloo-seed0"] = 130
    assert compare(path) == 130
    assert maker.made == ["rloo-seed0"]
    assert states(path) == {"rloo": "unfinished", "poise": "not begun"}
    assert "rloo-seed0/services/learner" in left(path)


def test_interrupt_between_runs_is_not_a_failure(path: Path, maker: Maker) -> None:
    maker.outcomes["poise-seed0"] = KeyboardInterrupt
    assert compare(path) == 130
    maker.outcomes.clear()
    assert compare(path) == 0
    assert maker.made == ["rloo-seed0", "poise-seed0", "poise-seed0"]


def test_report_only_trains_nothing(path: Path, maker: Maker) -> None:
    assert compare(path, report_only=True) == 0
    assert maker.made == []
    assert states(path) == {"rloo": "not begun", "poise": "not begun"}


def test_changed_settings_of_a_started_run_are_rejected(path: Path, maker: Maker) -> None:
    assert compare(path) == 0
    write(path, budget={"tokens": 900})
    with pytest.raises(ConfigError, match=r"rloo-seed0: train\.budget\.tokens: 1000 -> 900"):
        compare(path)
    assert len(maker.made) == 2


def test_removed_runs_are_logged(path: Path, maker: Maker, caplog: pytest.LogCaptureFixture) -> None:
    assert compare(path) == 0
    write(path, runs={"poise": {"algorithm": "poise"}})
    assert compare(path) == 0
    assert "the report leaves out runs that are no longer in compare.yaml: rloo-seed0" in caplog.text
    assert states(path) == {"poise": "finished"}


def test_second_process_of_a_comparison_is_rejected(path: Path, maker: Maker) -> None:
    folder = path.parent / "trial"
    folder.mkdir()
    with (folder / "compare.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process is running the comparison"):
            compare(path)
    assert maker.made == []


def test_parts_train_all_runs_once(path: Path, maker: Maker) -> None:
    write(path, seeds=[0, 1])
    assert compare(path, part=(2, 2)) == 0
    assert maker.made == ["poise-seed0", "poise-seed1"]
    assert compare(path, part=(1, 2)) == 0
    assert maker.made[2:] == ["rloo-seed0", "rloo-seed1"]


def test_part_that_is_running_cannot_start_again(path: Path, maker: Maker) -> None:
    folder = path.parent / "trial"
    folder.mkdir()
    with (folder / "compare.lock").open("ab") as whole, (folder / "compare-1.lock").open("ab") as first:
        fcntl.flock(whole, fcntl.LOCK_SH)
        fcntl.flock(first, fcntl.LOCK_EX)
        for part in ((1, 2), (1, 1)):
            with pytest.raises(ConfigError, match="another process is running the comparison"):
                compare(path, part=part)
        assert compare(path, part=(2, 2)) == 0
    assert maker.made == ["poise-seed0"]
