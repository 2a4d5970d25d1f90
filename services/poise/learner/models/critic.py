"""The critic: a model like the policy that predicts the value of the state before each token.

It is the policy's model with a value head, initialized to 0, instead of the language model head. It has its own
optimizer. Parameters are always float32. Every rank must make the same calls.

Shapes: N response tokens of a packed row; d the model's width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
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
from poise.learner.training.gradients import CriticTargets, PreviousOutputs
from poise.learner.training.losses import value_losses
from poise.learner.training.minibatch import MiniBatch
from poise.learner.training.optimizer import Optimizer
from poise.learner.training.packing import PackedRow
from poise.runtime.models.decoder import decoder_layers, decoder_of


class ValueModel(torch.nn.Module):
    """Decoder and value head as one module, which FSDP needs to gather parameters for the whole forward pass."""

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


class Critic:
    """The value model and its optimizer."""

    def __init__(self, config: LearnerConfig, settings: CriticConfig, world: World) -> None:
        """Load the model.

        Raises:
            Unusable: it cannot be loaded, or cannot be trained.
        """
        self._settings = settings
        self._world = world
        model = load_model(config).to(world.device)
        mode = checked_forward(model, config).mode  # valid for the critic too, which reads the same decoder states
        size = model_size(model)
        self.size: ModelSize | None = None if size is None else dataclasses.replace(size, head_flops=0)
        """FLOPs without the head's, which are negligible."""
        width, dtype = model.get_output_embeddings().weight.shape[1], getattr(torch, config.dtype)
        self.values = ValueModel(decoder_of(model), width, dtype, packed=mode.packed)
        """The forward pass of a packed row."""
        self.values.to(world.device).train(config.dropout)
        if world.is_sharded:
            shard(self.values, decoder_layers(model), world)
        own = {"learning_rate": settings.learning_rate, "warmup_updates": settings.warmup_updates}
        self.optimizer = Optimizer(self.values.named_parameters(), config.optimizer.model_copy(update=own), world)

    @torch.no_grad()
    def targets(self, mini_batches: Sequence[MiniBatch]) -> tuple[list[list[CriticTargets]], float]:
        """Return each row's targets from before the step, and the explained variance of the returns.

        Advantages are whitened over the tokens of all mini-batches and ranks, if `whiten_advantages` is set.
        """
        estimates = [[self._estimate(row) for row in mini_batch.rows] for mini_batch in mini_batches]
        own = [
            each
            for mini_batch, rows in zip(mini_batches, estimates, strict=True)
            for each in mini_batch.without_padding(rows)
        ]
        mean, variance = self._moments([advantages_N for advantages_N, _, _ in own])
        _, return_variance = self._moments([returns_N for _, _, returns_N in own])
        _, residual_variance = self._moments([returns_N - values_N for _, values_N, returns_N in own])
        whiten = self._settings.whiten_advantages

        def targets(advantages_N: Doubles, values_N: Doubles, returns_N: Doubles) -> CriticTargets:
            advantages_N = whitened(advantages_N, mean, variance) if whiten else advantages_N
            return CriticTargets(*map(self._tensor, (advantages_N, values_N, returns_N)))

        of_rows = [[targets(*each) for each in rows] for rows in estimates]
        return of_rows, explained_variance(residual_variance, return_variance)

    def backward(self, mini_batch: MiniBatch, previous: Sequence[PreviousOutputs]) -> float:
        """Compute the gradient of the mean loss over response tokens; return the sum over this rank's tokens."""
        losses = []
        for row, outputs, counts in zip(mini_batch.rows, previous, mini_batch.counts, strict=True):
            targets = outputs.critic
            assert targets is not None  # noqa: S101 (computed before the step)
            loss = value_losses(self.values(row), targets.values_N, targets.returns_N, self._settings.value_clip).sum()
            (loss / (mini_batch.num_targets if counts else math.inf)).backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        return sum(map(float, mini_batch.without_padding(losses)))

    def _estimate(self, row: PackedRow) -> tuple[Doubles, Doubles, Doubles]:
        """Return advantages, values and returns of a row's tokens, [N] each."""
        values_N, rewards_R = (tensor.cpu().numpy().astype(np.float64) for tensor in (self.values(row), row.rewards_R))
        lengths_R = row.lengths_R.cpu().numpy()
        advantages_N, returns_N = gae(
            values_N, rewards_R, lengths_R, self._settings.discount, self._settings.gae_lambda
        )
        return advantages_N, values_N, returns_N

    def _moments(self, arrays: Sequence[Doubles]) -> tuple[float, float]:
        """Return mean and variance over the tokens of all ranks."""
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
