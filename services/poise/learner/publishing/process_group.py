"""Sends a push's payload through a process group of two: the learner and one replica, GPU to GPU or CPU to CPU.

The payload is copied from host memory to the device piece by piece. Training continues meanwhile, and other ranks take
no part. A broadcast to a dead peer may block forever, so it runs on a daemon thread, which is abandoned after the
timeout.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any

import torch

from poise.runtime.network.broadcast_group import BroadcastGroup, backend_of, invite, piece_sizes
from poise_client import AsyncGenerationClient, WeightPush
from poise_client.types import Policy, WeightUpdate


class _Group:
    """A process group with one replica process. Its methods block."""

    def __init__(self, device: str, instance_id: str, timeout_s: float) -> None:
        self.instance_id = instance_id
        """The replica process that can join."""
        self._device = device
        self.rendezvous, self._wait_for_receiver = invite(device, timeout_s)
        self._group: BroadcastGroup | None = None
        self._is_aborted = False

    def broadcast(self, push: WeightPush) -> None:
        """Send a payload, once the replica has joined."""
        if self._group is None:
            self._group = self._wait_for_receiver()
        if self._is_aborted:  # while this thread waited
            self._group.abort()
            raise RuntimeError("the process group was aborted")
        for piece in payload_pieces(push):
            self._group.broadcast(piece.to(self._device))

    def abort(self) -> None:
        """Make running and later broadcasts fail."""
        self._is_aborted = True
        if self._group is not None:
            self._group.abort()


class GroupSender:
    """The process group with one replica, kept from push to push while both processes live."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._group: _Group | None = None

    def can_reach(self, policy: Policy) -> bool:
        """Return whether the replica's process group has the same backend."""
        return policy.process_group_backend == backend_of(self._device)

    async def send(
        self, push: WeightPush, client: AsyncGenerationClient, policy: Policy, timeout_s: float
    ) -> WeightUpdate:
        """Push to the replica that serves `policy`, with the payload through the group. Any error aborts the group.

        Raises:
            TimeoutError: it took longer than `timeout_s`.
            PoiseClientError: the replica rejects the push.
            Exception: the communicator failed.
        """
        try:
            async with asyncio.timeout(timeout_s):
                return await self._send(push, client, policy, timeout_s)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Abort the group."""
        group, self._group = self._group, None
        if group is not None:
            await asyncio.to_thread(group.abort)

    async def _send(
        self, push: WeightPush, client: AsyncGenerationClient, policy: Policy, timeout_s: float
    ) -> WeightUpdate:
        group = self._group
        if group is None or group.instance_id != policy.instance_id:
            await self.close()
            group = self._group = await asyncio.to_thread(_Group, self._device, policy.instance_id, timeout_s)
        request = push.through_group(group.rendezvous.backend, group.rendezvous.key, timeout_s)
        requesting = asyncio.create_task(client.push_weights(request, timeout_s=timeout_s), name="push")
        sending = _on_daemon_thread(partial(group.broadcast, push))
        try:
            both: set[asyncio.Future[Any]] = {requesting, sending}
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
            update = await requesting
            if update.already_applied:
                await self.close()  # the replica will not join
            else:
                await sending
            return update
        finally:
            requesting.cancel()


def payload_pieces(push: WeightPush) -> Iterator[torch.Tensor]:
    """Yield the payload as uint8 tensors of at most `PIECE_BYTES`."""
    for part in push.payload:
        start = 0
        for size in piece_sizes(len(part)):
            piece = part[start : start + size]
            # torch cannot wrap read-only memory: copy a delta's blocks, which are small.
            yield torch.frombuffer(bytearray(piece) if piece.readonly else piece, dtype=torch.uint8)
            start += size


def _on_daemon_thread(work: Callable[[], None]) -> asyncio.Future[None]:
    """Run work on a thread that does not keep the process alive."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            work()
            future.set_result(None)
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="group-sender", daemon=True).start()
    wrapped = asyncio.wrap_future(future)
    wrapped.add_done_callback(lambda done: done.cancelled() or done.exception())
    return wrapped
