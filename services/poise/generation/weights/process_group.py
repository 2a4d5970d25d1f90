"""Receives the payload of a push through a process group into a file, on a thread of its own.

The `torch` engine runs it in the server, the `vllm` engine in its first worker. torch is imported late.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from poise.errors import BackendDown
from poise.runtime.network.broadcast_group import BroadcastGroup, Rendezvous, join, piece_sizes

logger = logging.getLogger(__name__)

_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class GroupPayload:
    """A payload to receive through a process group, and the file to write it to."""

    rendezvous: Rendezvous
    part_bytes: tuple[int, ...]
    """Sizes of the parts, in order."""
    header: bytes
    """Bytes to write before the parts."""
    path: Path
    timeout_s: float


class GroupReceiver:
    """Receives one payload at a time. Keeps its group while the rendezvous stays the same."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._rendezvous: Rendezvous | None = None
        self._group: BroadcastGroup | None = None
        self._is_aborted = False
        self._outcome: str | None = ""

    def start(self, payload: GroupPayload) -> None:
        """Start receiving. Raises `RuntimeError` while an earlier payload is still being received."""
        if self._outcome is None:  # aborting may not wake a thread that waits for a dead sender
            raise RuntimeError("another payload is being received")
        self._outcome, self._is_aborted = None, False
        threading.Thread(target=self._run, args=(payload,), name="group-receiver", daemon=True).start()

    def outcome(self) -> str | None:
        """Return None while receiving, "" after success, and otherwise the error."""
        return self._outcome

    def abort(self) -> None:
        """Stop receiving and leave the group."""
        self._is_aborted = True
        group, self._group, self._rendezvous = self._group, None, None
        if group is not None:
            group.abort()

    def _run(self, payload: GroupPayload) -> None:
        try:
            self._receive(payload, self._join(payload))
            self._outcome = ""
        except Exception as error:  # communicators raise many types
            logger.warning("receiving the payload of a push through a group failed: %s", error)
            self.abort()
            self._outcome = str(error) or type(error).__name__

    def _join(self, payload: GroupPayload) -> BroadcastGroup:
        if self._group is not None and self._rendezvous == payload.rendezvous:
            return self._group
        if self._group is not None:
            self._group.abort()
        self._group = group = join(payload.rendezvous, self._device, payload.timeout_s)
        self._rendezvous = payload.rendezvous
        if self._is_aborted:  # during `join`
            raise RuntimeError("the push was aborted")
        return group

    def _receive(self, payload: GroupPayload, group: BroadcastGroup) -> None:
        import torch

        with payload.path.open("wb") as file:
            file.write(payload.header)
            for part in payload.part_bytes:
                for size in piece_sizes(part):
                    piece = torch.empty(size, dtype=torch.uint8, device=self._device)
                    group.broadcast(piece)
                    file.write(piece.cpu().numpy().data)


async def wait_for_payload(
    outcome: Callable[[], Awaitable[str | None]], abort: Callable[[], Awaitable[None]], timeout_s: float
) -> None:
    """Return once a `GroupReceiver` has received its payload.

    Args:
        outcome: calls `GroupReceiver.outcome`.
        abort: calls `GroupReceiver.abort`.
        timeout_s: longest wait.

    Raises:
        BackendDown: the payload did not arrive, or not in time. The receiver was aborted.
    """
    result: str | None = None
    try:
        async with asyncio.timeout(timeout_s):
            while (result := await outcome()) is None:  # noqa: ASYNC110 (it may be in another process)
                await asyncio.sleep(_POLL_S)
    except TimeoutError:
        result = f"it took longer than {timeout_s:.0f} s"
    finally:
        if result != "":
            await asyncio.shield(abort())
    if result:
        raise BackendDown(f"the payload of the push did not arrive through its group: {result}")
