"""Training with several ranks: rank 0 sends commands, and the followers execute them.

Rank 0 serves gRPC and uses a `RankZeroTrainer` like any `Trainer`. The other ranks run `follow`. Commands are sent as
integers, protobuf and JSON.
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
from poise.learner.distributed.follower_admin import serve_probes
from poise.learner.distributed.process_group import World, leave, local_rank, rank, world_size
from poise.learner.distributed.rank_health import RankEvents, RankLost
from poise.learner.training.trainer import Trainer
from poise.runtime.cli.exit_status import FAILED, INTERRUPTED, OK, exit_reason, exit_status
from poise_client.codec import dump_batch, load_batch
from poise_client.types import Batch, Rollout, StepMetrics, WeightArray

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
    """Return a trainer for a single process, or for rank 0 under torchrun."""
    return Trainer(config) if world_size() == 1 else RankZeroTrainer(config)


class RankZeroTrainer(Trainer):
    """Sends every call that all ranks must make to the followers before making it.

    Each call raises `RankLost` if a follower is lost during it.
    """

    def __init__(self, config: LearnerConfig) -> None:
        super().__init__(config)
        self._events: RankEvents | None = None
        self._failure = ""
        """Why the followers accept no more commands; empty while they do."""

    def load(self) -> World:
        """See `Trainer`. Followers load without a command."""
        try:
            world = super().load()
        except Exception as error:
            self._failure = f"rank 0 cannot load: {error}"
            raise
        if self.health is not None and self._events is not None:
            self.health.listen(self._events)
        logger.info("training with %d ranks", world.size)
        return world

    def train(self, rollouts: Sequence[Rollout], temperature: float) -> StepMetrics:
        """See `Trainer`."""
        batch = Batch("rank-0", "command", 0, tuple(rollouts), temperature)
        with self._command(_Command.TRAIN, dump_batch(batch)):
            return super().train(rollouts, temperature)

    def weights(self) -> dict[str, WeightArray]:
        """See `Trainer`."""
        with self._command(_Command.WEIGHTS):
            return super().weights()

    def state(self) -> tuple[dict[str, torch.Tensor], int]:
        """See `Trainer`."""
        with self._command(_Command.STATE):
            return super().state()

    def restore(self, tensors: Mapping[str, torch.Tensor], num_updates: int) -> None:
        """See `Trainer`."""
        # Followers have no values but need names and shapes, because they receive their shards one by one.
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        arguments = {"num_updates": num_updates, "shapes": shapes, "steps": _adam_steps(tensors)}
        with self._command(_Command.RESTORE, json.dumps(arguments).encode()):
            super().restore(tensors, num_updates)

    def save_model(self, folder: str) -> None:
        """See `Trainer`."""
        with self._command(_Command.SAVE, folder.encode()):
            super().save_model(folder)

    def listen(self, events: RankEvents) -> None:
        """See `Trainer`."""
        self._events = events

    def ping(self) -> None:
        """See `Trainer`."""
        with self._command(_Command.PING):
            pass

    def close(self) -> None:
        """See `Trainer`. The followers exit too: with status 0, or 1 if a call has failed."""
        if (health := self.health) is not None:
            if self._failure:
                health.fail(self._failure)
            health.stop()
            if not self._failure:
                with contextlib.suppress(RuntimeError):  # a lost follower needs no stop
                    self._send(_Command.STOP)
        super().close()

    @contextlib.contextmanager
    def _command(self, command: _Command, arguments: bytes = b"") -> Iterator[None]:
        """Send a command, which the block executes on this rank. Convert errors caused by a lost rank to `RankLost`."""
        try:
            try:
                self._send(command, arguments)
            except RuntimeError as error:
                raise RankLost(f"a follower does not accept commands: {error}") from error
            yield
        except Exception as error:
            reason = error if self.health is None else self.health.explain(error)
            self._failure = f"rank 0 failed: {reason}"
            if reason is error:
                raise
            raise reason from error

    def _send(self, command: _Command, arguments: bytes = b"") -> None:
        dist.broadcast(torch.tensor([command, len(arguments)]), 0, group=self._world.commands)
        if arguments:
            dist.broadcast(torch.frombuffer(bytearray(arguments), dtype=torch.uint8), 0, group=self._world.control)


def follow(config: LearnerConfig) -> int:
    """Execute rank 0's commands until it sends STOP or a rank is lost; return the exit status.

    A first SIGTERM asks rank 0 to finish its work and to end all ranks; a second one exits at once.
    """
    signals = _Signals()
    with contextlib.ExitStack() as stack:
        # One process of a host serves the probes for all of them.
        loaded = stack.enter_context(serve_probes(config.admin)) if local_rank() == 0 else None
        trainer = Trainer(config)
        try:
            world = trainer.load()
        except Exception as error:
            if isinstance(error, PoiseError):
                logger.error("rank %d cannot start: %s", rank(), exit_reason(error))
            else:
                logger.exception("rank %d cannot start", rank())
            if trainer.health is not None:
                trainer.health.fail(f"rank {rank()} cannot start: {exit_reason(error)}")
                trainer.health.stop()
            return exit_status(error)
        signals.drain_through_rank_zero(world)
        if loaded is not None:
            loaded.set()
        logger.info("rank %d of %d follows rank 0", world.rank, world.size)
        return _follow(trainer, world)


def _follow(trainer: Trainer, world: World) -> int:
    health = world.health
    assert health is not None  # noqa: S101 (there is a rank 0)
    command = _Command.PING
    try:
        while command is not _Command.STOP:
            command, arguments = _receive(world)
            _execute(trainer, command, arguments)
    except Exception as error:
        reason = health.explain(error)
        if reason is error:
            logger.exception("rank %d failed at command %s", world.rank, command.name)
            health.fail(f"rank {world.rank} failed: {exit_reason(error)}", in_training=command is _Command.TRAIN)
        else:
            logger.error("%s", reason)
        return FAILED
    finally:
        health.stop()
    leave()
    return OK


def _execute(trainer: Trainer, command: _Command, arguments: bytes) -> None:
    match command:
        case _Command.TRAIN:
            batch = load_batch(arguments)
            trainer.train(batch.rollouts, batch.temperature)
        case _Command.WEIGHTS:
            trainer.weights()
        case _Command.STATE:
            trainer.state()
        case _Command.RESTORE:
            named = json.loads(arguments)
            tensors = {name: torch.zeros(shape) for name, shape in named["shapes"].items()}
            tensors |= {name: torch.tensor(step) for name, step in named["steps"].items()}
            trainer.restore(tensors, named["num_updates"])
        case _Command.SAVE:
            trainer.save_model(arguments.decode())
        case _Command.PING | _Command.STOP:
            pass


def _receive(world: World) -> tuple[_Command, bytes]:
    header = torch.zeros(2, dtype=torch.int64)
    dist.broadcast(header, 0, group=world.commands)
    command, num_bytes = header.tolist()
    arguments = torch.zeros(num_bytes, dtype=torch.uint8)
    if num_bytes:
        dist.broadcast(arguments, 0, group=world.control)
    return _Command(command), arguments.numpy().tobytes()


class _Signals:
    """Handles SIGTERM and SIGINT on a thread: signals do not interrupt the calls that block a follower's main
    thread."""

    def __init__(self) -> None:
        self._numbers = {signal.SIGTERM, signal.SIGINT}
        self._world: World | None = None
        signal.pthread_sigmask(signal.SIG_BLOCK, self._numbers)
        threading.Thread(target=self._run, name="signals", daemon=True).start()

    def drain_through_rank_zero(self, world: World) -> None:
        """On a signal after this call, ask rank 0 to drain. A signal before this call exits at once."""
        self._world = world

    def _run(self) -> None:
        signal.sigwait(self._numbers)
        if self._world is not None and self._world.health is not None:
            logger.info("stopping: rank 0 finishes its work, then all ranks exit; a second signal exits at once")
            self._world.health.leave()
            signal.sigwait(self._numbers)
        os._exit(INTERRUPTED)


def _adam_steps(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return AdamW's step counters, which are the same on all ranks."""
    return {name: float(tensor) for name, tensor in tensors.items() if name.startswith(("step.", "critic.step."))}
