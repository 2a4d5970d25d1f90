"""A checkpoint becomes the very folder that the learner would export, and the state folder stays as it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.unit.learner.batches import make_batch

from poise.learner.config import LearnerConfig
from poise.learner.core import LearnerCore
from poise.learner.storage import checkpoint_export
from poise.learner.storage.checkpoint import CheckpointStore, Progress, StateError, read_checkpoint
from poise.learner.storage.checkpoint_export import export_checkpoint, newest_checkpoint
from poise.learner.storage.export_folder import MARK


def contents(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("changes", [{}, {"lora": {"rank": 4, "alpha": 8}}, {"dtype": "bfloat16"}])
def test_a_checkpoint_is_exported_as_the_learner_does_while_that_goes_on(config, tmp_path, changes):
    settings: LearnerConfig = config(**changes)
    core = LearnerCore(settings)
    core.recover()
    for step in range(2):
        core.submit(make_batch(step, version=step))
    core.checkpoint()
    before = contents(settings.state_dir)
    path, checkpoint = newest_checkpoint(settings.state_dir)
    assert (path.name, checkpoint.progress.policy_version) == ("checkpoint-00000002", 2)
    assert all(name.startswith("model.") for name in checkpoint.tensors)
    export_checkpoint(settings, path, checkpoint, tmp_path / "beside")
    assert contents(settings.state_dir) == before
    own = Path(core.export("own").path)
    core.close()
    expected, found = load_file(own / "model.safetensors"), load_file(tmp_path / "beside" / "model.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    names, beside = ({p.name for p in folder.rglob("*")} for folder in (own, tmp_path / "beside"))
    assert names - {MARK} == beside


@pytest.fixture
def state(tmp_path) -> Iterator[Path]:
    """A state folder with checkpoints of three batches, held by its learner."""
    store = CheckpointStore(tmp_path / "state", keep=3)
    store.open()
    for count in (1, 2, 3):
        store.save(Progress(count, count, count), {"model.a": torch.full((2,), float(count))}, set())
    yield tmp_path / "state"
    store.close()


def test_a_damaged_checkpoint_is_passed_over_and_left_where_it_is(state, caplog):
    (state / "checkpoint-00000003" / "tensors.safetensors").write_bytes(b"x")
    before = contents(state)
    path, checkpoint = newest_checkpoint(state)
    assert path.name == "checkpoint-00000002"
    assert checkpoint.tensors["model.a"].tolist() == [2, 2]
    assert "checkpoint-00000003 is damaged" in caplog.text
    assert contents(state) == before


def test_a_checkpoint_dropped_while_it_is_read_gives_way_to_the_newer_one(state, monkeypatch):
    def read(path: Path, prefix: str):
        if path.name == "checkpoint-00000003":  # the learner goes on
            path.rename(state / "checkpoint-00000004")
        return read_checkpoint(path, prefix)

    monkeypatch.setattr(checkpoint_export, "read_checkpoint", read)
    assert newest_checkpoint(state)[0].name == "checkpoint-00000004"


def test_one_checkpoint_may_be_named(state):
    path, checkpoint = newest_checkpoint(state / "checkpoint-00000001")
    assert (path.name, checkpoint.progress.policy_version) == ("checkpoint-00000001", 1)
    (path / "seen.safetensors").unlink()
    with pytest.raises(StateError, match=r"checkpoint-00000001 is damaged: .*; take another one"):
        newest_checkpoint(path)


def test_no_checkpoint_yet_is_told_from_none_that_can_be_read(state, tmp_path):
    with pytest.raises(StateError, match="elsewhere holds no checkpoint yet"):
        newest_checkpoint(tmp_path / "elsewhere")
    for path in state.glob("checkpoint-*"):
        (path / "state.json").unlink()
    with pytest.raises(StateError, match=r"none of the checkpoints in .*state can be read"):
        newest_checkpoint(state)


def test_a_checkpoint_of_other_settings_is_named(state, config, tmp_path):
    path, checkpoint = newest_checkpoint(state)
    with pytest.raises(StateError, match=r"checkpoint-00000003 holds other parameters .* lora"):
        export_checkpoint(config(), path, checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()
