from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.unit.learner.batches import make_batch

from poise.errors import InvalidRequest
from poise.learner.config import LearnerConfig
from poise.learner.core import LearnerCore
from poise.learner.storage import export
from poise.learner.storage.checkpoint import CheckpointStore, Progress, StateError, read_checkpoint
from poise.learner.storage.export import export_checkpoint, newest_checkpoint, write_export
from poise.runtime.models.checkpoint_digest import EXPORT_MARK


def contents(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("changes", [{}, {"lora": {"rank": 4, "alpha": 8}}, {"dtype": "bfloat16"}])
def test_checkpoint_export_equals_the_learners_export(config, tmp_path, changes):
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
    assert names - {EXPORT_MARK} == beside


@pytest.fixture
def state(tmp_path) -> Iterator[Path]:
    """A state folder with three checkpoints, locked by its learner."""
    store = CheckpointStore(tmp_path / "state", keep=3)
    store.open()
    for count in (1, 2, 3):
        store.save(Progress(count, count, count), {"model.a": torch.full((2,), float(count))}, set())
    yield tmp_path / "state"
    store.close()


def test_damaged_checkpoint_is_skipped_and_not_changed(state, caplog):
    (state / "checkpoint-00000003" / "tensors.safetensors").write_bytes(b"x")
    before = contents(state)
    path, checkpoint = newest_checkpoint(state)
    assert path.name == "checkpoint-00000002"
    assert checkpoint.tensors["model.a"].tolist() == [2, 2]
    assert "checkpoint-00000003 is damaged" in caplog.text
    assert contents(state) == before


def test_checkpoint_deleted_while_read_yields_the_newer_one(state, monkeypatch):
    def read(path: Path, prefix: str):
        if path.name == "checkpoint-00000003":  # the learner continues
            path.rename(state / "checkpoint-00000004")
        return read_checkpoint(path, prefix)

    monkeypatch.setattr(export, "read_checkpoint", read)
    assert newest_checkpoint(state)[0].name == "checkpoint-00000004"


def test_one_checkpoint_may_be_named(state):
    path, checkpoint = newest_checkpoint(state / "checkpoint-00000001")
    assert (path.name, checkpoint.progress.policy_version) == ("checkpoint-00000001", 1)
    (path / "seen.safetensors").unlink()
    with pytest.raises(StateError, match=r"checkpoint-00000001 is damaged: .*Name another one"):
        newest_checkpoint(path)


def test_no_checkpoint_and_none_readable_are_different_errors(state, tmp_path):
    with pytest.raises(StateError, match="elsewhere has no checkpoint yet"):
        newest_checkpoint(tmp_path / "elsewhere")
    for path in state.glob("checkpoint-*"):
        (path / "state.json").unlink()
    with pytest.raises(StateError, match=r"none of the checkpoints in .*state can be read"):
        newest_checkpoint(state)


def test_checkpoint_of_other_settings_is_rejected(state, config, tmp_path):
    path, checkpoint = newest_checkpoint(state)
    with pytest.raises(StateError, match=r"checkpoint-00000003 has other parameters .* same model and lora"):
        export_checkpoint(config(), path, checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def save(content: str) -> Callable[[str], None]:
    def write(folder: str) -> None:
        Path(folder).mkdir()
        (Path(folder) / "model").write_text(content)

    return write


def test_export_has_its_version_and_is_replaced_by_the_next(tmp_path: Path) -> None:
    for version in (1, 2):
        path = write_export(tmp_path / "exports", "mine", version, save(f"weights {version}"))
        assert path == (tmp_path / "exports" / "mine").resolve()
        assert (path / "model").read_text() == f"weights {version}"
        assert json.loads((path / "poise_export.json").read_text()) == {"policy_version": version}
    assert [file.name for file in (tmp_path / "exports").iterdir()] == ["mine"]


def a_folder(place: Path) -> None:
    place.mkdir()
    (place / "journal").write_text("of the run")


def a_file(place: Path) -> None:
    place.write_text("of the run")


def a_link_to_nothing(place: Path) -> None:
    place.symlink_to("nowhere")


@pytest.mark.parametrize("make", [a_folder, a_file, a_link_to_nothing])
def test_only_exports_are_replaced(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "services")
    with pytest.raises(InvalidRequest, match=r"name: .*services already exists and is not an export.*another name"):
        write_export(tmp_path, "services", 1, save("weights"))
    if make is a_link_to_nothing:
        assert (tmp_path / "services").is_symlink()
    else:
        kept = [file.read_text() for file in tmp_path.rglob("*") if file.is_file()]
        assert kept == ["of the run"]
    assert [file.name for file in tmp_path.iterdir()] == ["services"]


def test_failed_export_keeps_the_earlier_one(tmp_path: Path) -> None:
    write_export(tmp_path, "mine", 1, save("weights 1"))

    def fail(folder: str) -> None:
        save("half")(folder)
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        write_export(tmp_path, "mine", 2, fail)
    assert (tmp_path / "mine" / "model").read_text() == "weights 1"
    write_export(tmp_path, "mine", 3, save("weights 3"))
    assert (tmp_path / "mine" / "model").read_text() == "weights 3"
