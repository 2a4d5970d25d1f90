"""Two ranks compute the gradients of one process, for every loss, before clipping."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tests.integration.learner import sharded_gradients
from tests.integration.learner.sharded_gradients import SETTINGS, gradients_of_all
from tests.support.architectures import make_architecture
from tests.support.forking import ForkedProgram
from tests.unit.learner.batches import make_config
from tests.unit.learner.gradients import LOSSES, GradientTrainer, assert_same_gradients

DEADLINE_S = 500.0


@pytest.mark.parametrize("name", ["tiny", "gemma2", "mamba"])
def test_two_processes_have_the_gradients_of_one_for_every_loss(name: str, model: Path, tmp_path: Path) -> None:
    if name != "tiny":  # one with the model's own head, one with unpacked sequences
        model = make_architecture(tmp_path / "model", name)
    log, arguments = tmp_path / "log", [str(model), str(tmp_path / "state"), str(tmp_path / "gradients.safetensors")]
    options = ["--standalone", "--nproc-per-node=2", "--run-path", "--start-method=fork"]
    torchrun = ForkedProgram(
        "torch.distributed.run", [*options, sharded_gradients.__file__, *arguments], os.environ, log
    )
    assert torchrun.wait(DEADLINE_S) == 0, log.read_text()[-3000:]
    together = load_file(tmp_path / "gradients.safetensors")

    alone = GradientTrainer(make_config(model, tmp_path / "alone", **SETTINGS))
    alone.load()
    alone.leave_the_reference()
    expected = gradients_of_all(alone)
    assert {name.partition("/")[0] for name in expected} == LOSSES.keys()
    assert_same_gradients(together, expected)
