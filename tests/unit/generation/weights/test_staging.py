"""What arrives of a push, whole, as a delta or in a file; and that nothing of it stays but the base of the next."""

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
from poise.generation.weights import received_files as module
from poise.generation.weights import staging as staging_module
from poise.generation.weights.manifest import Announcement, ExpectedTensor, policy_digest
from poise.generation.weights.received_files import StagedWeights
from poise.generation.weights.staging import Staging
from poise_client.codec import make_delta, safetensors_header

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


def announcement(tensors: list[ExpectedTensor] = TENSORS, version: int = 1, **more: object) -> Announcement:
    policy = ServedPolicy("lineage", version, policy_digest(tensors))
    return Announcement(**{"policy": policy, "tensors": tuple(tensors), "keep": True} | more)


@contextmanager
def staging_in(folder: Path, *, keep_base: bool = True, shared_dirs: tuple[Path, ...] = ()) -> Iterator[Staging]:
    """A staging area that is closed at the end, and has then left nothing."""
    staging = Staging(folder, keep_base=keep_base, shared_dirs=shared_dirs)
    try:
        yield staging
    finally:
        staging.close()
        staging.close()
        assert not folder.is_dir() or list(folder.glob("poise-weights-*")) == []


@contextmanager
def staged_in(folder: Path, announced: Announcement) -> Iterator[StagedWeights]:
    with staging_in(folder) as staging:
        with staging.receive(announced) as staged:
            yield staged
        assert list(folder.rglob("*.safetensors")) == []


def send(staged: StagedWeights, data: bytes, chunk_bytes: int) -> None:
    for start in range(0, len(data), chunk_bytes):
        staged.write(start, data[start : start + chunk_bytes])


@pytest.mark.parametrize("chunk_bytes", [1, 7, len(DATA)])
def test_staged_file_holds_the_tensors_sent(tmp_path: Path, chunk_bytes: int) -> None:
    with staged_in(tmp_path / "new" / "folder", announcement()) as staged:
        send(staged, DATA, chunk_bytes)
        staged.finish(len(DATA))
        found = load_file(staged.path)
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
    with staged_in(tmp_path, announcement()) as staged, pytest.raises(InvalidRequest, match=path):
        send(staged, damaged, chunk_bytes)


@pytest.mark.parametrize("offset", [0, 4, 9, 2**63])
def test_chunk_out_of_order_is_refused(tmp_path: Path, offset: int) -> None:
    with staged_in(tmp_path, announcement()) as staged:
        staged.write(0, DATA[:8])
        with pytest.raises(InvalidRequest, match=rf"chunk\.offset: is {offset}; 8 bytes were received"):
            staged.write(offset, DATA[8:10])


def test_bytes_beyond_the_announced_are_refused(tmp_path: Path) -> None:
    with staged_in(tmp_path, announcement()) as staged:
        staged.write(0, DATA[:-1])
        with pytest.raises(InvalidRequest, match=rf"chunk\.data: exceeds the {len(DATA)} bytes"):
            staged.write(len(DATA) - 1, DATA[-1:] + b"!")


@pytest.mark.parametrize(("num_sent", "total"), [(len(DATA) - 1, len(DATA)), (len(DATA), len(DATA) - 1), (0, 0)])
def test_commit_before_the_last_byte_is_refused(tmp_path: Path, num_sent: int, total: int) -> None:
    with staged_in(tmp_path, announcement()) as staged:
        if num_sent:
            staged.write(0, DATA[:num_sent])
        with pytest.raises(InvalidRequest, match=r"commit\.total_bytes"):
            staged.finish(total)


def test_file_is_removed_when_the_push_fails(tmp_path: Path) -> None:
    with pytest.raises(KeyError), staged_in(tmp_path, announcement()) as staged:
        staged.write(0, DATA)
        assert staged.path.is_relative_to(tmp_path)
        raise KeyError


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
        staged_in(tmp_path, announcement(tensors)) as staged,
    ):
        staged.write(0, bytes(size))
        staged.finish(size)
    assert str(size) in caught.value.remedy


@pytest.mark.parametrize("in_file", [False, True])
def test_push_that_cannot_fit_is_refused_before_its_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_file: bool
) -> None:
    usage = module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=len(DATA) - 1))
    monkeypatch.setattr(module.os, "link", _across_disks)
    folder = tmp_path / "staging"
    refused = pytest.raises(BackendDown, match=f"stored in {folder}: it takes {len(DATA)} bytes, and {len(DATA) - 1} ")
    with staging_in(folder, shared_dirs=(tmp_path / "shared",)) as staging:
        if in_file:
            with staging.receive(announcement(file=shared(tmp_path / "shared"))) as staged, refused as caught:
                staged.read_source()
        else:
            with refused as caught, staging.receive(announcement()):
                raise AssertionError
        assert "staging_dir" in caught.value.remedy
        assert list(folder.rglob("*.safetensors")) == []


def _across_disks(*_: object) -> None:
    raise OSError(errno.EXDEV, "across disks")


def test_push_moves_to_the_folder_that_has_room_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, temporary = tmp_path / "memory", tmp_path / "temporary"
    monkeypatch.setattr(staging_module, "staging_folders", lambda _: [memory, temporary])
    monkeypatch.setattr(staging_module, "choose_folder", lambda folders, num_bytes: folders[num_bytes > len(DATA)])
    for folder in (memory, temporary):
        folder.mkdir()
        (folder / "poise-weights-left").mkdir()
    staging = Staging(None, keep_base=True, shared_dirs=())
    staging.remove_leftovers()
    assert list(memory.iterdir()) == list(temporary.iterdir()) == []
    more = [*TENSORS, dataclasses.replace(TENSORS[0], name="more")]
    for tensors, data, folder in ((TENSORS, DATA, memory), (more, DATA + DATA[: ENDS[0]], temporary)):
        with staging.receive(announcement(tensors)) as staged:
            send(staged, data, len(data))
            staged.finish(len(data))
            assert staged.path.is_relative_to(folder)
    staging.close()
    assert list(memory.iterdir()) == list(temporary.iterdir()) == []


def test_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with (
        pytest.raises(BackendDown, match=f"cannot be stored in {tmp_path}/file"),
        staged_in(tmp_path / "file", announcement()),
    ):
        raise AssertionError


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    script = (
        "import os, signal\nfrom pathlib import Path\n"
        "from poise.generation.served_policy import ServedPolicy\n"
        "from poise.generation.weights.staging import Staging\n"
        "from poise.generation.weights.manifest import Announcement, ExpectedTensor\n"
        f"staging = Staging(Path({str(tmp_path)!r}), keep_base=True, shared_dirs=())\n"
        "tensors = (ExpectedTensor('a', 'float32', (9,), b''),)\n"
        "with staging.receive(Announcement(ServedPolicy(), tensors)) as staged:\n"
        "    staged.write(0, b'x' * 12)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    with staging_in(tmp_path) as staging:
        staging.remove_leftovers()
        assert list(tmp_path.iterdir()) == []


def serve(staging: Staging, announced: Announcement, body: bytes = DATA) -> dict[str, np.ndarray]:
    """Take a push as the service does; return what an engine was given."""
    with staging.receive(announced) as staged:
        if staged.source is None:
            send(staged, body, 5)
        else:
            staged.read_source()
        staged.finish(announced.body_bytes)
        found = load_file(staged.path)
        staging.applied(staged, announced)
    return found


def new_arrays() -> dict[str, np.ndarray]:
    """Return a version after `ARRAYS`: of a matrix, of the scalar and of the last something changed, nothing else."""
    new = {name: array.copy() for name, array in ARRAYS.items()}
    new["model.b"][1, 1] = -0.5
    new["scalar"][...] = 4
    new["half"][[0, 6]] = 1
    return new


def delta(new: dict[str, np.ndarray], version: int = 2, **more: object) -> tuple[Announcement, bytes]:
    tensors, body = [], b""
    for (name, array), base in zip(new.items(), ARRAYS.values(), strict=True):
        num_changed, block = make_delta(base.tobytes(), array.tobytes(), array.itemsize)
        digest = hashlib.sha256(array.tobytes()).digest()
        tensors.append(ExpectedTensor(name, array.dtype.name, array.shape, digest, num_changed, len(block)))
        body += block
    return announcement(tensors, version, **{"base": announcement().policy} | more), body


@pytest.mark.parametrize("in_file", [False, True])
def test_delta_on_the_base_gives_the_new_version_which_becomes_the_base(tmp_path: Path, in_file: bool) -> None:
    with staging_in(tmp_path / "staging", shared_dirs=(tmp_path,)) as staging:
        serve(staging, announcement())
        announced, body = delta(new_arrays())
        if in_file:
            (tmp_path / "body").write_bytes(body)
            announced = dataclasses.replace(announced, file=str(tmp_path / "body"))
        found = serve(staging, announced, body)
        for name, array in new_arrays().items():
            np.testing.assert_array_equal(found[name], array)
        assert staging.base is not None
        assert staging.base.policy == announced.policy
        assert list((tmp_path / "staging").rglob("*.safetensors")) == [staging.base.path]
        np.testing.assert_array_equal(load_file(staging.base.path)["half"], new_arrays()["half"])


def test_delta_of_nothing_needs_no_body(tmp_path: Path) -> None:
    with staging_in(tmp_path) as staging:
        serve(staging, announcement())
        announced, body = delta(ARRAYS)
        assert body == b""
        found = serve(staging, announced, body)
        np.testing.assert_array_equal(found["model.a"], ARRAYS["model.a"])


def test_delta_without_its_base_is_refused_by_name_before_its_body_comes(tmp_path: Path) -> None:
    announced, body = delta(new_arrays())
    with staging_in(tmp_path) as staging:
        with pytest.raises(VersionMismatch, match="against version 1 came, and none is kept"):
            staging.receive(announced)
        serve(staging, announcement())
        for other in (ServedPolicy("lineage", 1, b"x" * 32), ServedPolicy("other", 1, announcement().policy.digest)):
            with pytest.raises(VersionMismatch, match="version 1 is kept"):
                staging.receive(dataclasses.replace(announced, base=other))
        serve(staging, announced, body)
        with pytest.raises(VersionMismatch, match="version 2 is kept") as caught:
            staging.receive(announced)
        assert caught.value.remedy


def test_delta_of_other_parameters_than_the_base_s_is_refused(tmp_path: Path) -> None:
    with staging_in(tmp_path) as staging:
        serve(staging, announcement())
        announced, _ = delta(new_arrays())
        swapped = (announced.tensors[1], announced.tensors[0], *announced.tensors[2:])
        for tensors in (swapped, announced.tensors[:-1]):
            with pytest.raises(InvalidRequest, match=r"manifest\.tensors: are not those of the base"):
                staging.receive(dataclasses.replace(announced, tensors=tensors))


@pytest.mark.parametrize("how", ["flipped", "another's", "too few"])
def test_delta_that_does_not_give_what_it_announced_is_refused_and_the_base_stays(tmp_path: Path, how: str) -> None:
    with staging_in(tmp_path) as staging:
        serve(staging, announcement())
        announced, body = delta(new_arrays())
        wrong, sent = announced, body
        match how:
            case "flipped":
                sent = bytes([*body[:4], body[4] ^ 8, *body[5:]])
            case "another's":
                other = dataclasses.replace(announced.tensors[0], sha256=b"x" * 32)
                wrong = dataclasses.replace(announced, tensors=(other, *announced.tensors[1:]))
            case _:
                sent = body[:-1]
        with pytest.raises(InvalidRequest), staging.receive(wrong) as staged:
            send(staged, sent, len(sent))
            staged.finish(len(body))
        assert list(tmp_path.rglob("*.safetensors")) == [staging.base.path]  # type: ignore[union-attr]
        found = serve(staging, announced, body)
        np.testing.assert_array_equal(found["model.b"], new_arrays()["model.b"])


@pytest.mark.parametrize("why", ["not wanted", "not allowed", "no room"])
def test_base_is_kept_only_where_it_is_of_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    if why == "no room":
        usage = module.shutil.disk_usage(tmp_path)
        free = iter([len(DATA), len(DATA) - 1])  # before the push, and after it
        monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=next(free)))
    with staging_in(tmp_path, keep_base=why != "not allowed") as staging:
        serve(staging, announcement(keep=why != "not wanted"))
        assert staging.base is None
        assert list(tmp_path.rglob("*.safetensors")) == []


def test_whole_parameters_take_the_room_of_the_base_before_they_come(tmp_path: Path) -> None:
    with staging_in(tmp_path) as staging:
        serve(staging, announcement())
        with staging.receive(announcement(version=2)) as staged:
            assert list(tmp_path.rglob("*.safetensors")) == [staged.path]


def shared(folder: Path, name: str = "shared.safetensors") -> str:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_bytes(safetensors_header(tensor.form for tensor in TENSORS) + DATA)
    return str(path)


@pytest.mark.parametrize("linked", [True, False])
def test_shared_file_is_taken_without_touching_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, linked: bool
) -> None:
    if not linked:

        def another_disk(*_: object) -> None:
            raise OSError(module.errno.EXDEV, "another disk")

        monkeypatch.setattr(module.os, "link", another_disk)
    file = shared(tmp_path / "shared")
    before = Path(file).read_bytes()
    with staging_in(tmp_path / "staging", shared_dirs=(tmp_path / "shared",)) as staging:
        found = serve(staging, announcement(file=file))
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(found[name], array)
        assert staging.base is not None
        assert staging.base.path.samefile(file) is linked
        assert Path(file).read_bytes() == before
        Path(file).unlink()  # its owner may, at any time
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
def test_shared_file_that_is_not_what_was_announced_is_refused(tmp_path: Path, change: object) -> None:
    file = Path(shared(tmp_path / "shared"))
    file.write_bytes(change(file.read_bytes()))  # type: ignore[operator]
    with staging_in(tmp_path / "staging", shared_dirs=(tmp_path / "shared",)) as staging:
        with pytest.raises(InvalidRequest), staging.receive(announcement(file=str(file))) as staged:
            staged.read_source()
        assert list((tmp_path / "staging").rglob("*.safetensors")) == []
    assert file.exists()


def test_files_outside_the_shared_folders_are_refused_whatever_leads_there(tmp_path: Path) -> None:
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
            with pytest.raises(InvalidRequest, match=r"manifest\.file: must lie within one of shared_dirs"):
                staging.receive(announcement(file=path))
        for path in (str(inside), str(inside / "nothing")):
            with pytest.raises(InvalidRequest, match="is no file here"):
                staging.receive(announcement(file=path))
    with staging_in(tmp_path / "staging") as staging, pytest.raises(InvalidRequest, match="none is allowed"):
        staging.receive(announcement(file=str(inside / "shared.safetensors")))
