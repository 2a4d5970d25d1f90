"""Several processes that train as one: the first is told what to do, and tells the others.

The first, which speaks gRPC and owns the state folder, uses a `LeadingTrainer` as it would a `Trainer`. The others do
nothing but what it tells them: `follow`. What is told travels as bytes: numbers, protobuf and JSON.
"""

from __future__ import annotations

import contextlib
import json
import logging
import signal
from collections.abc import Mapping, Sequence
from enum import IntEnum, auto
from typing import Any

import torch
import torch.distributed as dist

from poise.learner.config import LearnerConfig
from poise.learner.follower_probes import answering_probes
from poise.learner.trainer import Trainer
from poise.learner.world import World, leave, local_rank, world_size
from poise_client.codec import dump_batch, load_batch
from poise_client.types import Batch, StepMetrics, TrainingRollout, WeightArray

logger = logging.getLogger(__name__)


class _Command(IntEnum):
    TRAIN = auto()
    WEIGHTS = auto()
    STATE = auto()
    RESTORE = auto()
    SAVE = auto()
    STOP = auto()


def make_trainer(config: LearnerConfig) -> Trainer:
    """Return what trains: alone, or with the processes that torchrun started beside this one."""
    return Trainer(config) if world_size() == 1 else LeadingTrainer(config)


class LeadingTrainer(Trainer):
    """The first process's trainer: every call that all must make is told to the others before it is made."""

    def load(self) -> World:
        """See `Trainer`; the others load by themselves."""
        world = super().load()
        logger.info("training in %d processes", world.size)
        return world

    def train(self, rollouts: Sequence[TrainingRollout], temperature: float) -> StepMetrics:
        """See `Trainer`."""
        self._tell(_Command.TRAIN, dump_batch(Batch("told", "told", 0, tuple(rollouts), temperature)))
        return super().train(rollouts, temperature)

    def weights(self) -> dict[str, WeightArray]:
        """See `Trainer`."""
        self._tell(_Command.WEIGHTS)
        return super().weights()

    def state(self) -> tuple[dict[str, torch.Tensor], int]:
        """See `Trainer`."""
        self._tell(_Command.STATE)
        return super().state()

    def restore(self, tensors: Mapping[str, torch.Tensor], num_updates: int) -> None:
        """See `Trainer`."""
        # The others hold no values, but must know what there is: they take their parts of it one by one.
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        about = {"num_updates": num_updates, "shapes": shapes, "steps": _steps(tensors)}
        self._tell(_Command.RESTORE, json.dumps(about).encode())
        super().restore(tensors, num_updates)

    def save_model(self, folder: str) -> None:
        """See `Trainer`."""
        self._tell(_Command.SAVE, folder.encode())
        super().save_model(folder)

    def close(self) -> None:
        """See `Trainer`; the others end."""
        if self._world.size > 1:
            self._tell(_Command.STOP)
        super().close()

    def _tell(self, command: _Command, content: bytes = b"") -> None:
        dist.broadcast(torch.tensor([command, len(content)]), 0, group=self._world.control)
        if content:
            dist.broadcast(torch.frombuffer(bytearray(content), dtype=torch.uint8), 0, group=self._world.control)


def follow(config: LearnerConfig) -> int:
    """Do what the first process tells until it says stop, or is gone; return the exit status."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # the first process drains, and needs the others for it
    with contextlib.ExitStack() as stack:
        # The first process of a host speaks for its others.
        loaded = stack.enter_context(answering_probes(config.admin)) if local_rank() == 0 else None
        trainer = Trainer(config)
        world = trainer.load()
        if loaded is not None:
            loaded.set()
        logger.info("process %d of %d follows", world.rank, world.size)
        return _follow(trainer, world)


def _follow(trainer: Trainer, world: World) -> int:
    while True:
        try:
            command, content = _hear(world)
        except RuntimeError as error:
            logger.error("the first process is gone: %s", error)
            return 1
        if command is _Command.STOP:
            leave()
            return 0
        _obey(trainer, command, content)


def _obey(trainer: Trainer, command: _Command, content: bytes) -> None:
    match command:
        case _Command.TRAIN:
            batch = load_batch(content)
            trainer.train(batch.rollouts, batch.temperature)
        case _Command.WEIGHTS:
            trainer.weights()
        case _Command.STATE:
            trainer.state()
        case _Command.RESTORE:
            about = json.loads(content)
            tensors = {name: torch.zeros(shape) for name, shape in about["shapes"].items()}
            tensors |= {name: torch.tensor(step) for name, step in about["steps"].items()}
            trainer.restore(tensors, about["num_updates"])
        case _Command.SAVE:
            trainer.save_model(content.decode())


def _hear(world: World) -> tuple[_Command, bytes]:
    header = torch.zeros(2, dtype=torch.int64)
    dist.broadcast(header, 0, group=world.control)
    command, num_bytes = header.tolist()
    content = torch.zeros(num_bytes, dtype=torch.uint8)
    if num_bytes:
        dist.broadcast(content, 0, group=world.control)
    return _Command(command), content.numpy().tobytes()


def _steps(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return the optimiser's counters, which are the same in all processes."""
    return {name: float(tensor) for name, tensor in tensors.items() if name.startswith(("step.", "critic.step."))}
