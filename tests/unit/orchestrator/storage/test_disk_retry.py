"""Writes are retried until the disk works: nothing is lost or duplicated, and the remedy is logged."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.unit.orchestrator.storage.test_run_folder import finish, journalled
from tests.unit.orchestrator.world import World, drive, settings

from poise.orchestrator.errors import RunError
from poise.orchestrator.sampling import retry
from poise.orchestrator.sampling.retry import StopRequested
from poise.orchestrator.storage.disk_retry import DiskRetry
from poise.orchestrator.storage.run_folder import RunFolder
from poise.report import TensorBoardLog
from poise_client.types import ProbeReport


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "RETRY_EVERY_S", 0.001)


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_bytes().splitlines()]


class FullDisk:
    """Makes calls that write to disk fail, `num_failures` times in a row for each number in turn."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, numbers: list[int], num_failures: int) -> None:
        self.left = [number for number in numbers for _ in range(num_failures)]
        self._fsync = os.fsync
        monkeypatch.setattr("os.fsync", self.fsync)

    def fsync(self, descriptor: int) -> None:
        if self.left:
            number = self.left.pop(0)
            raise OSError(number, os.strerror(number))
        self._fsync(descriptor)


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "No space left on device. Free some space"),
        (errno.EDQUOT, "Disk quota exceeded. Free some space there, or raise the quota"),
        (errno.EROFS, "Read-only file system. Mount it writable"),
        (errno.EACCES, "Permission denied. Restore the permission"),
        (errno.EIO, "Input/output error. Check the disk"),
        (errno.ESTALE, "Stale file handle. Check that its file system is mounted"),
    ],
)
async def test_a_run_survives_a_failing_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int, remedy: str
) -> None:
    caplog.set_level(logging.INFO)
    assert await drive(settings(tmp_path / "undisturbed"), World())
    config, world = settings(tmp_path / "run"), World()
    disk: list[FullDisk] = []

    class Filling(World):
        async def submit_advantages(self, batch: Any) -> Any:
            disk.append(FullDisk(monkeypatch, [number], 3)) if batch.step == 1 else None
            return await super().submit_advantages(batch)

    world = Filling()
    assert await drive(config, world)

    assert not disk[0].left
    assert f"waiting for the run's folder: {remedy}" in caplog.text
    assert "The run then resumes" in caplog.text
    assert "the run's folder can be written again after" in caplog.text
    for name in ("metrics.jsonl", "values.jsonl", "rollouts.jsonl", "step_states.jsonl", "evaluations.jsonl"):
        expected = [line["step"] for line in lines(tmp_path / "undisturbed", name)]
        assert [line["step"] for line in lines(config.run_dir, name)] == expected, name


@pytest.mark.parametrize("failing", range(12))
def test_a_step_is_finished_once_wherever_the_disk_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.open("run", {})
    finish(folder, 0)
    step = journalled(1)
    folder.journal.write(step)
    calls, real = [0], os.fsync

    def fsync(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] == failing + 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr("os.fsync", fsync)
    numbers = step.metrics | {"wall_s": 2.0, "tokens": 14, "policy_version": 2}
    for _ in range(2):
        try:
            folder.finish_step(step, numbers)
            break
        except OSError:
            continue

    for name in ("metrics.jsonl", "values.jsonl", "rollouts.jsonl", "step_states.jsonl"):
        assert [line["step"] for line in lines(folder.path, name)] == [0, 1], name
    assert folder.read_state("run").next_step == 2
    folder.close()


@pytest.mark.parametrize("failing", range(8))
def test_a_step_is_journalled_whole_wherever_the_disk_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.open("run", {})
    calls, real = [0], os.fsync

    def fsync(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] == failing + 1:
            raise OSError(errno.EIO, "Input/output error")
        real(descriptor)

    monkeypatch.setattr("os.fsync", fsync)
    for _ in range(2):
        try:
            folder.journal.write(journalled(0))
            break
        except OSError:
            continue

    found = folder.journal.read(0)
    assert found is not None
    assert found.rollouts == journalled(0).rollouts
    assert [path.name for path in (folder.path / "journal").iterdir()] == ["step-00000000"]
    folder.close()


WRITES: list[Callable[[RunFolder], object]] = [
    lambda folder: folder.journal.write(journalled(1)),
    lambda folder: folder.finish_step(
        journalled(1), journalled(1).metrics | {"wall_s": 2.0, "tokens": 14, "policy_version": 2}
    ),
    lambda folder: folder.write_evaluation({"when": "step", "step": 1}, []),
    lambda folder: folder.write_probes(ProbeReport((), 0, 0, 0, 0)),
    lambda folder: folder.mark_reported(),
    lambda folder: folder.evaluated("before", 0),
    lambda folder: folder.last_evaluated(),
]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("is_replaced", [False, True])
async def test_writes_wait_for_a_moved_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, write: Callable[[RunFolder], object], is_replaced: bool
) -> None:
    caplog.set_level(logging.INFO)
    path, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    folder = RunFolder(path)
    folder.open("run", {})
    finish(folder, 0)
    path.rename(elsewhere)
    if is_replaced:
        (path / "logs").mkdir(parents=True)  # as a service that is started again does
    keeping = asyncio.create_task(DiskRetry().run(lambda: write(folder)))
    while "waiting for the run's folder" not in caplog.text:
        await asyncio.sleep(0.001)

    assert not (path / "metrics.jsonl").exists()
    if is_replaced:
        shutil.rmtree(path)
    elsewhere.rename(path)
    await keeping

    assert "can be written again" in caplog.text
    folder.close()


def test_a_moved_folder_is_reported_with_its_new_path(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.open("run", {})
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=rf"was moved to {tmp_path}/elsewhere. Move it back to {tmp_path}/run"):
        folder.mark_reported()
    (tmp_path / "run").mkdir()
    with pytest.raises(OSError, match="and replaced by another folder"):
        folder.mark_reported()
    folder.close()


async def test_a_folder_that_was_deleted_ends_the_run(tmp_path: Path) -> None:
    class Deleting(World):
        async def submit_advantages(self, batch: Any) -> Any:
            shutil.rmtree(tmp_path / "run")
            return await super().submit_advantages(batch)

    with pytest.raises(RunError, match=r"folder .*/run was deleted.*Restore it from a backup"):
        await drive(settings(tmp_path / "run"), Deleting())
    assert not (tmp_path / "run").exists()


async def test_a_stop_ends_the_wait_for_the_disk() -> None:
    stopping = asyncio.Event()

    def refuse() -> None:
        stopping_soon()
        raise OSError(errno.ENOSPC, "No space left on device")

    loop = asyncio.get_running_loop()

    def stopping_soon() -> None:
        loop.call_soon_threadsafe(stopping.set)

    with pytest.raises(StopRequested):
        await DiskRetry(stopping).run(refuse)


async def test_other_errors_are_not_retried() -> None:
    def fail() -> None:
        raise ValueError("a defect")

    with pytest.raises(ValueError, match="a defect"):
        await DiskRetry().run(fail)


@pytest.mark.parametrize("cut_off", [b"", b'{"step": 9, "text', b"\n"[:0] + b"x" * 10000])
def test_lines_are_appended_after_the_last_whole_one(tmp_path: Path, cut_off: bytes) -> None:
    from poise.runtime.files.atomic import append_file

    path = tmp_path / "lines"
    append_file(path, b"one\n")
    with path.open("ab") as file:
        file.write(cut_off)
    append_file(path, b"two\n")
    assert path.read_bytes() == b"one\ntwo\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_curves_are_written_after_the_disk_recovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from tests.unit.report.test_tensorboard import read

    caplog.set_level(logging.INFO)
    log = TensorBoardLog(tmp_path)
    log.write({"step": 0, "reward": 0.0})
    (path,) = tmp_path.iterdir()
    with path.open("rb") as file:
        saved = os.dup(_descriptor_of(path))
        with Path("/dev/full").open("wb") as full:
            os.dup2(full.fileno(), _descriptor_of(path))
        del file
    full_descriptor = _descriptor_of(Path("/dev/full"))
    log.write({"step": 1, "reward": 1.0})
    log.write({"step": 2, "reward": 2.0})
    os.dup2(saved, full_descriptor)
    os.close(saved)
    log.write({"step": 3, "reward": 3.0})
    log.close()
    assert read(tmp_path) == {"reward": [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0)]}
    assert caplog.text.count("keeping TensorBoard curves in memory: No space left on device. Free some space") == 1
    assert "writing TensorBoard curves to" in caplog.text


def _descriptor_of(path: Path) -> int:
    """Return the lowest descriptor that is open for writing at a path."""
    for entry in sorted(Path("/proc/self/fd").iterdir(), key=lambda entry: int(entry.name)):
        try:
            if str(entry.readlink()) == str(path) and (os.O_WRONLY | os.O_RDWR) & _flags(int(entry.name)):
                return int(entry.name)
        except OSError:
            continue
    raise AssertionError(f"{path} is not open")


def _flags(descriptor: int) -> int:
    import fcntl

    return fcntl.fcntl(descriptor, fcntl.F_GETFL)


async def test_journal_of_a_moved_folder_is_written_after_it_is_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, stopping = RunFolder(tmp_path / "run"), asyncio.Event()
    folder.open("run", {})
    folder.path.rename(tmp_path / "elsewhere")

    writing = asyncio.create_task(
        DiskRetry(stopping, folder.check_open).run(lambda: folder.journal.write(journalled(0)))
    )
    while "waiting for" not in caplog.text:
        await asyncio.sleep(0.01)
    (tmp_path / "elsewhere").rename(folder.path)
    await writing

    assert f"was moved to {tmp_path / 'elsewhere'}. Move it back to {folder.path}" in caplog.text
    assert folder.journal.read(0) is not None
    folder.close()


async def test_journal_of_a_deleted_folder_ends_the_run(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.open("run", {})
    shutil.rmtree(folder.path)

    with pytest.raises(RunError, match="was deleted during the run"):
        await DiskRetry(check=folder.check_open).run(lambda: folder.journal.write(journalled(0)))
    folder.close()
