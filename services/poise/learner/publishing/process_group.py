"""The body of a push through a group of two processes, this one and a replica: GPU to GPU, or CPU to CPU.

What is sent is the version's own copy in this process's memory, brought to the device piece by piece: training may go
on meanwhile, and with several processes the others are not asked. A member that waits for one that is gone may wait
for ever, so sending happens on a thread of its own, which is left behind when its time is over.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any

import torch

from poise.runtime.network.broadcast_group import Group, backend_of, invite, piece_sizes
from poise_client import AsyncGenerationClient, WeightPush
from poise_client.types import Policy, WeightUpdate


class _Meeting:
    """A group, from inviting to it until it is given up. Its methods block."""

    def __init__(self, device: str, instance_id: str, timeout_s: float) -> None:
        self.instance_id = instance_id
        """Of the replica's process that is invited."""
        self._device = device
        self.rendezvous, self._meet = invite(device, timeout_s)
        self._group: Group | None = None
        self._given_up = False

    def broadcast(self, push: WeightPush) -> None:
        """Send a body, once the replica is there."""
        if self._group is None:
            self._group = self._meet()
        if self._given_up:  # in the meantime
            self._group.abort()
            raise RuntimeError("the group was given up")
        for piece in _pieces(push):
            self._group.broadcast(piece.to(self._device))

    def give_up(self) -> None:
        """Make what waits in it fail, sooner or later."""
        self._given_up = True
        if self._group is not None:
            self._group.abort()


class GroupSender:
    """This process's group with one replica, kept from push to push while both live."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._meeting: _Meeting | None = None

    def reaches(self, policy: Policy) -> bool:
        """Whether a replica takes what this process could send."""
        return policy.process_group_backend == backend_of(self._device)

    async def send(
        self, push: WeightPush, client: AsyncGenerationClient, policy: Policy, timeout_s: float
    ) -> WeightUpdate:
        """Push to a replica that serves `policy`, its body through the group.

        Raises:
            TimeoutError: it took longer; the group is given up.
            PoiseClientError: the replica does not serve it, and says why; the group is given up.
            Exception: whatever else the communicator raised; the group is given up.
        """
        try:
            async with asyncio.timeout(timeout_s):
                return await self._send(push, client, policy, timeout_s)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Give up the group."""
        meeting, self._meeting = self._meeting, None
        if meeting is not None:
            await asyncio.to_thread(meeting.give_up)

    async def _send(
        self, push: WeightPush, client: AsyncGenerationClient, policy: Policy, timeout_s: float
    ) -> WeightUpdate:
        meeting = self._meeting
        if meeting is None or meeting.instance_id != policy.instance_id:
            await self.close()
            meeting = await asyncio.to_thread(_Meeting, self._device, policy.instance_id, timeout_s)
            self._meeting = meeting
        told = push.through_group(meeting.rendezvous.backend, meeting.rendezvous.key, timeout_s)
        asking = asyncio.create_task(client.push_weights(told, timeout_s=timeout_s), name="push")
        sending = _on_daemon_thread(partial(meeting.broadcast, push))
        try:
            both: set[asyncio.Future[Any]] = {asking, sending}
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
            update = await asking
            if update.already_applied:
                await self.close()  # it waits for a replica that wants nothing
            else:
                await sending
            return update
        finally:
            asking.cancel()


def _pieces(push: WeightPush) -> Iterator[torch.Tensor]:
    for part in push.payload:
        start = 0
        for size in piece_sizes(len(part)):
            piece = part[start : start + size]
            # A tensor takes no memory that must not be written to: the blocks of a delta, which are small.
            yield torch.frombuffer(bytearray(piece) if piece.readonly else piece, dtype=torch.uint8)
            start += size


def _on_daemon_thread(work: Callable[[], None]) -> asyncio.Future[None]:
    """Start work that nobody need wait for, not even the end of the process."""
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
