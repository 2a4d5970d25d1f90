"""Transports of a push's payload: over gRPC, through a file on the same host, or from GPU to GPU."""

from __future__ import annotations

import threading
from pathlib import Path

from poise.errors import BackendDown
from poise.learner.config import PushConfig
from poise.learner.publishing.process_group import GroupSender
from poise.runtime.files.scratch import ScratchFolder
from poise_client import WeightPush

_PREFIX = "poise-push-"


class Transport:
    """Sends the payload over gRPC, in chunks. Its methods block and are called from several threads."""

    def place(self, push: WeightPush) -> WeightPush:
        """Write the payload to a file, if replicas read files; return the push for gRPC. Raises `BackendDown`."""
        return push

    def remove(self, push: WeightPush) -> None:
        """Delete the file that `place` wrote for a push, which is no longer sent."""

    def group_sender(self) -> GroupSender | None:
        """Return a sender for one replica; None if this transport uses no process group."""
        return None

    def close(self) -> None:
        """Delete everything that this transport wrote."""


class NcclTransport(Transport):
    """Sends the payload from device to device, or over gRPC to replicas without a process group."""

    def __init__(self, device: str) -> None:
        self._device = device

    def group_sender(self) -> GroupSender | None:
        """Return a sender for one replica."""
        return GroupSender(self._device)


class SharedTransport(Transport):
    """Writes the payload to a file once, for all replicas on this host.

    The files are in a folder of this process, deleted at the end or, after a kill, by the next process. A file is
    never changed, so a replica that has opened or linked it can read it after it is deleted.
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
                remedy="Free space for two versions of the model there, or set another push.shared_dir.",
            ) from error
        return push.in_file(str(path))

    def remove(self, push: WeightPush) -> None:
        """See `Transport`."""
        Path(push.manifest.file).unlink(missing_ok=True)

    def close(self) -> None:
        """See `Transport`."""
        self._folder.close()


def make_transport(config: PushConfig, device: str = "cpu") -> Transport:
    """Return the configured transport for a learner on a torch device."""
    match config.transport:
        case "shared":
            return SharedTransport(config.shared_dir)
        case "nccl":
            return NcclTransport(device)
        case "grpc" | "lora":
            return Transport()


def _write(path: Path, push: WeightPush) -> None:
    try:
        with path.open("wb") as file:
            for part in push.file_parts():
                file.write(part)
    except OSError:
        path.unlink(missing_ok=True)
        raise
