"""Write files atomically and durably: after a crash or power cut they exist completely or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from numpy.typing import NDArray

_BLOCK_BYTES = 4096

_REMEDIES = {
    errno.ENOSPC: "Free some space there",
    errno.EDQUOT: "Free some space there, or raise the quota",
    errno.EROFS: "Mount it writable",
    errno.EACCES: "Restore the permission to write there",
    errno.EPERM: "Restore the permission to write there",
    errno.EIO: "Check the disk",
    errno.ENOENT: "Move it back if it was moved, and check that its file system is mounted",
    errno.ENOTDIR: "Move it back if it was moved, and check that its file system is mounted",
    errno.ESTALE: "Check that its file system is mounted",
    errno.ENOTCONN: "Check that its file system is mounted",
    errno.ETIMEDOUT: "Check that its file system responds",
    errno.EMFILE: "Raise the limit of open files",
}
"""Remedies of disk errors, by error number."""


def describe_disk_error(error: OSError) -> str:
    """Return a disk error and its remedy: `No space left on device: /x. Free some space there`."""
    if isinstance(error, shutil.Error) and error.args and isinstance(error.args[0], list):
        source, target, why = error.args[0][0]  # the first of the files that could not be copied
        return f"{target or source} cannot be copied: {why}"
    what = error.strerror or str(error) or type(error).__name__
    where = f": {error.filename}" if error.filename and str(error.filename) not in what else ""
    remedy = _REMEDIES.get(error.errno or 0)
    return f"{what}{where}. {remedy}" if remedy else f"{what}{where}"


def free_bytes(folder: Path) -> float:
    """Return the free bytes of a folder's file system; infinity if it has no limit, like some tmpfs."""
    usage = shutil.disk_usage(folder)
    return usage.free if usage.total else math.inf


def check_writable(folder: Path) -> None:
    """Raise `OSError` unless a file can be written to `folder`; remove the file again."""
    probe = folder / ".probe"
    write_file(probe, b"probe")
    probe.unlink()


def restrict_umask() -> None:
    """Set the umask so that no other user can read what this process and its children write."""
    os.umask(os.umask(0) | 0o077)


def commit_file(temporary: Path, target: Path) -> None:
    """Move a written file to its name, durably."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(target)
    sync_folder(target.parent)


def write_file(target: Path, data: bytes) -> None:
    """Write a file, durable on return."""
    with _temporary(target) as temporary:
        temporary.write_bytes(data)
        commit_file(temporary, target)


def write_lines(target: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write a file of JSON lines, durable on return."""
    with _temporary(target) as temporary:
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(map(json_line, lines))
        commit_file(temporary, target)


@contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    """Yield a path to write before the move to `target`. A failed write leaves no file: the disk may be full."""
    temporary = target.with_name(target.name + ".tmp")
    try:
        yield temporary
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def append_file(target: Path, data: bytes) -> None:
    """Append whole lines to a file, durable on return. If that fails, append nothing.

    Raises:
        OSError: nothing was appended.
    """
    with target.open("a+b", buffering=0) as file:
        end = _end_of_lines(file)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):  # the next call truncates it
                file.truncate(end)
            raise


def _end_of_lines(file: IO[bytes]) -> int:
    """Remove an incomplete last line of a file, and return its size."""
    end = size = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - _BLOCK_BYTES)
        file.seek(start)
        last = file.read(end - start).rfind(b"\n")
        if last >= 0:
            end = start + last + 1
            break
        end = start
    if end < size:
        file.truncate(end)
    return end


def json_line(values: Mapping[str, Any]) -> str:
    """Return an object as a line of JSON.

    Raises:
        ValueError: it contains NaN or infinity.
    """
    return json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n"


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_tensors(path: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    """Write a safetensors file. Its content is durable on return, its name only after `sync_folder`.

    Raises:
        OSError: it could not be written.
    """
    import safetensors.numpy

    with tensor_errors(path):
        safetensors.numpy.save_file(dict(tensors), path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def tensor_errors(path: Path) -> Iterator[None]:
    """Raise disk errors of safetensors, which has its own exception class, as `OSError`."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        number = _OS_ERROR.search(str(error))
        raise OSError(int(number[1]) if number else 0, str(error), str(path)) from error


_OS_ERROR = re.compile(r"os error (\d+)")


def without_nan(value: Any) -> Any:
    """Return a tree with None in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
