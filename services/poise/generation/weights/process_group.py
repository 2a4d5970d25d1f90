"""Receives the body of a push through a group of processes into a file: beside the model, so in vLLM's worker, too.

It does so on a thread, for sampling to go on; whoever started it asks for the outcome.
"""

from __future__ import annotations

import logging
import threading

import torch

from poise.generation.weights.payload import Body
from poise.runtime.network.broadcast_group import Group, Rendezvous, join, piece_sizes

logger = logging.getLogger(__name__)


class GroupReceiver:
    """Receives one body at a time. Members that have met keep their group for the next."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._met: Rendezvous | None = None
        self._group: Group | None = None
        self._abandoned = False
        self._outcome: str | None = ""

    def start(self, body: Body) -> None:
        """Begin to receive."""
        if self._outcome is None:  # a communicator that waits for a sender which is gone cannot be woken
            raise RuntimeError("another body is being received")
        self._outcome, self._abandoned = None, False
        threading.Thread(target=self._run, args=(body,), name="group-receiver", daemon=True).start()

    def outcome(self) -> str | None:
        """Return what went wrong; empty when all came; None while it comes."""
        return self._outcome

    def abandon(self) -> None:
        """Give up what is being received, and the group."""
        self._abandoned = True
        group, self._group, self._met = self._group, None, None
        if group is not None:
            group.abort()

    def _run(self, body: Body) -> None:
        try:
            self._receive(body, self._meet(body))
            self._outcome = ""
        except Exception as error:  # whatever a communicator raises
            logger.warning("a body did not come through its group: %s", error)
            self.abandon()
            self._outcome = str(error) or type(error).__name__

    def _meet(self, body: Body) -> Group:
        if self._group is not None and self._met == body.rendezvous:
            return self._group
        if self._group is not None:
            self._group.abort()
        self._group = group = join(body.rendezvous, self._device, body.timeout_s)
        self._met = body.rendezvous
        if self._abandoned:  # in the meantime
            raise RuntimeError("it was given up")
        return group

    def _receive(self, body: Body, group: Group) -> None:
        with body.path.open("wb") as file:
            file.write(body.header)
            for part in body.part_bytes:
                for size in piece_sizes(part):
                    piece = torch.empty(size, dtype=torch.uint8, device=self._device)
                    group.broadcast(piece)
                    file.write(piece.cpu().numpy().data)
