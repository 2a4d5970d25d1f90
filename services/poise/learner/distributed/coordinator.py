"""Several processes that train as one: the first sends commands, and the others follow.

The first process serves gRPC and owns the state folder. It uses a `LeadingTrainer` as it would a `Trainer`. The others
run `follow`. Commands travel as numbers, protobuf and JSON.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from enum import IntEnum, auto
from typing import Any

import torch
import torch.distributed as dist

from poise.errors import PoiseError
from poise.learner.config import LearnerConfig
from poise.learner.distributed.follower_admin import answering_probes
from poise.learner.distributed.process_group import World, leave, local_rank, rank, world_size
from poise.learner.distributed.rank_health import RankEvents, RankLost
from poise.learner.training.trainer import Trainer
from poise.runtime.cli.exit_status import FAILED, INTERRUPTED, OK, exit_reason, exit_status
from poise_client.codec import dump_batch, load_batch
from poise_client.types import Batch, StepMetrics, TrainingRollout, WeightArray

logger = logging.getLogger(__name__)


class _Command(IntEnum):
    PING = auto()
    TRAIN = auto()
    WEIGHTS = auto()
    STATE = auto()
    RESTORE = auto()
    SAVE = auto()
    STOP = auto()


def make_trainer(config: LearnerConfig) -> Trainer:
    """Return a trainer for one process, or for the first of those that torchrun started."""
    return Trainer(config) if world_size() == 1 else LeadingTrainer(config)


class LeadingTrainer(Trainer):
    """The first process's trainer: sends every call that all must make to the others before making it.

    Each call raises `RankLost` where another process is lost in its midst.
    """

    def __init__(self, config: LearnerConfig) -> None:
        super().__init__(config)
        self._events: RankEvents | None = None
        self._failure = ""
        """Why the others can take no further command; empty while they can."""

    def load(self) -> World:
        """See `Trainer`; the others load without a command."""
        try:
            world = super().load()
        except Exception as error:
            self._failure = f"the first process cannot load: {error}"
            raise
        if self.health is not None and self._events is not None:
            self.health.listen(self._events)
        logger.info("training in %d processes", world.size)
        return world

    def train(self, rollouts: Sequence[TrainingRollout], temperature: float) -> StepMetrics:
        """See `Trainer`."""
        with self._together(_Command.TRAIN, dump_batch(Batch("told", "told", 0, tuple(rollouts), temperature))):
            return super().train(rollouts, temperature)

    def weights(self) -> dict[str, WeightArray]:
        """See `Trainer`."""
        with self._together(_Command.WEIGHTS):
            return super().weights()

    def state(self) -> tuple[dict[str, torch.Tensor], int]:
        """See `Trainer`."""
        with self._together(_Command.STATE):
            return super().state()

    def restore(self, tensors: Mapping[str, torch.Tensor], num_updates: int) -> None:
        """See `Trainer`."""
        # The others hold no values, but must know names and shapes: they take their parts one by one.
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        about = {"num_updates": num_updates, "shapes": shapes, "steps": _steps(tensors)}
        with self._together(_Command.RESTORE, json.dumps(about).encode()):
            super().restore(tensors, num_updates)

    def save_model(self, folder: str) -> None:
        """See `Trainer`."""
        with self._together(_Command.SAVE, folder.encode()):
            super().save_model(folder)

    def listen(self, events: RankEvents) -> None:
        """See `Trainer`."""
        self._events = events

    def ping(self) -> None:
        """See `Trainer`."""
        with self._together(_Command.PING):
            pass

    def close(self) -> None:
        """See `Trainer`; the others end: with status 0, or 1 where a call failed."""
        if (health := self.health) is not None:
            if self._failure:
                health.fail(self._failure)
            health.stop()
            if not self._failure:
                with contextlib.suppress(RuntimeError):  # lost meanwhile: nothing is left to stop
                    self._send(_Command.STOP)
        super().close()

    @contextlib.contextmanager
    def _together(self, command: _Command, content: bytes = b"") -> Iterator[None]:
        try:
            try:
                self._send(command, content)
            except RuntimeError as error:
                raise RankLost(f"another process takes no commands: {error}") from error
            yield
        except Exception as error:
            reason = error if self.health is None else self.health.explain(error)
            self._failure = f"the first process failed: {reason}"
            if reason is error:
                raise
            raise reason from error

    def _send(self, command: _Command, content: bytes = b"") -> None:
        dist.broadcast(torch.tensor([command, len(content)]), 0, group=self._world.commands)
        if content:
            dist.broadcast(torch.frombuffer(bytearray(content), dtype=torch.uint8), 0, group=self._world.control)


def follow(config: LearnerConfig) -> int:
    """Do what the first process commands until it says stop or a process is lost; return the exit status.

    At SIGTERM it asks the first process to finish its work and to end all of them; a second one exits at once.
    """
    signals = _Signals()
    with contextlib.ExitStack() as stack:
        # The first process of a host answers for its others.
        loaded = stack.enter_context(answering_probes(config.admin)) if local_rank() == 0 else None
        trainer = Trainer(config)
        try:
            world = trainer.load()
        except Exception as error:
            if isinstance(error, PoiseError):
                logger.error("process %d cannot start: %s", rank(), exit_reason(error))
            else:
                logger.exception("process %d cannot start", rank())
            if trainer.health is not None:
                trainer.health.fail(f"process {rank()} cannot start: {exit_reason(error)}")
                trainer.health.stop()
            return exit_status(error)
        signals.ask_before_leaving(world)
        if loaded is not None:
            loaded.set()
        logger.info("process %d of %d follows", world.rank, world.size)
        return _follow(trainer, world)


def _follow(trainer: Trainer, world: World) -> int:
    health = world.health
    assert health is not None  # noqa: S101 (a follower is not alone)
    command = _Command.PING
    try:
        while command is not _Command.STOP:
            command, content = _receive(world)
            _obey(trainer, command, content)
    except Exception as error:
        reason = health.explain(error)
        if reason is error:
            logger.exception("process %d failed at the command %s", world.rank, command.name)
            health.fail(f"process {world.rank} failed: {exit_reason(error)}", in_training=command is _Command.TRAIN)
        else:
            logger.error("%s", reason)
        return FAILED
    finally:
        health.stop()
    leave()
    return OK


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
        case _Command.PING | _Command.STOP:
            pass


def _receive(world: World) -> tuple[_Command, bytes]:
    header = torch.zeros(2, dtype=torch.int64)
    dist.broadcast(header, 0, group=world.commands)
    command, num_bytes = header.tolist()
    content = torch.zeros(num_bytes, dtype=torch.uint8)
    if num_bytes:
        dist.broadcast(content, 0, group=world.control)
    return _Command(command), content.numpy().tobytes()


class _Signals:
    """Takes SIGTERM and SIGINT in a thread: the main thread of a follower waits in calls that no signal ends."""

    def __init__(self) -> None:
        self._numbers = {signal.SIGTERM, signal.SIGINT}
        self._world: World | None = None
        signal.pthread_sigmask(signal.SIG_BLOCK, self._numbers)
        threading.Thread(target=self._run, name="signals", daemon=True).start()

    def ask_before_leaving(self, world: World) -> None:
        """From now on ask the first process; until then a signal ends this process at once."""
        self._world = world

    def _run(self) -> None:
        signal.sigwait(self._numbers)
        if self._world is not None and self._world.health is not None:
            logger.info("asked to end: the first process finishes its work, then all end; a second signal ends at once")
            self._world.health.leave()
            signal.sigwait(self._numbers)
        os._exit(INTERRUPTED)


def _steps(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return the optimizer's counters, which are the same in all processes."""
    return {name: float(tensor) for name, tensor in tensors.items() if name.startswith(("step.", "critic.step."))}
