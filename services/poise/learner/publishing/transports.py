"""How the bytes of a push get to a replica: over gRPC, through a file of one host, or between GPUs.

Knows no replicas.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Protocol

from poise.errors import BackendDown
from poise.learner.config import PushConfig
from poise.learner.publishing.process_group import GroupSender
from poise.runtime.files.scratch import ScratchFolder
from poise_client import WeightPush

_PREFIX = "poise-push-"


class Transport(Protocol):
    """A way to travel. Its methods block, and may be called from several threads."""

    def place(self, push: WeightPush) -> WeightPush:
        """Put the body where replicas find it, and return the push that tells them. Raises `BackendDown`."""
        ...

    def remove(self, push: WeightPush) -> None:
        """Forget what `place` gave: no replica will be told of it again."""
        ...

    def group_sender(self) -> GroupSender | None:
        """Return what sends bodies to one replica beside gRPC; None where they go as `place` says."""
        ...

    def close(self) -> None:
        """Leave nothing behind."""
        ...


class GrpcTransport:
    """The body goes in chunks beside what announces it, to wherever gRPC goes."""

    def place(self, push: WeightPush) -> WeightPush:
        """See `Transport`."""
        return push

    def remove(self, push: WeightPush) -> None:
        """See `Transport`."""

    def group_sender(self) -> GroupSender | None:
        """See `Transport`."""
        return None

    def close(self) -> None:
        """See `Transport`."""


class NcclTransport(GrpcTransport):
    """The body goes from this process's device to the replica's; over gRPC to replicas that take none so."""

    def __init__(self, device: str) -> None:
        self._device = device

    def group_sender(self) -> GroupSender | None:
        """See `Transport`."""
        return GroupSender(self._device)


class SharedTransport:
    """The body lies in a file, written once however many replicas this host has.

    The files are in a folder of this process's own, which is removed at the end, or after a kill by whoever starts
    next. A file is never changed: whoever opened or linked it may read on when it is removed.
    """

    def __init__(self, parent: Path) -> None:
        self._folder = ScratchFolder(parent, _PREFIX)
        self._lock = threading.Lock()

    def place(self, push: WeightPush) -> WeightPush:
        """See `Transport`."""
        kind = "changes" if push.is_delta else "weights"
        try:
            with self._lock:
                folder = self._folder.ensure()
            path = folder / f"{kind}-{push.manifest.policy_version}-{push.manifest.digest.hex()[:16]}.safetensors"
            _write(path, push)
        except OSError as error:
            raise BackendDown(
                f"push.shared_dir {self._folder.parent} cannot be written: {error.strerror}",
                remedy="Make room for two versions of the model in it, or name another folder.",
            ) from error
        return push.in_file(str(path))

    def remove(self, push: WeightPush) -> None:
        """See `Transport`."""
        Path(push.manifest.file).unlink(missing_ok=True)

    def group_sender(self) -> GroupSender | None:
        """See `Transport`."""
        return None

    def close(self) -> None:
        """See `Transport`."""
        self._folder.close()


def make_transport(config: PushConfig, device: str = "cpu") -> Transport:
    """Return the transport that is configured, for a learner on a torch device."""
    match config.transport:
        case "shared":
            return SharedTransport(config.shared_dir)
        case "nccl":
            return NcclTransport(device)
        case "grpc" | "lora":
            return GrpcTransport()


def _write(path: Path, push: WeightPush) -> None:
    try:
        with path.open("wb") as file:
            for part in push.file_parts():
                file.write(part)
    except OSError:
        path.unlink(missing_ok=True)
        raise
