"""The variance of a mini-batch's gradient, measured from two halves of it.

Let g = Σ_i G_i be the gradient of a mini-batch of m prompt groups, and let the G_i be independent draws with mean μ and
covariance Σ: then tr Cov(g) = m·tr Σ. With g_A the sum over m1 of the groups and g_B that over the other m2, g_A/m1 and
g_B/m2 are independent, of the same mean and of covariances Σ/m1 and Σ/m2, so that

    E‖g_A/m1 − g_B/m2‖² = (1/m1 + 1/m2)·tr Σ = m / (m1·m2)·tr Σ,

and m1·m2·‖g_A/m1 − g_B/m2‖² is an unbiased estimate of tr Cov(g). What the loss divides by is taken for a constant, and
so are baselines that groups of a batch share: strictly, both tie the groups together a little.

It takes a copy of the gradient, or with several processes of each one's part: 4 bytes a trained parameter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from poise.learner.distributed.fsdp import own_part
from poise.learner.distributed.process_group import World


class HalfGradient:
    """A copy of the gradient after the first m1 groups, kept until those of the other m2 are added."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter], num_groups: tuple[int, int]) -> None:
        self._parameters = parameters
        self._num_groups = num_groups
        self._first = [None if p.grad is None else own_part(p.grad).clone() for p in parameters]

    @torch.no_grad()
    def variance(self, world: World) -> float:
        """Return the estimate, now that the gradient is that of the whole mini-batch; let go of the copy."""
        first, self._first = self._first, []
        m1, m2 = self._num_groups
        squares = torch.zeros((), dtype=torch.float64, device=world.device)
        for parameter, g_a in zip(self._parameters, first, strict=True):
            if parameter.grad is None:
                continue
            g = own_part(parameter.grad)
            # g_A/m1 − g_B/m2, where g_B = g − g_A
            difference = g / -m2 if g_a is None else g_a.mul_(1 / m1 + 1 / m2).sub_(g, alpha=1 / m2)
            squares += torch.linalg.vector_norm(difference).double().square()
        return m1 * m2 * float(world.sum(squares))
