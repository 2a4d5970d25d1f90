"""Estimates the variance of a mini-batch's gradient from its two halves.

Let g = Σ_i G_i be the gradient of a mini-batch of m prompt groups, and let the G_i be independent draws with mean μ and
covariance Σ, so that tr Cov(g) = m·tr Σ. Let g_A be the sum over m1 of the groups and g_B that over the other m2. Then
g_A/m1 and g_B/m2 are independent, with the same mean and covariances Σ/m1 and Σ/m2, so that

    E‖g_A/m1 − g_B/m2‖² = (1/m1 + 1/m2)·tr Σ = m / (m1·m2)·tr Σ,

and m1·m2·‖g_A/m1 − g_B/m2‖² is an unbiased estimate of tr Cov(g). The estimate treats the loss's denominator and shared
baselines as constants, although both make the groups slightly dependent.

The estimate needs a copy of the gradient, or of each rank's shard: 4 bytes per trained parameter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from poise.learner.distributed.fsdp import local_shard
from poise.learner.distributed.process_group import World


class HalfGradient:
    """A copy of the gradient of the first m1 groups, compared with that of all groups later."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter], num_groups: tuple[int, int]) -> None:
        self._parameters = parameters
        self._num_groups = num_groups
        self._first = [None if p.grad is None else local_shard(p.grad).clone() for p in parameters]

    @torch.no_grad()
    def variance(self, world: World) -> float:
        """Return the estimate. Call it once, when the gradient covers the whole mini-batch: it frees the copy."""
        first, self._first = self._first, []
        m1, m2 = self._num_groups
        squares = torch.zeros((), dtype=torch.float64, device=world.device)
        for parameter, g_a in zip(self._parameters, first, strict=True):
            if parameter.grad is None:
                continue
            g = local_shard(parameter.grad)
            # g_A/m1 − g_B/m2, where g_B = g − g_A
            difference = g / -m2 if g_a is None else g_a.mul_(1 / m1 + 1 / m2).sub_(g, alpha=1 / m2)
            squares += torch.linalg.vector_norm(difference).double().square()
        return m1 * m2 * float(world.sum(squares))
