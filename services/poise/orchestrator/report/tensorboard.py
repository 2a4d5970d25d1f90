"""The metrics of steps as TensorBoard scalars. Uses tensorboard's own record format and protos alone: no TensorFlow.

`RecordWriter` rather than tensorboard's `EventFileWriter`: the latter imports TensorFlow where that is installed, and
buffers in a thread, while a step here should be on disk when `write` returns.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Mapping
from math import isfinite
from pathlib import Path
from typing import Any


class TensorBoardLog:
    """An event file in a folder; every opening adds a file, as TensorBoard expects of a resumed run.

    Points that an earlier file holds at or after the first step written here are dropped from the curves: a resumed
    run repeats the steps that it had not finished.
    """

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        num_earlier = len(list(folder.glob("events.out.tfevents.*")))
        # TensorBoard reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{int(time.time()):010d}.{num_earlier:06d}.{socket.gethostname()}.{os.getpid()}"
        self._writer = RecordWriter((folder / name).open("xb"))
        self._resumes = num_earlier > 0
        self._put(event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2"))

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Write every finite number of a step's (nested) metrics as a scalar, named by its path: "reward/mean".

        Raises:
            KeyError: no "step" among them.
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
        """Close the file; closing twice is fine."""
        if not self._writer.closed:
            self._writer.close()

    def _put(self, event: Any) -> None:
        self._writer.write(event.SerializeToString())
        self._writer.flush()


def _flattened(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and isfinite(value):
            yield f"{prefix}{key}", float(value)
