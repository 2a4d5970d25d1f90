"""What a push must look like, and that nothing of it stays."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from poise.errors import BackendDown, InvalidRequest
from poise.generation import weights
from poise.generation.weights import (
    ExpectedTensor,
    StagedWeights,
    check_announcement,
    check_weights,
    policy_digest,
    remove_leftovers,
)

ARRAYS = {
    "model.b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "model.a": np.arange(5, dtype=np.float64),
    "scalar": np.array(3.0, np.float32),
    "half": np.arange(7, dtype=np.float16),
}
DATA = b"".join(array.tobytes() for array in ARRAYS.values())
TENSORS = [
    ExpectedTensor(name, array.dtype.name, array.shape, hashlib.sha256(array.tobytes()).digest())
    for name, array in ARRAYS.items()
]
ENDS = np.cumsum([array.nbytes for array in ARRAYS.values()]).tolist()


def send(staged: StagedWeights, data: bytes, chunk_bytes: int) -> None:
    for start in range(0, len(data), chunk_bytes):
        staged.write(start, data[start : start + chunk_bytes])


def changed(index: int, **changes: object) -> list[ExpectedTensor]:
    return [dataclasses.replace(t, **changes) if i == index else t for i, t in enumerate(TENSORS)]


@pytest.mark.parametrize("chunk_bytes", [1, 7, len(DATA)])
def test_staged_file_holds_the_tensors_sent(tmp_path: Path, chunk_bytes: int) -> None:
    with StagedWeights(TENSORS, tmp_path / "new" / "folder") as staged:
        send(staged, DATA, chunk_bytes)
        staged.finish(len(DATA))
        found = load_file(staged.path)
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    assert list((tmp_path / "new" / "folder").iterdir()) == []


@pytest.mark.parametrize("index", range(len(TENSORS)))
@pytest.mark.parametrize("chunk_bytes", [3, len(DATA)])
def test_damage_in_any_tensor_is_found(tmp_path: Path, index: int, chunk_bytes: int) -> None:
    last_byte = ENDS[index] - 1
    damaged = DATA[:last_byte] + bytes([DATA[last_byte] ^ 1]) + DATA[last_byte + 1 :]
    path = rf"begin\.tensors\[{index}\]\.sha256.*{TENSORS[index].name}"
    with StagedWeights(TENSORS, tmp_path) as staged, pytest.raises(InvalidRequest, match=path):
        send(staged, damaged, chunk_bytes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("offset", [0, 4, 9, 2**63])
def test_chunk_out_of_order_is_refused(tmp_path: Path, offset: int) -> None:
    with StagedWeights(TENSORS, tmp_path) as staged:
        staged.write(0, DATA[:8])
        with pytest.raises(InvalidRequest, match=rf"chunk\.offset: is {offset}; 8 bytes were received"):
            staged.write(offset, DATA[8:10])


def test_bytes_beyond_the_announced_are_refused(tmp_path: Path) -> None:
    with StagedWeights(TENSORS, tmp_path) as staged:
        staged.write(0, DATA[:-1])
        with pytest.raises(InvalidRequest, match=rf"chunk\.data: exceeds the {len(DATA)} bytes"):
            staged.write(len(DATA) - 1, DATA[-1:] + b"!")


@pytest.mark.parametrize(("num_sent", "total"), [(len(DATA) - 1, len(DATA)), (len(DATA), len(DATA) - 1), (0, 0)])
def test_commit_before_the_last_byte_is_refused(tmp_path: Path, num_sent: int, total: int) -> None:
    with StagedWeights(TENSORS, tmp_path) as staged:
        if num_sent:
            staged.write(0, DATA[:num_sent])
        with pytest.raises(InvalidRequest, match=r"commit\.total_bytes"):
            staged.finish(total)


def test_file_is_removed_when_the_push_fails(tmp_path: Path) -> None:
    with pytest.raises(KeyError), StagedWeights(TENSORS, tmp_path) as staged:
        staged.write(0, DATA)
        assert staged.path.parent == tmp_path
        raise KeyError
    assert list(tmp_path.iterdir()) == []


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """Fail writes beyond so many bytes, as a full disk does. Nothing else may write meanwhile."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize(("num_tensors", "num_elements"), [(1000, 1), (1, 300_000), (1, 25)])
def test_full_disk_is_named_and_leaves_nothing(tmp_path: Path, num_tensors: int, num_elements: int) -> None:
    """It is met at once, while writing, or by the last bytes that were still buffered."""
    digest = hashlib.sha256(bytes(4 * num_elements)).digest()
    tensors = [ExpectedTensor(f"name.{i}", "float32", (num_elements,), digest) for i in range(num_tensors)]
    size = 4 * num_elements * num_tensors
    with (
        pytest.raises(BackendDown, match=f"cannot be stored in {tmp_path}") as caught,
        files_of_at_most(100),
        StagedWeights(tensors, tmp_path) as staged,
    ):
        staged.write(0, bytes(size))
        staged.finish(size)
    assert str(size) in caught.value.remedy
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with (
        pytest.raises(BackendDown, match=f"cannot be stored in {tmp_path}/file"),
        StagedWeights(TENSORS, tmp_path / "file"),
    ):
        raise AssertionError


def test_leftovers_are_removed_of_killed_processes_alone(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        "from poise.generation.weights import ExpectedTensor, StagedWeights\n"
        f"with StagedWeights([ExpectedTensor('a', 'float32', (9,), b'')], Path({str(tmp_path)!r})) as staged:\n"
        "    staged.write(0, b'x' * 12)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    (tmp_path / "not-ours.safetensors").write_bytes(b"")
    # The same process id again, as in a container that was killed and started anew.
    ours = tmp_path / f"poise-weights-{os.getpid()}-x.safetensors"
    ours.write_bytes(b"")
    with StagedWeights(TENSORS, tmp_path) as staged:
        remove_leftovers(tmp_path)
        assert staged.path.exists()
        assert not left.exists()
        assert not ours.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["not-ours.safetensors"]


def test_leftovers_of_a_folder_that_is_not_there_are_none(tmp_path: Path) -> None:
    remove_leftovers(tmp_path / "nowhere")


def test_file_taken_for_a_leftover_before_it_is_locked_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = weights.fcntl.flock
    taken: list[Path] = []

    def steal_first(file: object, operation: int) -> None:
        if not taken:
            taken.extend(tmp_path.iterdir())
            taken[0].unlink()
        lock(file, operation)  # type: ignore[arg-type]

    monkeypatch.setattr(weights.fcntl, "flock", steal_first)
    with StagedWeights(TENSORS, tmp_path) as staged:
        assert staged.path.exists()
        assert staged.path != taken[0]


@pytest.mark.parametrize(
    ("tensors", "field"),
    [
        ([], "begin.tensors"),
        (changed(1, name=""), "begin.tensors[1].name"),
        (changed(1, name="../../etc/pass wd"), "begin.tensors[1].name"),
        (changed(1, name="x" * 513), "begin.tensors[1].name"),
        (changed(2, name="model.b"), "begin.tensors[2].name"),
        (changed(0, dtype="int32"), "begin.tensors[0].dtype"),
        (changed(0, dtype=""), "begin.tensors[0].dtype"),
        (changed(3, sha256=b"x" * 31), "begin.tensors[3].sha256"),
        (changed(3, shape=(2**20, 2**20)), "begin.tensors"),
    ],
)
def test_impossible_announcement_is_refused_by_field(tensors: list[ExpectedTensor], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_announcement(tensors, max_bytes=10_000)
    assert [violation.field for violation in caught.value.violations] == [field]


def test_announcement_may_fill_the_limit_and_not_exceed_it() -> None:
    check_announcement(TENSORS, max_bytes=len(DATA))
    with pytest.raises(InvalidRequest, match=f"hold {len(DATA)} bytes; max_update_bytes is {len(DATA) - 1}"):
        check_announcement(TENSORS, max_bytes=len(DATA) - 1)


def test_digest_is_over_the_names_in_order_whatever_the_order_sent() -> None:
    expected = hashlib.sha256(b"".join(t.sha256 for t in sorted(TENSORS, key=lambda t: t.name))).digest()
    assert policy_digest(TENSORS) == policy_digest(TENSORS[::-1]) == expected
    assert policy_digest(changed(0, sha256=b"x" * 32)) != expected


def test_misfits_are_named_missing_unknown_and_misshaped() -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_weights({"a": (1,), "b": (2, 3), "c": (4,)}, {"b": (3, 2), "c": (4,), "d": (1,)})
    text = caught.value.message
    assert "a is missing" in text
    assert "d is no parameter of this model" in text
    assert "b has shape [3, 2], the model's has [2, 3]" in text
    assert "c " not in text


def test_many_misfits_are_counted() -> None:
    with pytest.raises(InvalidRequest, match="and 7 more"):
        check_weights({f"p{i}": (1,) for i in range(12)}, {})


def test_fitting_weights_are_accepted() -> None:
    check_weights({"a": (1,)}, {"a": (1,)})
