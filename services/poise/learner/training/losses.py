"""The losses (DESIGN §2), each a pure function of tensors with its formula.

A policy loss gives every token a loss and says where it clipped; `policy_losses` puts together what is configured; the
loss of a mini-batch is then the weighted sum of its tokens' losses by `token_weights` over `denominator`: both count
the whole mini-batch, so that any split of it into micro-batches, or over processes, gives the same gradient.

Shapes: N response tokens, those of one rollout side by side; R rollouts.
Letters: ρ = exp(logprob − old), the ratio; A the advantage; ε the clips; C the cap; T the tokens of a rollout; V a
value, R what it is to be.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from poise.learner.config import LossConfig

_MAX_LOG_RATIO = 20.0
"""e^20 is beyond every bound; infinity would make the gradient of what is bounded NaN."""


@dataclass(frozen=True, slots=True)
class PolicyLosses:
    """One value a token."""

    losses_N: torch.Tensor
    """Carries the gradient."""
    low_N: torch.Tensor
    """Whether the lower clip of the ratio decided."""
    high_N: torch.Tensor
    """Whether the upper clip decided."""
    dual_N: torch.Tensor
    """Whether the dual clip decided."""


@dataclass(frozen=True, slots=True)
class TokenLosses:
    """What the tokens of a micro-batch cost, and why."""

    policy: PolicyLosses
    losses_N: torch.Tensor
    """The policy's, times the importance weight, plus the pull to the reference. Carries the gradient."""
    truncated_N: torch.Tensor
    """Whether the importance weight was truncated."""
    reference_kl_N: torch.Tensor | None
    """KL to the reference; None where there is none."""


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

    `old` is what ratios are taken to: the learner before the step's first update, or the engine, whose own
    log-probabilities `rollout` are (w is then 1).
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
    """GSPO: one ratio for a rollout, clipped as a whole.

    L = max(−A·s, −A·clip(s, 1 − ε_low, 1 + ε_high)) with s = exp(mean over the rollout's tokens of (logprob − old)).

    Each token holds the value of s and the gradient s·∇logprob of its own, so that the mean over a rollout's tokens
    (`sequence_mean`) has the gradient of the formula. The bounds are those of a mean: hundreds of times narrower.
    """
    differences_N = logprobs_N - old_logprobs_N
    of_rollout_N = torch.repeat_interleave(lengths_R)
    sums_R = torch.zeros_like(lengths_R, dtype=differences_N.dtype).index_add(0, of_rollout_N, differences_N.detach())
    means_N = (sums_R / lengths_R)[of_rollout_N]
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
    """Return each token's weight min(exp(old − rollout), C), held constant, and whether the cap took hold."""
    weights_N = torch.exp(old_logprobs_N - rollout_logprobs_N).detach()
    return weights_N.clamp(max=cap), weights_N > cap


def kl_to_reference(logprobs_N: torch.Tensor, reference_logprobs_N: torch.Tensor) -> torch.Tensor:
    """Return the k3 estimate of KL(policy || reference) at each token: exp(d) − d − 1 with d = reference − logprob.

    Never negative, and unbiased over tokens that the policy sampled.
    """
    differences_N = reference_logprobs_N - logprobs_N
    return _ratios(differences_N) - differences_N - 1


def value_losses(
    values_N: torch.Tensor, old_values_N: torch.Tensor, returns_N: torch.Tensor, clip: float | None
) -> torch.Tensor:
    """Return the critic's loss at each token: L = ½·max((V − R)², (V_old + clip(V − V_old, −c, c) − R)²).

    Without a clip c, ½·(V − R)². A token whose value has already moved by more than c away from V_old, and towards R,
    has no gradient.
    """
    losses_N = (values_N - returns_N).square()
    if clip is not None:
        near_N = old_values_N + (values_N - old_values_N).clamp(-clip, clip)
        losses_N = torch.maximum(losses_N, (near_N - returns_N).square())
    return losses_N / 2


def token_weights(lengths_R: torch.Tensor, config: LossConfig) -> torch.Tensor:
    """Return what each token's loss counts, [N]; over `denominator`, that is

    `token_mean`: the mean over all tokens; `sequence_mean`: the mean over rollouts of the means over their tokens;
    `constant`: the mean over rollouts of the sums over their tokens / `normaliser_tokens` (Dr. GRPO: a token counts
    the same in a long rollout as in a short one, and in a batch of long ones as in one of short ones).
    """
    if config.aggregation == "sequence_mean":
        counts_R = 1 / lengths_R
    elif config.aggregation == "constant":
        counts_R = torch.full_like(lengths_R, 1 / config.normaliser_tokens, dtype=torch.get_default_dtype())
    else:
        counts_R = torch.ones_like(lengths_R, dtype=torch.get_default_dtype())
    return torch.repeat_interleave(counts_R, lengths_R)


def denominator(num_tokens: int, num_rollouts: int, config: LossConfig) -> int:
    """Return by what the weighted sum of a mini-batch's losses is divided."""
    return num_tokens if config.aggregation == "token_mean" else num_rollouts


def _ratios(log_ratios_N: torch.Tensor) -> torch.Tensor:
    return torch.exp(log_ratios_N.clamp(max=_MAX_LOG_RATIO))


def _clipped(
    ratios_N: torch.Tensor, advantages_N: torch.Tensor, config: LossConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return max(−A·ρ, −A·clip(ρ)), and where the lower and the upper bound decided."""
    plain_N = -advantages_N * ratios_N
    bounded_N = -advantages_N * ratios_N.clamp(1 - config.clip_low, 1 + config.clip_high)
    decided_N = bounded_N > plain_N
    return torch.maximum(plain_N, bounded_N), decided_N & (advantages_N < 0), decided_N & (advantages_N > 0)
