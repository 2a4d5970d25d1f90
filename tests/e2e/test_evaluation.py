"""The same weights give the same greedy answers, however `poise eval` comes by them; other weights give others."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.support.local_services import COMMAND, services_up, write_run_file

NUM_STEPS, NUM_PROMPTS = 2, 48
PATIENCE_S = 400.0


def run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", COMMAND, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answers(path: Path) -> list[tuple[str, str, float, int]]:
    return [(line["prompt"], line["response"], line["reward"], line["num_tokens"]) for line in lines(path)]


def test_services_checkpoint_and_exported_model_answer_alike(tmp_path: Path) -> None:
    settings = {
        "model": "tiny",
        "engine": "torch",
        "learner": {
            "threads": 1,
            "checkpoint_every_steps": 1,
            "mini_batch_prompts": 8,
            "optimizer": {"learning_rate": 1e-3, "warmup_updates": 0},
        },
        "train": {
            "num_steps": NUM_STEPS,
            "prompts_per_step": 32,
            "tasks": [{"kind": "digits", "skills": ["fst", "mid"]}, {"kind": "digits", "domain": "hard"}],
            "sampling": {"max_tokens": 4},
            "evaluation": {"num_prompts": NUM_PROMPTS, "rollouts_per_prompt": 1, "temperature": 0},
        },
    }
    run_file = write_run_file(tmp_path, settings)
    measured: dict[str, dict[str, Any]] = {}

    def measure(name: str, *options: str) -> list[tuple[str, str, float, int]]:
        run("eval", "-c", str(run_file), "--out", str(tmp_path / name), *options)
        measured[name] = json.loads((tmp_path / name / "evaluation.json").read_text())
        return answers(tmp_path / name / "generations.jsonl")

    with services_up(run_file) as services:
        run("train", "-c", str(run_file))
        checkpoints = services.learner.state_dir
        deadline = time.monotonic() + PATIENCE_S
        while not (checkpoints / f"checkpoint-{NUM_STEPS:08d}").exists():  # written beside training
            assert time.monotonic() < deadline
            time.sleep(0.1)
        before = sorted(path.name for path in checkpoints.iterdir())
        served = measure("served")
        checkpoint = measure("checkpoint", "--checkpoint")  # which the learner holds
        assert sorted(path.name for path in checkpoints.iterdir()) == before
    model = measure("model", "--model", str(services.dir / "model"))
    earlier = measure("earlier", "--checkpoint", str(checkpoints / f"checkpoint-{NUM_STEPS - 1:08d}"))

    assert len(served) == NUM_PROMPTS
    assert served == checkpoint == model == answers(services.dir / "generations" / f"after-{NUM_STEPS:08d}.jsonl")
    untrained = answers(services.dir / "generations" / "before-00000000.jsonl")
    assert [prompt for prompt, *_ in untrained] == [prompt for prompt, *_ in served] == [p for p, *_ in earlier]
    assert untrained != served

    before_training, after_training = lines(services.dir / "evaluations.jsonl")
    for one in measured.values():
        assert one["sampling"] == after_training["sampling"] == before_training["sampling"]
    for name in ("served", "checkpoint", "model"):
        assert measured[name]["scores"] == after_training["scores"], name
    versions = {name: one["policy_version"] for name, one in measured.items()}
    assert versions == {"served": NUM_STEPS, "checkpoint": NUM_STEPS, "model": None, "earlier": NUM_STEPS - 1}
    table = after_training["scores"]
    rewards = [reward for *_, reward, _ in served]
    assert table["overall"]["avg@1"]["mean"] == pytest.approx(sum(rewards) / NUM_PROMPTS)
    assert {name: entry["num_prompts"] for name, entry in table["by_task"].items()} == {"digits-1": 24, "digits-2": 24}
    assert table["by_task"]["digits-2"] == table["by_domain"]["hard"]
    summary = json.loads((services.dir / "summary.json").read_text())
    assert summary["held_out"]["after"]["scores"] == table
    assert "task digits-2" in (services.dir / "report.html").read_text()


def test_options_say_how_much_is_sampled_and_json_is_all_that_is_printed(tmp_path: Path) -> None:
    settings = {"model": "tiny", "engine": "torch", "train": {"tasks": [{"kind": "digits"}]}}
    run_file = write_run_file(tmp_path, settings)
    options = ("--prompts", "10", "--rollouts", "3", "--temperature", "0.5", "--json")
    evaluation = json.loads(run("eval", "-c", str(run_file), "--model", "tiny", *options))
    (folder,) = (tmp_path / "run" / "evaluations").glob("tiny-*")
    assert evaluation == json.loads((folder / "evaluation.json").read_text())
    assert len(lines(folder / "generations.jsonl")) == 30
    assert evaluation["sampling"]["temperature"] == 0.5
    assert [name for name in evaluation["scores"]["overall"] if "@" in name] == ["avg@3", "pass@1", "pass@2"]
