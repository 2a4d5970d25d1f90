"""`poise compare`: two algorithms on a tiny Llama, stopped by Ctrl-C in the middle and gone on with."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from tests.e2e.conftest import tiny_settings
from tests.support.local_services import poise
from tests.support.tiny_models import make_tiny_llama

STALL_S = 600.0
BUDGET, NUM_EVALUATIONS, TOKENS_A_ROLLOUT, ROLLOUTS = 640, 1, 4, 32


class Comparison:
    """A comparison seen from outside."""

    def __init__(self, folder: Path) -> None:
        train = {
            "tasks": [{"kind": "digits"}],
            "prompts_per_step": ROLLOUTS // 2,
            "rollouts_per_prompt": 2,
            "sampling": {"max_tokens": TOKENS_A_ROLLOUT},
            "evaluation": {"num_prompts": 8, "rollouts_per_prompt": 2},
        }
        run = tiny_settings(make_tiny_llama(folder / "model")) | {"train": train}
        (folder / "run.yaml").write_text(yaml.safe_dump(run))
        self.file = folder / "compare.yaml"
        self.folder = folder / "trial"
        self.log = folder / "compare.log"
        values = {
            "name": "trial",
            "dir": str(self.folder),
            "base": "run.yaml",
            "budget": {"tokens": BUDGET},
            "num_evaluations": NUM_EVALUATIONS,
            "seeds": [3],
            "runs": {"rloo": {"algorithm": "rloo"}, "poise": {"algorithm": "poise"}},
        }
        self.file.write_text(yaml.safe_dump(values, sort_keys=False))

    def start(self) -> subprocess.Popen[str]:
        with self.log.open("a") as output:
            return poise("compare", "-c", str(self.file), stdout=output, stderr=output)

    def rows(self, name: str, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
        path = self.folder / "runs" / f"{name}-seed3" / file
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def pids(self, name: str) -> list[int]:
        path = self.folder / "runs" / f"{name}-seed3" / "services" / "pids.json"
        return [pid for pid, _ in json.loads(path.read_text()).values()]

    def tree(self) -> dict[str, Any]:
        tree: dict[str, Any] = json.loads((self.folder / "comparison.json").read_text())
        return tree

    def states(self) -> dict[str, str]:
        return {name: run["seeds"]["3"]["state"] for name, run in self.tree()["runs"].items()}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_comparison_stopped_in_the_middle_goes_on_to_the_same_end(tmp_path: Path) -> None:
    comparison = Comparison(tmp_path)
    process = comparison.start()
    try:
        deadline = time.monotonic() + STALL_S
        while len(comparison.rows("rloo")) < 2:
            assert process.poll() is None, comparison.log.read_text()
            assert time.monotonic() < deadline, comparison.log.read_text()
            time.sleep(0.05)
        pids = comparison.pids("rloo")
        process.send_signal(signal.SIGINT)
        assert process.wait(STALL_S) == 130, comparison.log.read_text()
    finally:
        process.kill()
    assert not any(psutil.pid_exists(pid) for pid in pids)
    stopped_at = len(comparison.rows("rloo"))
    assert comparison.states() == {"rloo": "unfinished", "poise": "not begun"}
    assert not comparison.tree()["is_complete"]

    again = comparison.start()
    try:
        assert again.wait(2 * STALL_S) == 0, comparison.log.read_text()
    finally:
        again.kill()
    said = comparison.log.read_text()
    assert f"run 1 of 2, rloo-seed3: resuming after step {stopped_at}" in said
    assert "Traceback" not in said
    assert comparison.states() == {"rloo": "finished", "poise": "finished"}
    for name in ("rloo", "poise"):
        rows = comparison.rows(name)
        assert [row["step"] for row in rows] == list(range(len(rows)))
        totals = [row["response_tokens"]["total"] for row in rows]
        assert [row["tokens"] for row in rows] == [sum(totals[: step + 1]) for step in range(len(rows))]
        assert rows[-1]["tokens"] >= BUDGET > rows[-1]["tokens"] - totals[-1]
        middle = next(row for row in rows if row["tokens"] >= BUDGET / 2)
        measured = [(line["when"], line["step"], line["tokens"]) for line in comparison.rows(name, "evaluations.jsonl")]
        assert measured == [
            ("before", 0, 0),
            ("step", middle["step"] + 1, middle["tokens"]),
            ("after", len(rows), rows[-1]["tokens"]),
        ]
        run = comparison.tree()["runs"][name]
        assert run["curves"]["tokens"]["x"] == [tokens for _, _, tokens in measured]
        assert run["time_s"]["total"]["mean"] == pytest.approx(rows[-1]["wall_s"], rel=0.05)
        folder = comparison.folder / "runs" / f"{name}-seed3"
        assert (folder / "model" / "config.json").exists()
        assert (folder / "report.html").exists()
        assert not (folder / "services" / "learner").exists()  # 1 MB here, terabytes elsewhere
    assert comparison.rows("poise")[-1]["baseline"]["source"] == "probe"
    assert "<svg" in (comparison.folder / "comparison.html").read_text()
