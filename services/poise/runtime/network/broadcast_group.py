"""Groups of two processes that hand over bytes by broadcast: NCCL between GPUs, gloo between the CPUs of one host.

One process invites and sends, the other joins and receives. NCCL's part is vLLM's communicator, met by a unique id
rather than through a store: what travels in a rendezvous is never unpickled. torch and vLLM are imported late. Its
functions block; `Group.abort` is for another thread to call.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

PIECE_BYTES = 64 * 2**20
"""A body goes in pieces of at most so many bytes: they bound the memory that it takes on a device."""

SENDER, RECEIVER = 0, 1

_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where the two meet."""

    backend: str
    """`nccl` or `gloo`."""
    key: bytes
    """NCCL's unique id; of gloo, host:port of the sender's store."""


class Group(Protocol):
    """The two, once they have met."""

    def broadcast(self, piece: Any) -> None:
        """Send or fill a tensor of bytes on the group's device; return when that is done."""
        ...

    def abort(self) -> None:
        """Make what runs fail, and all that comes. Safe to call twice, and from any thread."""
        ...


def piece_sizes(num_bytes: int) -> Iterator[int]:
    """Yield the sizes of the pieces that a part of a body travels in."""
    for start in range(0, num_bytes, PIECE_BYTES):
        yield min(PIECE_BYTES, num_bytes - start)


def backend_of(device: str) -> str:
    """Return the backend for tensors of a torch device."""
    return "nccl" if device.startswith("cuda") else "gloo"


def invite(device: str, timeout_s: float) -> tuple[Rendezvous, Callable[[], Group]]:
    """Return where a sender can be met, and what waits for the receiver there."""
    if backend_of(device) == "nccl":
        from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

        key = bytes(NCCLLibrary().ncclGetUniqueId().internal)
        return Rendezvous("nccl", key), lambda: _NcclGroup(key, SENDER, device)
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    timeout = datetime.timedelta(seconds=timeout_s)
    store = TCPStore(_LOOPBACK, 0, 2, True, timeout, wait_for_workers=False)
    return Rendezvous("gloo", f"{_LOOPBACK}:{store.port}".encode()), lambda: _GlooGroup(store, SENDER, timeout)


def join(rendezvous: Rendezvous, device: str, timeout_s: float) -> Group:
    """Meet who invited. Raises `ValueError` for a rendezvous that is none of this device."""
    if rendezvous.backend != backend_of(device):
        raise ValueError(f"{rendezvous.backend} is for no tensors of {device}")
    if rendezvous.backend == "nccl":
        return _NcclGroup(rendezvous.key, RECEIVER, device)
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    timeout = datetime.timedelta(seconds=timeout_s)
    host, _, port = rendezvous.key.decode().rpartition(":")
    return _GlooGroup(TCPStore(host, int(port), 2, False, timeout), RECEIVER, timeout)


class _NcclGroup:
    """By vLLM's communicator."""

    def __init__(self, key: bytes, rank: int, device: str) -> None:
        import torch
        from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator

        self._device = torch.device(device)
        with torch.cuda.device(self._device):
            self._stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # beside what the model computes
            self._communicator = PyNcclCommunicator.from_unique_id_bytes(key, rank, 2, self._device)

    def broadcast(self, piece: Any) -> None:
        import torch

        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())  # which filled or made the piece
            self._communicator.broadcast(piece, SENDER, stream=self._stream)
            self._stream.synchronize()
        if self._communicator.disabled:
            raise RuntimeError("the group was aborted")

    def abort(self) -> None:
        self._communicator.destroy()  # which aborts what hangs


class _GlooGroup:
    def __init__(self, store: Any, rank: int, timeout: datetime.timedelta) -> None:
        from torch.distributed import BroadcastOptions, ProcessGroupGloo

        # By name: left to itself, gloo takes GLOO_SOCKET_IFNAME, or the address that this host's name stands for.
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
        # Once nobody holds it the connection closes, which the other one notices. What waits in here itself gloo
        # cannot wake: that ends with the connection, or the group's time.
        self._group = None
