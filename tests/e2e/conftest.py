"""Services of a random tiny Llama on the `torch` engine, up for a module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.local_services import services_up, write_run_file
from tests.support.tiny_models import make_tiny_llama

from poise.local.run_file import LocalRun


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalRun]:
    folder = tmp_path_factory.mktemp("services")
    model = make_tiny_llama(folder / "model")
    run_file = write_run_file(folder, tiny_settings(model))
    with services_up(run_file) as run:
        yield run


def tiny_settings(model: Path) -> dict[str, object]:
    """Settings under which the probe is fitted after one step."""
    return {
        "model": str(model),
        "engine": "torch",
        "value": {
            "probe": {
                "inputs": ["prompt_hidden", "response_hidden", "entropy"],
                "warmup_steps": 1,
                "min_rows": 16,
                "prompt_components": 4,
                "response_components": 6,
                "rows_per_component": 1,
                "alpha": 2.0,
            }
        },
        "learner": {
            "threads": 1,
            "mini_batch_prompts": 8,
            "micro_batch_tokens": 96,
            "optimizer": {"learning_rate": 1e-3, "warmup_updates": 4, "weight_decay": 0.05, "gradient_clip": 0.5},
        },
        "train": {"num_steps": 1, "tasks": [{"kind": "digits"}]},
    }
