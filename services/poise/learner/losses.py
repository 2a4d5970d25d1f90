"""The policy loss (DESIGN §2; PPO clip with DAPO's clip-higher, dual clip, and truncated importance sampling).

Pure functions on tensors. Shapes: N response tokens of a mini-batch, in any order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from poise.learner.config import LossConfig


@dataclass(frozen=True, slots=True)
class TokenLosses:
    """One value a token."""

    losses_N: torch.Tensor
    """Carries the gradient."""
    clipped_N: torch.Tensor
    """Whether the clipped ratio, or the dual clip, decided."""
    truncated_N: torch.Tensor
    """Whether the importance weight was truncated."""


def policy_losses(
    logprobs_N: torch.Tensor,
    old_logprobs_N: torch.Tensor,
    rollout_logprobs_N: torch.Tensor,
    advantages_N: torch.Tensor,
    config: LossConfig,
) -> TokenLosses:
    """Return the loss of each token.

    With ratio ρ = exp(logprob − old) and weight w = min(exp(old − rollout), C), held constant:

        L = max(−A·ρ, −A·clip(ρ, 1 − clip_low, 1 + clip_high));  for A < 0: min(L, −A·dual_clip);  times w.

    `old` is the learner before the step's first update, `rollout` what the engine said when it sampled.
    """
    # e^20 is beyond every bound; infinity would make the gradient of what is bounded NaN.
    ratios = torch.exp((logprobs_N - old_logprobs_N).clamp(max=20))
    plain = -advantages_N * ratios
    bounded = -advantages_N * ratios.clamp(1 - config.clip_low, 1 + config.clip_high)
    losses = torch.maximum(plain, bounded)
    ceiling = -advantages_N * config.dual_clip
    dual = (advantages_N < 0) & (losses > ceiling)
    losses = torch.where(dual, ceiling, losses)
    importance = torch.exp(old_logprobs_N - rollout_logprobs_N).detach()
    return TokenLosses(
        losses_N=losses * importance.clamp(max=config.importance_cap),
        clipped_N=(bounded > plain) | dual,
        truncated_N=importance > config.importance_cap,
    )
