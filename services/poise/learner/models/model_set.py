"""The models of a training: the policy, its critic where it has one, and the model that the loss may pull it to.

Owns what a mini-batch does to them: gradients, and a step of policy and critic, of both or of neither. Knows no batches
and counts nothing. With several processes all of them must make the same calls.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from poise.learner.config import LearnerConfig
from poise.learner.distributed.process_group import World
from poise.learner.models.critic import Critic
from poise.learner.models.forward import PackedForward
from poise.learner.models.policy import Policy, load_reference
from poise.learner.training.gradient_variance import HalfGradient
from poise.learner.training.gradients import Before, Sums, accumulate
from poise.learner.training.minibatch import MiniBatch
from poise.learner.training.optimizer import Optimizer
from poise.learner.training.packing import PackedRow

logger = logging.getLogger(__name__)

_CRITIC = "critic."
"""Begins the names of its tensors in the state."""


@dataclass(frozen=True, slots=True)
class Update:
    """What became of a mini-batch."""

    sums: Sums
    """Of all processes."""
    norm: float
    """Of the policy's gradient, before clipping."""
    critic_norm: float
    """0 without a critic."""
    variance: float | None
    """Of the policy's gradient, before clipping; None where it is not measured."""

    @property
    def is_finite(self) -> bool:
        """Whether it changed anything: losses and gradients that are not finite change nothing."""
        return all(map(math.isfinite, (self.sums.loss, self.norm, self.sums.value_loss, self.critic_norm)))


class Models:
    """Of one process: where there are several, its part of them."""

    def __init__(self, config: LearnerConfig, world: World) -> None:
        """Load them.

        Raises:
            Unusable: they cannot be loaded, or cannot be trained.
        """
        self._config = config
        self._world = world
        self.policy = Policy(config, world)
        self.optimizer = Optimizer(self.policy.trained(), config.optimizer, world)
        self.critic: Critic | None = None if config.critic is None else Critic(config, config.critic, world)
        self._reference: PackedForward | None = None
        """The model that training started from; None where the loss does not look at it."""
        if config.loss.kl_coefficient:
            self._reference = load_reference(config, world)

    def before(self, mini_batches: Sequence[MiniBatch], temperature: float) -> tuple[list[list[Before]], float]:
        """Return what is to be known of the rows of a step before its first update, and the explained variance.

        That is 0 without a critic.
        """
        # The policy before the step is that of the first mini-batch's only forward pass.
        recompute = self._config.loss.old_logprobs == "recompute"
        known = [self._ask(each.rows, temperature, policy=recompute and i > 0) for i, each in enumerate(mini_batches)]
        if self.critic is None:
            return known, 0.0
        lessons, explained = self.critic.teach(mini_batches)
        taught = [
            [dataclasses.replace(before, lesson=lesson) for before, lesson in zip(*of_rows, strict=True)]
            for of_rows in zip(known, lessons, strict=True)
        ]
        return taught, explained

    def update(
        self, mini_batch: MiniBatch, before: Sequence[Before], temperature: float, number: int, *, first: bool
    ) -> Update:
        """Take one step on the loss of a mini-batch, and one on the critic's: the update of this number.

        `first` says that it is the first of its batch. Nothing changes unless all of it is finite.
        """
        optimizers = [self.optimizer] if self.critic is None else [self.optimizer, self.critic.optimizer]
        for optimizer in optimizers:
            optimizer.clear()
        sums, variance = self._accumulate(mini_batch, before, temperature, first=first)
        if self.critic is not None:
            sums += Sums(value_loss=self.critic.accumulate(mini_batch, before))
        sums = Sums.from_tensor(self._world.sum(sums.to_tensor(self._world.device)))
        norm, *critic_norm = [optimizer.clip() for optimizer in optimizers]
        update = Update(sums, norm, sum(critic_norm), variance)
        if update.is_finite:
            for optimizer in optimizers:
                optimizer.step(number)
            return update
        logger.error(
            "a mini-batch changes nothing: its loss is %s, the norm of its gradient %s%s; look at its %s",
            sums.loss,
            norm,
            f", those of its critic {sums.value_loss} and {critic_norm[0]}" if critic_norm else "",
            "rewards" if critic_norm else "advantages",
        )
        for optimizer in optimizers:
            optimizer.clear()
        return update

    def state(self) -> dict[str, torch.Tensor]:
        """Return all that training goes on from, by name. Not copies; empty on all processes but the first."""
        tensors = self.optimizer.state()
        if self.critic is not None:
            tensors |= {f"{_CRITIC}{name}": tensor for name, tensor in self.critic.optimizer.state().items()}
        return tensors

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over what `state` gave.

        Raises:
            KeyError: a parameter is missing. The models are then half restored.
        """
        self.optimizer.restore(tensors)
        if self.critic is not None:
            own = {name.removeprefix(_CRITIC): each for name, each in tensors.items() if name.startswith(_CRITIC)}
            self.critic.optimizer.restore(own)

    def _accumulate(
        self, mini_batch: MiniBatch, before: Sequence[Before], temperature: float, *, first: bool
    ) -> tuple[Sums, float | None]:
        """Make the gradient of the policy; return this process's sums, and the variance where it is measured."""
        halves, half, sums = mini_batch.halves, None, Sums()
        for index, (row, known, counts) in enumerate(zip(mini_batch.rows, before, mini_batch.counts, strict=True)):
            if halves is not None and index == halves.num_rows:
                half = HalfGradient(self.optimizer.parameters, halves.num_groups)
            of_row = accumulate(
                lambda row: self.policy.logprobs(row, temperature),
                row,
                known,
                first=first,
                denominator=mini_batch.denominator if counts else math.inf,
                config=self._config.loss,
            )
            sums += of_row if counts else Sums()
        return sums, None if half is None else half.variance(self._world)

    @torch.no_grad()
    def _ask(self, rows: Sequence[PackedRow], temperature: float, *, policy: bool) -> list[Before]:
        """Ask the policy, if so told, and the reference, if there is one, of the tokens of a mini-batch."""
        reference = self._reference
        return [
            Before(
                self.policy.logprobs(row, temperature)[0] if policy else None,
                reference(row, temperature)[0] if reference is not None else None,
            )
            for row in rows
        ]


def holds_critic(names: Iterable[str]) -> bool:
    """Whether a critic is among the tensors of a state, by their names."""
    return any(name.startswith(_CRITIC) for name in names)
