"""Writes the metrics of steps as TensorBoard scalars, without TensorFlow.

It uses tensorboard's `RecordWriter`. The `EventFileWriter` imports TensorFlow if installed, and buffers in a thread.
Here a step is on disk when `write` returns.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from poise.runtime.files.atomic import describe_disk_error

logger = logging.getLogger(__name__)


class TensorBoardLog:
    """An event file in a folder. Every start of a run adds a file, as TensorBoard expects.

    While the disk fails, records are kept in memory and written with the next step; training does not wait for it.

    A resumed run repeats the steps that it had not finished. TensorBoard drops their points in earlier files, starting
    at the first step written here.
    """

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        num_earlier = len(list(folder.glob("events.out.tfevents.*")))
        # TensorBoard reads the files in the order of their names.
        name = f"events.out.tfevents.{int(time.time()):010d}.{num_earlier:06d}.{socket.gethostname()}.{os.getpid()}"
        self._writer = RecordWriter(_RetryingFile(folder / name))
        self._resumes = num_earlier > 0
        self._put(event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2"))

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Write every finite number of a step's nested metrics as a scalar, named by its path such as `reward/mean`.

        Raises:
            KeyError: the metrics have no "step".
        """
        from tensorboard.compat.proto import event_pb2, summary_pb2

        step, now_s = int(metrics["step"]), time.time()
        if self._resumes:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._put(event_pb2.Event(wall_time=now_s, step=step, session_log=start))
            self._resumes = False
        scalars = [
            summary_pb2.Summary.Value(tag=tag, simple_value=value)
            for tag, value in _flattened(metrics)
            if tag != "step"
        ]
        self._put(event_pb2.Event(wall_time=now_s, step=step, summary=summary_pb2.Summary(value=scalars)))

    def close(self) -> None:
        """Close the file. May be called twice."""
        if not self._writer.closed:
            self._writer.close()

    def _put(self, event: Any) -> None:
        self._writer.write(event.SerializeToString())
        self._writer.flush()


class _RetryingFile:
    """A file that keeps records in memory while the disk fails. A failed flush leaves no partial record."""

    def __init__(self, path: Path) -> None:
        """Create the file. Raises `OSError`."""
        self._path = path
        self._file = path.open("xb", buffering=0)
        self._unwritten = b""
        self._size = 0
        self._has_failed = False

    @property
    def closed(self) -> bool:
        """Whether the file is closed."""
        return self._file.closed

    def write(self, record: bytes) -> None:
        """Append to the buffer."""
        self._unwritten += record

    def flush(self) -> None:
        """Write the buffer to disk; if that fails, log it and keep the buffer for the next call."""
        rest = memoryview(self._unwritten)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(self._size)
            self._file.seek(self._size)
            if not self._has_failed:
                logger.warning("keeping TensorBoard curves in memory: %s", describe_disk_error(error))
            self._has_failed = True
            return
        if self._has_failed:
            logger.info("writing TensorBoard curves to %s again", self._path)
        self._size += len(self._unwritten)
        self._unwritten, self._has_failed = b"", False

    def close(self) -> None:
        """Write the buffer and close the file."""
        if self._unwritten:
            self.flush()
        if self._unwritten:
            logger.warning(
                "TensorBoard curves lack the last steps, because %s was not writable; metrics.jsonl has them",
                self._path,
            )
        self._file.close()


def _flattened(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and isfinite(value):
            yield f"{prefix}{key}", float(value)
