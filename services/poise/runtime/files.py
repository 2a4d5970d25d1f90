"""Files that are there whole, or not at all, over crashes and power cuts."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from numpy.typing import NDArray


def keep_private() -> None:
    """Let no other user read what this process and its children write from now on: weights, data, tokens, sockets."""
    os.umask(os.umask(0) | 0o077)


def commit_file(temporary: Path, target: Path) -> None:
    """Make a written file durable under its name."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(target)
    sync_folder(target.parent)


def write_file(target: Path, data: bytes) -> None:
    """Write a file, durable on return."""
    temporary = target.with_name(target.name + ".tmp")
    temporary.write_bytes(data)
    commit_file(temporary, target)


def write_lines(target: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write a file of JSON lines, durable on return."""
    temporary = target.with_name(target.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(map(json_line, lines))
    commit_file(temporary, target)


def json_line(values: Mapping[str, Any]) -> str:
    """Return an object as a line of JSON.

    Raises:
        ValueError: it holds a number that JSON has no word for.
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
    """Write a safetensors file, durable on return; its name is not, see `sync_folder`.

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
    """Raise what safetensors says of a full disk as the `OSError` it is: its own error is none."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        number = _OS_ERROR.search(str(error))
        raise OSError(int(number[1]) if number else 0, str(error), str(path)) from error


_OS_ERROR = re.compile(r"os error (\d+)")


def without_nan(value: Any) -> Any:
    """Return a tree with None in place of every number that JSON has no word for."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
