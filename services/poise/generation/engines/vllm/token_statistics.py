"""Computes log-probabilities, entropies and sums of squared probabilities from logits.

Every pass over the vocabulary costs throughput, so this computes one softmax, and a product of two vectors for each
statistic. It needs no logarithm of each probability.

Shapes: R requests of a step, V vocabulary.
"""

from __future__ import annotations

import torch

_LOWEST = -1e30
"""Replaces logits of −∞, whose product with a probability of 0 is not a number."""


def scaled_logits(logits_RV: torch.Tensor, temperature_R: torch.Tensor | None, greedy_below: float) -> torch.Tensor:
    """Return a float32 copy of the logits divided by the temperature; by 1 if that is below `greedy_below`."""
    if temperature_R is None:
        return logits_RV.to(torch.float32, copy=True)
    return logits_RV.float() / torch.where(temperature_R < greedy_below, 1.0, temperature_R)[:, None]


class TokenStatistics:
    """The distributions of one step's tokens."""

    def __init__(self, logits_RV: torch.Tensor) -> None:
        """Overwrites the logits."""
        # Relative to the largest logit, products lose no precision by cancellation.
        self._logits_RV = logits_RV.sub_(logits_RV.amax(-1, keepdim=True)).clamp_(min=_LOWEST)
        self._probs_RV = self._logits_RV.softmax(-1)
        self._log_normalizers_R = -self._probs_RV.amax(-1).log()

    def logprobs(self, token_ids_R: torch.Tensor) -> torch.Tensor:
        """Return the log-probability of one token of each distribution, [R]."""
        return self._logits_RV.gather(1, token_ids_R.long()[:, None])[:, 0] - self._log_normalizers_R

    def entropies(self) -> torch.Tensor:
        """Return the entropies in nats, [R]."""
        return self._log_normalizers_R - _dot(self._probs_RV, self._logits_RV)

    def sum_squared_probs(self) -> torch.Tensor:
        """Return Σ_v π(v)², [R]."""
        return _dot(self._probs_RV, self._probs_RV)


def _dot(left_RV: torch.Tensor, right_RV: torch.Tensor) -> torch.Tensor:
    products_R: torch.Tensor = torch.linalg.vecdot(left_RV, right_RV)  # allocates no [R, V], unlike `(a * b).sum(-1)`
    return products_R
