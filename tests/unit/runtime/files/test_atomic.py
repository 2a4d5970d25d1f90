import os
import stat

import numpy as np
import pytest
import safetensors.numpy

from poise.runtime.files.atomic import commit_file, save_tensors, write_file


@pytest.fixture
def calls(monkeypatch):
    """Record the order of fsync and rename calls."""
    seen = []
    fsync, replace = os.fsync, os.rename

    def noted_fsync(descriptor):
        seen.append("sync folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "sync file")
        fsync(descriptor)

    def noted_replace(source, target):
        seen.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    return seen


def test_file_is_synced_before_and_folder_after_the_rename(tmp_path, calls):
    (tmp_path / "new").write_text("whole")
    (tmp_path / "old").write_text("former")
    commit_file(tmp_path / "new", tmp_path / "old")
    assert calls == ["sync file", "rename", "sync folder"]
    assert (tmp_path / "old").read_text() == "whole"
    assert not (tmp_path / "new").exists()


def test_write_leaves_no_temporary_file(tmp_path, calls):
    write_file(tmp_path / "state.json", b"1")
    write_file(tmp_path / "state.json", b"2")
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]
    assert (tmp_path / "state.json").read_bytes() == b"2"
    assert calls == ["sync file", "rename", "sync folder"] * 2


def test_failed_write_keeps_the_previous_file(tmp_path, monkeypatch):
    write_file(tmp_path / "state.json", b"former")

    def full(descriptor):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        write_file(tmp_path / "state.json", b"new")
    assert (tmp_path / "state.json").read_bytes() == b"former"


def test_saved_tensors_are_durable(tmp_path, calls):
    save_tensors(tmp_path / "t", {"a": np.arange(3)})
    assert safetensors.numpy.load_file(tmp_path / "t")["a"].tolist() == [0, 1, 2]
    assert calls[-1:] == ["sync file"]


def test_disk_error_of_safetensors_is_an_oserror(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        save_tensors(tmp_path / "nowhere" / "t", {"a": np.arange(3)})
    assert caught.value.filename == str(tmp_path / "nowhere" / "t")
