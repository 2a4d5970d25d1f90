"""Two ranks compute the gradients of one process, for every loss, before clipping."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tests.integration.learner.sharded_gradients import SETTINGS, gradients_of_all
from tests.support.architectures import make_architecture
from tests.unit.learner.batches import make_config
from tests.unit.learner.gradients import LOSSES, GradientTrainer, assert_same_gradients

ROOT = Path(__file__).parents[3]
DEADLINE_S = 300.0


@pytest.mark.parametrize("name", ["tiny", "gemma2", "mamba"])
def test_two_processes_have_the_gradients_of_one_for_every_loss(name: str, model: Path, tmp_path: Path) -> None:
    if name != "tiny":  # one with the model's own head, one with unpacked sequences
        model = make_architecture(tmp_path / "model", name)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "tests.integration.learner.sharded_gradients", str(model), str(tmp_path / "state")]
    ran = subprocess.run(
        [*command, str(tmp_path / "gradients.safetensors")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        cwd=ROOT,
        timeout=DEADLINE_S,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    together = load_file(tmp_path / "gradients.safetensors")

    alone = GradientTrainer(make_config(model, tmp_path / "alone", **SETTINGS))
    alone.load()
    alone.leave_the_reference()
    expected = gradients_of_all(alone)
    assert {name.partition("/")[0] for name in expected} == LOSSES.keys()
    assert_same_gradients(together, expected)
