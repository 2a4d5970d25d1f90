"""Process groups of one sender and one receiver: NCCL between GPUs, gloo between processes on one host.

The sender calls `invite`, the receiver `join`. NCCL groups use vLLM's communicator with a unique id instead of a store,
so nothing from a rendezvous is ever unpickled. torch and vLLM are imported late. All functions block; another thread
may call `BroadcastGroup.abort`.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

PIECE_BYTES = 64 * 2**20
"""Maximum size of the pieces of a payload, which limits the memory on a device."""

SENDER, RECEIVER = 0, 1

_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """What the receiver needs to join a sender."""

    backend: str
    """`nccl` or `gloo`."""
    key: bytes
    """NCCL: its unique id. gloo: host:port of the sender's store."""


class BroadcastGroup(Protocol):
    """A connected sender and receiver."""

    def broadcast(self, piece: Any) -> None:
        """Send a uint8 tensor on the group's device, or fill it as the receiver. Return once it is transferred."""
        ...

    def abort(self) -> None:
        """Make running and later broadcasts fail. Safe to call twice, and from any thread."""
        ...


def piece_sizes(num_bytes: int) -> Iterator[int]:
    """Yield the sizes of the pieces of `num_bytes` bytes."""
    for start in range(0, num_bytes, PIECE_BYTES):
        yield min(PIECE_BYTES, num_bytes - start)


def backend_of(device: str) -> str:
    """Return the backend for tensors of a torch device."""
    return "nccl" if device.startswith("cuda") else "gloo"


def invite(device: str, timeout_s: float) -> tuple[Rendezvous, Callable[[], BroadcastGroup]]:
    """Return a new rendezvous, and a function that waits for the receiver and returns the group."""
    if backend_of(device) == "nccl":
        from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

        key = bytes(NCCLLibrary().ncclGetUniqueId().internal)
        return Rendezvous("nccl", key), lambda: _NcclGroup(key, SENDER, device)
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    timeout = datetime.timedelta(seconds=timeout_s)
    store = TCPStore(_LOOPBACK, 0, 2, True, timeout, wait_for_workers=False)
    return Rendezvous("gloo", f"{_LOOPBACK}:{store.port}".encode()), lambda: _GlooGroup(store, SENDER, timeout)


def join(rendezvous: Rendezvous, device: str, timeout_s: float) -> BroadcastGroup:
    """Return the group with the sender of a rendezvous. Raises `ValueError` if its backend does not fit this device."""
    if rendezvous.backend != backend_of(device):
        raise ValueError(f"backend {rendezvous.backend} does not fit device {device}, which needs {backend_of(device)}")
    if rendezvous.backend == "nccl":
        return _NcclGroup(rendezvous.key, RECEIVER, device)
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    timeout = datetime.timedelta(seconds=timeout_s)
    host, _, port = rendezvous.key.decode().rpartition(":")
    return _GlooGroup(TCPStore(host, int(port), 2, False, timeout), RECEIVER, timeout)


class _NcclGroup:
    """Uses vLLM's communicator."""

    def __init__(self, key: bytes, rank: int, device: str) -> None:
        import torch
        from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator

        self._device = torch.device(device)
        with torch.cuda.device(self._device):
            self._stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # a separate one, so that the model can compute
            self._communicator = PyNcclCommunicator.from_unique_id_bytes(key, rank, 2, self._device)

    def broadcast(self, piece: Any) -> None:
        import torch

        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())  # the stream that wrote the piece
            self._communicator.broadcast(piece, SENDER, stream=self._stream)
            self._stream.synchronize()
        if self._communicator.disabled:
            raise RuntimeError("the group was aborted")

    def abort(self) -> None:
        self._communicator.destroy()  # it also aborts a hanging broadcast


class _GlooGroup:
    """Uses gloo over the loopback interface."""

    def __init__(self, store: Any, rank: int, timeout: datetime.timedelta) -> None:
        from torch.distributed import BroadcastOptions, ProcessGroupGloo

        # Without a host name, gloo takes GLOO_SOCKET_IFNAME, or the address of this host's name.
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # missing in its stubs
        options._devices = [ProcessGroupGloo.create_device(hostname=_LOOPBACK)]
        options._timeout = timeout
        self._group: Any = ProcessGroupGloo(store, rank, 2, options)
        self._from_sender = BroadcastOptions()
        self._from_sender.rootRank, self._from_sender.rootTensor = SENDER, 0

    def broadcast(self, piece: Any) -> None:
        group = self._group
        if group is None:
            raise RuntimeError("the group was aborted")
        group.broadcast([piece], self._from_sender).wait()

    def abort(self) -> None:
        # Dropping the last reference closes the connection, which the peer notices. gloo cannot wake a broadcast that
        # blocks here: it ends when the peer disconnects, or after the timeout.
        self._group = None
