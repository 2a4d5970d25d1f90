"""Run folders with round numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from poise.report.comparison import ComparedRun, Comparison


def step_row(step: int, tokens: int, *, used: float, variance: float, zero_share: float | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "step": step,
        "tokens": tokens * (step + 1),
        "wall_s": 2.0 * (step + 1),
        "advantage_variance": {"used": 2 * used},
        "weighted_advantage_variance": {"used": used},
        "learner": {"gradient_variance": variance},
        "time_s": {"generate": 1.5, "train": 0.5, "total": 2.0},
    }
    return row if zero_share is None else row | {"zero_advantage_share": zero_share}


def evaluation_row(when: str, step: int, tokens: int, reward: float) -> dict[str, Any]:
    return {"when": when, "step": step, "tokens": tokens, "wall_s": 2.0 * step, "rewards": [[reward], [reward]]}


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., ComparedRun]:
    """Create a run of two steps with `tokens` response tokens each, and these held-out rewards at 0, 1 and 2 steps."""

    def make(
        name: str,
        seed: int,
        rewards: Sequence[float],
        *,
        tokens: int = 100,
        used: float = 0.2,
        variance: float = 0.0,
        zero_share: float | None = None,
        state: Any = "finished",
    ) -> ComparedRun:
        folder = tmp_path / f"{name}-seed{seed}"
        folder.mkdir()
        numbers = {"used": used, "variance": variance, "zero_share": zero_share}
        rows = [step_row(step, tokens, **numbers) for step in range(len(rewards) - 1)]  # type: ignore[arg-type]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        lines = [
            evaluation_row("before" if step == 0 else "step", step, tokens * step, reward)
            for step, reward in enumerate(rewards)
        ]
        (folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return ComparedRun(name, seed, name.split("-")[0], folder, state)

    return make


@pytest.fixture
def compare() -> Callable[..., Comparison]:
    """Compare runs, with the first as the reference."""

    def build(*runs: ComparedRun, levels: Sequence[float] = (), name: str = "trial") -> Comparison:
        return Comparison(name, {"tokens": 200}, runs[0].name, levels, runs)

    return build
