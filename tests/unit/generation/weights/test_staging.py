"""Receiving pushes whole, as deltas and in files, and removing every file but the base of the next delta."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
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

from poise.errors import BackendDown, InvalidRequest, VersionMismatch
from poise.generation.served_policy import ServedPolicy
from poise.generation.weights import staging as module
from poise.generation.weights.manifest import Manifest, ProcessGroup, TensorSpec
from poise.generation.weights.staging import StagedPush, Staging
from poise.runtime.network.broadcast_group import Rendezvous
from poise_client import combine_digests
from poise_client.codec import make_delta

ARRAYS = {
    "model.b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "model.a": np.arange(5, dtype=np.float64),
    "scalar": np.array(3.0, np.float32),
    "half": np.arange(7, dtype=np.float16),
}
DATA = b"".join(array.tobytes() for array in ARRAYS.values())
TENSORS = [
    TensorSpec(name, array.dtype.name, array.shape, hashlib.sha256(array.tobytes()).digest())
    for name, array in ARRAYS.items()
]
ENDS = np.cumsum([array.nbytes for array in ARRAYS.values()]).tolist()


def manifest_of(tensors: list[TensorSpec] = TENSORS, version: int = 1, **more: object) -> Manifest:
    digest = combine_digests({tensor.name: tensor.sha256 for tensor in tensors})
    return Manifest(
        **{"lineage_id": "lineage", "policy_version": version, "tensors": tuple(tensors), "digest": digest}
        | {"keep_as_base": True}
        | more
    )


@contextmanager
def staging_in(folder: Path, *, keep_base: bool = True, shared_dirs: tuple[Path, ...] = ()) -> Iterator[Staging]:
    """Yield a staging area, then close it and check that it left nothing."""
    staging = Staging(folder, keep_base=keep_base, shared_dirs=shared_dirs)
    try:
        yield staging
    finally:
        staging.close()
        staging.close()
        assert not folder.is_dir() or list(folder.glob("poise-weights-*")) == []


@contextmanager
def push_in(folder: Path, manifest: Manifest) -> Iterator[StagedPush]:
    with staging_in(folder) as staging:
        with staging.open(manifest) as push:
            yield push
        assert list(folder.rglob("*.safetensors")) == []


def send(push: StagedPush, data: bytes, chunk_bytes: int) -> None:
    for start in range(0, len(data), chunk_bytes):
        push.write(start, data[start : start + chunk_bytes])


@pytest.mark.parametrize("chunk_bytes", [1, 7, len(DATA)])
def test_file_holds_the_tensors_sent(tmp_path: Path, chunk_bytes: int) -> None:
    with push_in(tmp_path / "new" / "folder", manifest_of()) as push:
        send(push, DATA, chunk_bytes)
        push.finish(len(DATA))
        found = load_file(push.path)
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("index", range(len(TENSORS)))
@pytest.mark.parametrize("chunk_bytes", [3, len(DATA)])
def test_damage_in_any_tensor_is_found(tmp_path: Path, index: int, chunk_bytes: int) -> None:
    last_byte = ENDS[index] - 1
    damaged = DATA[:last_byte] + bytes([DATA[last_byte] ^ 1]) + DATA[last_byte + 1 :]
    path = rf"manifest\.tensors\[{index}\]\.sha256.*{TENSORS[index].name}"
    with push_in(tmp_path, manifest_of()) as push, pytest.raises(InvalidRequest, match=path):
        send(push, damaged, chunk_bytes)


@pytest.mark.parametrize("offset", [0, 4, 9, 2**63])
def test_chunk_out_of_order_is_rejected(tmp_path: Path, offset: int) -> None:
    with push_in(tmp_path, manifest_of()) as push:
        push.write(0, DATA[:8])
        with pytest.raises(InvalidRequest, match=rf"chunk\.offset: is {offset}; required: 8,"):
            push.write(offset, DATA[8:10])


def test_bytes_beyond_the_manifest_are_rejected(tmp_path: Path) -> None:
    with push_in(tmp_path, manifest_of()) as push:
        push.write(0, DATA[:-1])
        with pytest.raises(InvalidRequest, match=rf"chunk\.data: exceeds the {len(DATA)} bytes"):
            push.write(len(DATA) - 1, DATA[-1:] + b"!")


@pytest.mark.parametrize(("num_sent", "total"), [(len(DATA) - 1, len(DATA)), (len(DATA), len(DATA) - 1), (0, 0)])
def test_commit_before_the_last_byte_is_rejected(tmp_path: Path, num_sent: int, total: int) -> None:
    with push_in(tmp_path, manifest_of()) as push:
        if num_sent:
            push.write(0, DATA[:num_sent])
        with pytest.raises(InvalidRequest, match=r"commit\.total_bytes"):
            push.finish(total)


def test_file_is_removed_when_the_push_fails(tmp_path: Path) -> None:
    with pytest.raises(KeyError), push_in(tmp_path, manifest_of()) as push:
        push.write(0, DATA)
        assert push.path.is_relative_to(tmp_path)
        raise KeyError


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """Fail writes to files beyond this size, like a full disk."""
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
    """The disk is full at once, while writing, or only for the last buffered bytes."""
    digest = hashlib.sha256(bytes(4 * num_elements)).digest()
    tensors = [TensorSpec(f"name.{i}", "float32", (num_elements,), digest) for i in range(num_tensors)]
    size = 4 * num_elements * num_tensors
    with (
        pytest.raises(BackendDown, match=f"cannot be stored in {tmp_path}") as caught,
        files_of_at_most(100),
        push_in(tmp_path, manifest_of(tensors)) as push,
    ):
        push.write(0, bytes(size))
        push.finish(size)
    assert str(size) in caught.value.remedy


@pytest.mark.parametrize("in_file", [False, True])
def test_push_that_cannot_fit_is_rejected_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_file: bool
) -> None:
    usage = module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=len(DATA) - 1))
    monkeypatch.setattr(module.os, "link", _across_disks)
    folder = tmp_path / "staging"
    rejected = pytest.raises(BackendDown, match=f"stored in {folder}: it needs {len(DATA)} bytes, and {len(DATA) - 1} ")
    with staging_in(folder, shared_dirs=(tmp_path / "shared",)) as staging:
        if in_file:
            with staging.open(manifest_of(file=shared(tmp_path / "shared"))) as push, rejected as caught:
                push.read_file()
        else:
            with rejected as caught, staging.open(manifest_of()):
                raise AssertionError
        assert "staging_dir" in caught.value.remedy
        assert list(folder.rglob("*.safetensors")) == []


def _across_disks(*_: object) -> None:
    raise OSError(errno.EXDEV, "across disks")


def test_push_goes_to_the_folder_that_has_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, temporary = tmp_path / "memory", tmp_path / "temporary"
    monkeypatch.setattr(module, "staging_folders", lambda _: [memory, temporary])
    monkeypatch.setattr(module, "choose_folder", lambda folders, num_bytes: folders[num_bytes > len(DATA)])
    for folder in (memory, temporary):
        folder.mkdir()
        (folder / "poise-weights-left").mkdir()
    staging = Staging(None, keep_base=True, shared_dirs=())
    staging.remove_leftovers()
    assert list(memory.iterdir()) == list(temporary.iterdir()) == []
    more = [*TENSORS, dataclasses.replace(TENSORS[0], name="more")]
    for tensors, data, folder in ((TENSORS, DATA, memory), (more, DATA + DATA[: ENDS[0]], temporary)):
        with staging.open(manifest_of(tensors)) as push:
            send(push, data, len(data))
            push.finish(len(data))
            assert push.path.is_relative_to(folder)
    staging.close()
    assert list(memory.iterdir()) == list(temporary.iterdir()) == []


def test_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with (
        pytest.raises(BackendDown, match=f"cannot be stored in {tmp_path}/file"),
        push_in(tmp_path / "file", manifest_of()),
    ):
        raise AssertionError


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    script = (
        "import os, signal\nfrom pathlib import Path\n"
        "from poise.generation.weights.staging import Staging\n"
        "from poise.generation.weights.manifest import Manifest, TensorSpec\n"
        f"staging = Staging(Path({str(tmp_path)!r}), keep_base=True, shared_dirs=())\n"
        "tensors = (TensorSpec('a', 'float32', (9,), b''),)\n"
        "with staging.open(Manifest('lineage', 1, tensors, b'')) as push:\n"
        "    push.write(0, b'x' * 12)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    with staging_in(tmp_path) as staging:
        staging.remove_leftovers()
        assert list(tmp_path.iterdir()) == []


def serve(staging: Staging, manifest: Manifest, body: bytes = DATA) -> dict[str, np.ndarray]:
    """Receive a push like the service. Return the parameters that the engine would get."""
    with staging.open(manifest) as push:
        if push.comes_in_chunks:
            send(push, body, 5)
        else:
            push.read_file()
        push.finish(manifest.payload_bytes)
        found = load_file(push.path)
        staging.applied(push)
    return found


def new_arrays() -> dict[str, np.ndarray]:
    """Return `ARRAYS` with changes in the matrix, the scalar and the last array."""
    new = {name: array.copy() for name, array in ARRAYS.items()}
    new["model.b"][1, 1] = -0.5
    new["scalar"][...] = 4
    new["half"][[0, 6]] = 1
    return new


def delta(new: dict[str, np.ndarray], version: int = 2, **more: object) -> tuple[Manifest, bytes]:
    tensors, body = [], b""
    for (name, array), base in zip(new.items(), ARRAYS.values(), strict=True):
        num_changed, block = make_delta(base.tobytes(), array.tobytes(), array.itemsize)
        digest = hashlib.sha256(array.tobytes()).digest()
        tensors.append(TensorSpec(name, array.dtype.name, array.shape, digest, num_changed, len(block)))
        body += block
    return manifest_of(tensors, version, **{"base": manifest_of().policy} | more), body


@pytest.mark.parametrize("in_file", [False, True])
def test_delta_gives_the_new_version_and_the_next_base(tmp_path: Path, in_file: bool) -> None:
    with staging_in(tmp_path / "staging", shared_dirs=(tmp_path,)) as staging:
        serve(staging, manifest_of())
        manifest, body = delta(new_arrays())
        if in_file:
            (tmp_path / "body").write_bytes(body)
            manifest = dataclasses.replace(manifest, file=str(tmp_path / "body"))
        found = serve(staging, manifest, body)
        for name, array in new_arrays().items():
            np.testing.assert_array_equal(found[name], array)
        assert staging.base is not None
        assert staging.base.manifest.policy == manifest.policy
        assert list((tmp_path / "staging").rglob("*.safetensors")) == [staging.base.path]
        np.testing.assert_array_equal(load_file(staging.base.path)["half"], new_arrays()["half"])


def test_delta_without_changes_needs_no_payload(tmp_path: Path) -> None:
    with staging_in(tmp_path) as staging:
        serve(staging, manifest_of())
        manifest, body = delta(ARRAYS)
        assert body == b""
        found = serve(staging, manifest, body)
        np.testing.assert_array_equal(found["model.a"], ARRAYS["model.a"])


def test_delta_without_its_base_is_rejected_at_once(tmp_path: Path) -> None:
    manifest, body = delta(new_arrays())
    with staging_in(tmp_path) as staging:
        with pytest.raises(VersionMismatch, match="delta against version 1, but no version is kept"):
            staging.open(manifest)
        serve(staging, manifest_of())
        for other in (ServedPolicy("lineage", 1, b"x" * 32), ServedPolicy("other", 1, manifest_of().policy.digest)):
            with pytest.raises(VersionMismatch, match="version 1 is kept"):
                staging.open(dataclasses.replace(manifest, base=other))
        serve(staging, manifest, body)
        with pytest.raises(VersionMismatch, match="version 2 is kept") as caught:
            staging.open(manifest)
        assert caught.value.remedy


def test_delta_with_other_tensors_is_rejected(tmp_path: Path) -> None:
    with staging_in(tmp_path) as staging:
        serve(staging, manifest_of())
        manifest, _ = delta(new_arrays())
        swapped = (manifest.tensors[1], manifest.tensors[0], *manifest.tensors[2:])
        for tensors in (swapped, manifest.tensors[:-1]):
            with pytest.raises(InvalidRequest, match=r"manifest\.tensors: differ .* from those of the base"):
                staging.open(dataclasses.replace(manifest, tensors=tensors))


@pytest.mark.parametrize("how", ["flipped", "another's", "too few"])
def test_damaged_delta_is_rejected_and_the_base_stays(tmp_path: Path, how: str) -> None:
    with staging_in(tmp_path) as staging:
        serve(staging, manifest_of())
        manifest, body = delta(new_arrays())
        wrong, sent = manifest, body
        match how:
            case "flipped":
                sent = bytes([*body[:4], body[4] ^ 8, *body[5:]])
            case "another's":
                other = dataclasses.replace(manifest.tensors[0], sha256=b"x" * 32)
                wrong = dataclasses.replace(manifest, tensors=(other, *manifest.tensors[1:]))
            case _:
                sent = body[:-1]
        with pytest.raises(InvalidRequest), staging.open(wrong) as push:
            send(push, sent, len(sent))
            push.finish(len(body))
        assert list(tmp_path.rglob("*.safetensors")) == [staging.base.path]  # type: ignore[union-attr]
        found = serve(staging, manifest, body)
        np.testing.assert_array_equal(found["model.b"], new_arrays()["model.b"])


@pytest.mark.parametrize("why", ["not wanted", "not allowed", "no room"])
def test_base_is_kept_only_if_requested_and_possible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    if why == "no room":
        usage = module.shutil.disk_usage(tmp_path)
        free = iter([len(DATA), len(DATA) - 1])  # before the push, and after it
        monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=next(free)))
    with staging_in(tmp_path, keep_base=why != "not allowed") as staging:
        serve(staging, manifest_of(keep_as_base=why != "not wanted"))
        assert staging.base is None
        assert list(tmp_path.rglob("*.safetensors")) == []


def test_whole_parameters_replace_the_base_before_they_come(tmp_path: Path) -> None:
    with staging_in(tmp_path) as staging:
        serve(staging, manifest_of())
        with staging.open(manifest_of(version=2)) as push:
            assert list(tmp_path.rglob("*.safetensors")) == [push.path]


def shared(folder: Path, name: str = "shared.safetensors") -> str:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_bytes(manifest_of().header + DATA)
    return str(path)


@pytest.mark.parametrize("linked", [True, False])
def test_shared_file_is_read_without_changing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, linked: bool) -> None:
    if not linked:

        def another_disk(*_: object) -> None:
            raise OSError(module.errno.EXDEV, "another disk")

        monkeypatch.setattr(module.os, "link", another_disk)
    file = shared(tmp_path / "shared")
    before = Path(file).read_bytes()
    with staging_in(tmp_path / "staging", shared_dirs=(tmp_path / "shared",)) as staging:
        found = serve(staging, manifest_of(file=file))
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(found[name], array)
        assert staging.base is not None
        assert staging.base.path.samefile(file) is linked
        assert Path(file).read_bytes() == before
        Path(file).unlink()  # its owner can do that at any time
        serve(staging, *delta(new_arrays()))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda data: data[:-1] + b"?", id="a byte"),
        pytest.param(lambda data: data[:-1], id="shorter"),
        pytest.param(lambda data: data + b"x", id="longer"),
        pytest.param(lambda data: data.replace(b"model.b", b"model.c"), id="another header"),
    ],
)
def test_shared_file_that_differs_is_rejected(tmp_path: Path, change: object) -> None:
    file = Path(shared(tmp_path / "shared"))
    file.write_bytes(change(file.read_bytes()))  # type: ignore[operator]
    with staging_in(tmp_path / "staging", shared_dirs=(tmp_path / "shared",)) as staging:
        with pytest.raises(InvalidRequest), staging.open(manifest_of(file=str(file))) as push:
            push.read_file()
        assert list((tmp_path / "staging").rglob("*.safetensors")) == []
    assert file.exists()


def test_files_outside_shared_dirs_are_rejected(tmp_path: Path) -> None:
    inside, outside = tmp_path / "shared", tmp_path / "secret"
    secret = shared(outside)
    shared(inside)
    (inside / "link.safetensors").symlink_to(secret)
    (inside / "folder").symlink_to(outside)
    with staging_in(tmp_path / "staging", shared_dirs=(inside,)) as staging:
        for path in (
            secret,
            f"{inside}/../secret/shared.safetensors",
            str(inside / "link.safetensors"),
            str(inside / "folder" / "shared.safetensors"),
            "shared.safetensors",
            str(tmp_path / "shared-too" / "x"),
            "/etc/passwd",
        ):
            with pytest.raises(InvalidRequest, match=r"manifest\.file: is .* within shared_dirs of this replica"):
                staging.open(manifest_of(file=path))
        for path in (str(inside), str(inside / "nothing")):
            with pytest.raises(InvalidRequest, match="is not a file on this host"):
                staging.open(manifest_of(file=path))
    with staging_in(tmp_path / "staging") as staging, pytest.raises(InvalidRequest, match="shared_dirs is empty"):
        staging.open(manifest_of(file=str(inside / "shared.safetensors")))


@pytest.mark.parametrize("is_delta", [False, True])
def test_payload_of_a_group_is_read_from_its_file(tmp_path: Path, is_delta: bool) -> None:
    group = ProcessGroup("gloo", b"host:1", 9.0)
    with staging_in(tmp_path) as staging:
        serve(staging, manifest_of())
        manifest, body = delta(new_arrays()) if is_delta else (manifest_of(version=2), DATA)
        manifest = dataclasses.replace(manifest, process_group=group)
        with staging.open(manifest) as push:
            payload = push.group_payload()
            assert (payload.rendezvous, payload.timeout_s) == (Rendezvous("gloo", b"host:1"), 9.0)
            assert sum(payload.part_bytes) == len(body)
            payload.path.write_bytes(payload.header + body)
            push.read_file()
            push.finish(len(body))
            found = load_file(push.path)
            staging.applied(push)
        expected = new_arrays() if is_delta else ARRAYS
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array)
        assert staging.base is not None
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == [staging.base.path]
