"""Services of a random tiny Llama on the `torch` engine, shared by the tests that leave them usable."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.local_services import run_token, services_started, write_run_file
from tests.support.tiny_models import make_tiny_llama

from poise.local.run_file import LocalRun


@pytest.fixture(scope="session")
def tiny_services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalRun]:
    """Start services, once for all files that use them.

    `test_exact_step` needs a learner at version 0 and a probe without labels. No other file may train or publish before
    it, which the order of the file names ensures.
    """
    folder = tmp_path_factory.mktemp("services")
    model = make_tiny_llama(folder / "model")
    run_file = write_run_file(folder, tiny_settings(model))
    with services_started(run_file) as run:
        yield run


@pytest.fixture(scope="module")
def tiny_run(tiny_services: LocalRun) -> Iterator[LocalRun]:
    """Return the shared services, with their token for clients."""
    with run_token(tiny_services):
        yield tiny_services


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
