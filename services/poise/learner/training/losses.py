"""The losses of docs/design.md, section 2, as pure functions of tensors.

`policy_losses` returns the configured loss of every token. The loss of a mini-batch is the sum of these losses,
weighted by `token_weights`, divided by `denominator`. Both refer to the whole mini-batch, so the gradient does not
depend on how it is split into rows or over ranks.

Shapes: N response tokens, those of one rollout side by side; R rollouts.
Symbols: ρ = exp(logprob − old), the ratio; A the advantage; ε the clips; C the cap; V a value, R its return.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from poise.learner.config import LossConfig

_MAX_LOG_RATIO = 20.0
"""e^20 exceeds every clip; infinity would make clipped gradients NaN."""


@dataclass(frozen=True, slots=True)
class PolicyLosses:
    """The policy loss of each token."""

    losses_N: torch.Tensor
    """The losses, with a gradient."""
    low_N: torch.Tensor
    """Whether the ratio's lower clip applied."""
    high_N: torch.Tensor
    """Whether the upper clip applied."""
    dual_N: torch.Tensor
    """Whether the dual clip applied."""


@dataclass(frozen=True, slots=True)
class TokenLosses:
    """The total loss of each token, with its parts."""

    policy: PolicyLosses
    losses_N: torch.Tensor
    """Policy loss × importance weight + KL term, with a gradient."""
    truncated_N: torch.Tensor
    """Whether the importance weight was truncated."""
    reference_kl_N: torch.Tensor | None
    """KL to the reference model; None without one."""


def policy_losses(
    logprobs_N: torch.Tensor,
    old_logprobs_N: torch.Tensor,
    rollout_logprobs_N: torch.Tensor,
    reference_logprobs_N: torch.Tensor | None,
    advantages_N: torch.Tensor,
    lengths_R: torch.Tensor,
    config: LossConfig,
) -> TokenLosses:
    """Return the loss of each token: w · policy loss + β · KL to the reference, w as in `truncated_importance`.

    Ratios are relative to `old_logprobs_N`: those of the learner before the step's first update, or
    `rollout_logprobs_N` of the engine itself, which makes w 1.
    """
    if config.policy == "gspo":
        policy = gspo(logprobs_N, old_logprobs_N, advantages_N, lengths_R, config)
    elif config.policy == "cispo":
        policy = cispo(logprobs_N, old_logprobs_N, advantages_N, config)
    else:
        policy = ppo(logprobs_N, old_logprobs_N, advantages_N, config)
    weights_N, truncated_N = truncated_importance(old_logprobs_N, rollout_logprobs_N, config.importance_cap)
    losses_N, kl_N = policy.losses_N * weights_N, None
    if reference_logprobs_N is not None:
        kl_N = kl_to_reference(logprobs_N, reference_logprobs_N)
        losses_N = losses_N + config.kl_coefficient * kl_N
    return TokenLosses(policy, losses_N, truncated_N, None if kl_N is None else kl_N.detach())


def ppo(
    logprobs_N: torch.Tensor, old_logprobs_N: torch.Tensor, advantages_N: torch.Tensor, config: LossConfig
) -> PolicyLosses:
    """PPO with DAPO's clip-higher and a dual clip.

    L = max(−A·ρ, −A·clip(ρ, 1 − ε_low, 1 + ε_high)), and for A < 0 at most −A·c.
    """
    ratios_N = _ratios(logprobs_N - old_logprobs_N)
    losses_N, low_N, high_N = _clipped(ratios_N, advantages_N, config)
    ceiling_N = -advantages_N * config.dual_clip
    dual_N = (advantages_N < 0) & (losses_N > ceiling_N)
    return PolicyLosses(torch.where(dual_N, ceiling_N, losses_N), low_N, high_N, dual_N)


def gspo(
    logprobs_N: torch.Tensor,
    old_logprobs_N: torch.Tensor,
    advantages_N: torch.Tensor,
    lengths_R: torch.Tensor,
    config: LossConfig,
) -> PolicyLosses:
    """GSPO: one clipped ratio for each rollout.

    L = max(−A·s, −A·clip(s, 1 − ε_low, 1 + ε_high)) with s = exp(mean over the rollout's tokens of (logprob − old)).

    Each token has the value of s and the gradient s·∇logprob of its own log-probability, so that the mean over a
    rollout's tokens (`sequence_mean`) has the formula's gradient. Its clips are hundreds of times narrower than PPO's.
    """
    differences_N = logprobs_N - old_logprobs_N
    rollout_N = torch.repeat_interleave(lengths_R)
    sums_R = torch.zeros_like(lengths_R, dtype=differences_N.dtype).index_add(0, rollout_N, differences_N.detach())
    means_N = (sums_R / lengths_R)[rollout_N]
    ratios_N = _ratios(means_N + (logprobs_N - logprobs_N.detach()))
    losses_N, low_N, high_N = _clipped(ratios_N, advantages_N, config)
    return PolicyLosses(losses_N, low_N, high_N, torch.zeros_like(low_N))


def cispo(
    logprobs_N: torch.Tensor, old_logprobs_N: torch.Tensor, advantages_N: torch.Tensor, config: LossConfig
) -> PolicyLosses:
    """CISPO: REINFORCE weighted by a clipped ratio, so that no token loses its gradient.

    L = −sg(clip(ρ, 1 − ε_low, 1 + ε_high)) · A · logprob, where sg stops the gradient.
    """
    ratios_N = _ratios(logprobs_N - old_logprobs_N).detach()
    weights_N = ratios_N.clamp(1 - config.clip_low, 1 + config.clip_high)
    low_N, high_N = ratios_N < weights_N, ratios_N > weights_N
    return PolicyLosses(-weights_N * advantages_N * logprobs_N, low_N, high_N, torch.zeros_like(low_N))


def truncated_importance(
    old_logprobs_N: torch.Tensor, rollout_logprobs_N: torch.Tensor, cap: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each token's weight min(exp(old − rollout), C), without gradient, and whether the cap applied."""
    weights_N = torch.exp(old_logprobs_N - rollout_logprobs_N).detach()
    return weights_N.clamp(max=cap), weights_N > cap


def kl_to_reference(logprobs_N: torch.Tensor, reference_logprobs_N: torch.Tensor) -> torch.Tensor:
    """Return the k3 estimate of KL(policy || reference) at each token: exp(d) − d − 1 with d = reference − logprob.

    It is never negative, and unbiased over tokens that the policy sampled.
    """
    differences_N = reference_logprobs_N - logprobs_N
    return _ratios(differences_N) - differences_N - 1


def value_losses(
    values_N: torch.Tensor, old_values_N: torch.Tensor, returns_N: torch.Tensor, clip: float | None
) -> torch.Tensor:
    """Return the critic's loss at each token: L = ½·max((V − R)², (V_old + clip(V − V_old, −c, c) − R)²).

    Without a clip c, ½·(V − R)². A token whose value has moved from V_old towards R by more than c has no gradient.
    """
    losses_N = (values_N - returns_N).square()
    if clip is not None:
        near_N = old_values_N + (values_N - old_values_N).clamp(-clip, clip)
        losses_N = torch.maximum(losses_N, (near_N - returns_N).square())
    return losses_N / 2


def token_weights(lengths_R: torch.Tensor, config: LossConfig) -> torch.Tensor:
    """Return the weight of each token's loss, [N]. After division by `denominator`, the weighted sum is

    `token_mean`: the mean over all tokens; `sequence_mean`: the mean over rollouts of the means over their tokens;
    `constant`: the mean over rollouts of the sums over their tokens / `normalizer_tokens` (Dr. GRPO: a token's
    weight does not depend on the length of its rollout, or of others in the batch).
    """
    if config.aggregation == "sequence_mean":
        weights_R = 1 / lengths_R
    elif config.aggregation == "constant":
        weights_R = torch.full_like(lengths_R, 1 / config.normalizer_tokens, dtype=torch.get_default_dtype())
    else:
        weights_R = torch.ones_like(lengths_R, dtype=torch.get_default_dtype())
    return torch.repeat_interleave(weights_R, lengths_R)


def denominator(num_tokens: int, num_rollouts: int, config: LossConfig) -> int:
    """Return the number that divides the weighted sum of a mini-batch's losses."""
    return num_tokens if config.aggregation == "token_mean" else num_rollouts


def _ratios(log_ratios_N: torch.Tensor) -> torch.Tensor:
    return torch.exp(log_ratios_N.clamp(max=_MAX_LOG_RATIO))


def _clipped(
    ratios_N: torch.Tensor, advantages_N: torch.Tensor, config: LossConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return max(−A·ρ, −A·clip(ρ)), and where the lower and the upper clip applied."""
    plain_N = -advantages_N * ratios_N
    bounded_N = -advantages_N * ratios_N.clamp(1 - config.clip_low, 1 + config.clip_high)
    clipped_N = bounded_N > plain_N
    return torch.maximum(plain_N, bounded_N), clipped_N & (advantages_N < 0), clipped_N & (advantages_N > 0)
