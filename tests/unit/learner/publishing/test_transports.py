from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from poise.errors import BackendDown
from poise.learner.config import PushConfig
from poise.learner.publishing.transports import SharedTransport, Transport, make_transport
from poise_client import WeightPush
from poise_client.types import WeightArray


def push(version: int, changed: int = 0) -> WeightPush:
    array = np.arange(100, dtype=np.uint16)
    array[:changed] += 1
    weights = {"a": WeightArray(array, "bfloat16"), "b": WeightArray(np.ones(3, np.float32), "float32")}
    return WeightPush.prepare("l", version, weights)


def test_the_setting_names_the_transport(tmp_path):
    assert isinstance(make_transport(PushConfig()), Transport)
    assert isinstance(make_transport(PushConfig(transport="shared", shared_dir=tmp_path)), SharedTransport)
    assert list(tmp_path.iterdir()) == []


def test_grpc_sends_a_push_unchanged():
    transport, whole = Transport(), push(1)
    assert transport.place(whole) is whole
    transport.remove(whole)
    transport.close()


def test_shared_weights_are_in_a_file_until_removed(tmp_path):
    transport = SharedTransport(tmp_path / "new")
    whole, changes = push(2, changed=5), push(2, changed=5).delta(push(1))
    placed, placed_changes = transport.place(whole), transport.place(changes)
    files = [Path(one.manifest.file) for one in (placed, placed_changes)]
    with safe_open(files[0], framework="numpy") as file:
        np.testing.assert_array_equal(file.get_tensor("b"), np.ones(3))
    assert files[1].read_bytes() == b"".join(changes.payload)
    assert all(file.is_relative_to(tmp_path / "new") for file in files)
    transport.remove(placed)
    assert [file.exists() for file in files] == [False, True]
    transport.close()
    assert list((tmp_path / "new").iterdir()) == []


def test_files_of_a_killed_learner_are_removed_by_the_next(tmp_path):
    script = (
        "import os, signal, numpy\nfrom pathlib import Path\n"
        "from poise.learner.publishing.transports import SharedTransport\n"
        "from poise_client import WeightPush\nfrom poise_client.types import WeightArray\n"
        "push = WeightPush.prepare('l', 1, {'a': WeightArray(numpy.ones(9), 'float64')})\n"
        f"SharedTransport(Path({str(tmp_path)!r})).place(push)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
    (left,) = tmp_path.rglob("*.safetensors")
    transport = SharedTransport(tmp_path)
    placed = transport.place(push(1))
    assert [str(path) for path in tmp_path.rglob("*.safetensors")] == [placed.manifest.file]
    transport.close()
    assert not left.exists()


def test_unwritable_shared_dir_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(BackendDown, match=rf"push\.shared_dir {tmp_path}/file cannot be written"):
        SharedTransport(tmp_path / "file").place(push(1))
