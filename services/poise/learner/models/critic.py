"""The critic: a model like the policy that values the state before each token, and what the policy learns from it.

Owns its parameters and their optimizer. It is loaded from the policy's model, without the head over the vocabulary and
with one of a single value, 0 at first. Parameters are float32 whatever it computes in. With several processes all of
them must make the same calls.

Shapes: N response tokens of a packed row; d the model's width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from poise.algorithms.gae import Doubles, explained_variance, gae, whitened
from poise.learner.config import CriticConfig, LearnerConfig
from poise.learner.distributed.fsdp import shard
from poise.learner.distributed.process_group import World
from poise.learner.models.backbone import load_model, predictor_states
from poise.learner.models.forward_check import checked_forward
from poise.learner.training.flops import ModelSize, model_size
from poise.learner.training.gradients import Before, Lesson
from poise.learner.training.losses import value_losses
from poise.learner.training.minibatch import MiniBatch
from poise.learner.training.optimizer import Optimizer
from poise.learner.training.packing import PackedRow
from poise.runtime.models.decoder import decoder_layers, decoder_of


class ValueModel(torch.nn.Module):
    """Values of a packed row: one module, so that all parameters are at hand while it runs."""

    def __init__(self, decoder: Any, width: int, dtype: torch.dtype, *, packed: bool) -> None:
        super().__init__()
        self.decoder = decoder
        self.head = torch.nn.Linear(width, 1)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)
        self._dtype = dtype
        self._packed = packed

    def forward(self, row: PackedRow) -> torch.Tensor:
        """Return the value of the state before each response token, [N], float32."""
        states_Nd = predictor_states(self.decoder, row, self._dtype, packed=self._packed)
        values_N: torch.Tensor = self.head(states_Nd.float())[:, 0]
        return values_N


@dataclass(frozen=True, slots=True)
class _Estimate:
    """What comes of a row's values, [N] each."""

    advantages_N: Doubles
    returns_N: Doubles
    values_N: Doubles


class Critic:
    """The model that is trained to value."""

    def __init__(self, config: LearnerConfig, settings: CriticConfig, world: World) -> None:
        """Load it.

        Raises:
            Unusable: it cannot be loaded, or cannot be trained.
        """
        self._settings = settings
        self._world = world
        model = load_model(config).to(world.device)
        mode = checked_forward(model, config).mode  # of its decoder too: its head reads the same states
        size = model_size(model)
        self.size: ModelSize | None = None if size is None else dataclasses.replace(size, head_flops=0)
        """What its arithmetic depends on; the head's is next to nothing."""
        width, dtype = model.get_output_embeddings().weight.shape[1], getattr(torch, config.dtype)
        self.values = ValueModel(decoder_of(model), width, dtype, packed=mode.packed)
        """Of a packed row: the forward pass."""
        self.values.to(world.device).train(config.dropout)
        if world.is_sharded:
            shard(self.values, decoder_layers(model), world)
        own = {"learning_rate": settings.learning_rate, "warmup_updates": settings.warmup_updates}
        self.optimizer = Optimizer(self.values.named_parameters(), config.optimizer.model_copy(update=own), world)

    @torch.no_grad()
    def teach(self, mini_batches: Sequence[MiniBatch]) -> tuple[list[list[Lesson]], float]:
        """Value all tokens of a step before its first update; return a lesson for each row, and the explained variance.

        Where advantages are whitened, they are over the tokens of all mini-batches and processes.
        """
        estimates = [[self._estimate(row) for row in each.rows] for each in mini_batches]
        own = [one for each, made in zip(mini_batches, estimates, strict=True) for one in each.own(made)]
        mean, variance = self._moments([one.advantages_N for one in own])
        _, of_returns = self._moments([one.returns_N for one in own])
        _, of_residuals = self._moments([one.returns_N - one.values_N for one in own])
        whiten = self._settings.whiten_advantages

        def lesson(estimate: _Estimate) -> Lesson:
            advantages_N = estimate.advantages_N
            return Lesson(
                self._tensor(whitened(advantages_N, mean, variance) if whiten else advantages_N),
                self._tensor(estimate.values_N),
                self._tensor(estimate.returns_N),
            )

        lessons = [[lesson(estimate) for estimate in made] for made in estimates]
        return lessons, explained_variance(of_residuals, of_returns)

    def accumulate(self, mini_batch: MiniBatch, before: Sequence[Before]) -> float:
        """Make the gradient of a mini-batch's mean loss over response tokens; return the sum over this process's."""
        losses = []
        for row, known, counts in zip(mini_batch.rows, before, mini_batch.counts, strict=True):
            lesson = known.lesson
            assert lesson is not None  # noqa: S101 (taught)
            loss = value_losses(self.values(row), lesson.values_N, lesson.returns_N, self._settings.value_clip).sum()
            (loss / (mini_batch.num_targets if counts else math.inf)).backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        return sum(map(float, mini_batch.own(losses)))

    def _estimate(self, row: PackedRow) -> _Estimate:
        values_N, rewards_R = (tensor.cpu().numpy().astype(np.float64) for tensor in (self.values(row), row.rewards_R))
        settings = self._settings
        estimates = gae(values_N, rewards_R, row.lengths_R.cpu().numpy(), settings.discount, settings.gae_lambda)
        return _Estimate(*estimates, values_N)

    def _moments(self, arrays: Sequence[Doubles]) -> tuple[float, float]:
        """Return mean and variance over the tokens of all processes."""
        own = np.concatenate([*arrays, np.zeros(0)])
        count, total = self._sum([own.size, own.sum()])
        mean = total / count
        (squares,) = self._sum([np.square(own - mean).sum()])
        return mean, squares / count

    def _sum(self, values: Sequence[float]) -> list[float]:
        sums = self._world.sum(torch.tensor(values, dtype=torch.float64, device=self._world.device))
        return [float(value) for value in sums]

    def _tensor(self, array: Doubles) -> torch.Tensor:
        return torch.from_numpy(array).to(self._world.device, torch.float32)
