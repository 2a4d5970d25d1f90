"""The forward and backward pass of one row, and the sums over its tokens.

Every loss is divided by the same denominator, that of the whole mini-batch. So the total gradient does not depend on
how rollouts are spread over rows, or rows over ranks.

Shapes: N response tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass, fields

import torch

from poise.learner.config import LossConfig
from poise.learner.training.losses import TokenLosses, policy_losses, token_weights
from poise.learner.training.packing import PackedRow

Forward = Callable[[PackedRow], tuple[torch.Tensor, torch.Tensor]]
"""Returns log-probabilities (with a gradient) and entropies of a row's targets, [N] each."""


@dataclass(frozen=True, slots=True)
class TokenSums:
    """Sums over the tokens of a mini-batch or a part of it."""

    loss: float = 0.0
    """The weighted sum, before division by the denominator."""
    num_tokens: float = 0.0
    entropy: float = 0.0
    clip_low: float = 0.0
    clip_high: float = 0.0
    dual_clip: float = 0.0
    truncated: float = 0.0
    reference_kl: float = 0.0
    num_compared: float = 0.0
    """Tokens whose log-probability from before the step is known. The mismatches are sums over these."""
    mismatch_logprob: float = 0.0
    mismatch_kl: float = 0.0
    value_loss: float = 0.0
    """The critic's loss."""

    def to_tensor(self, device: torch.device) -> torch.Tensor:
        """Return the fields in order, float64."""
        return torch.tensor(astuple(self), dtype=torch.float64, device=device)

    @staticmethod
    def from_tensor(values: torch.Tensor) -> TokenSums:
        """Undo `to_tensor`."""
        return TokenSums(*values.tolist())

    def __add__(self, other: TokenSums) -> TokenSums:
        """Add field by field."""
        return TokenSums(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True, slots=True)
class CriticTargets:
    """The critic's outputs for a row before the step's first update, [N] each."""

    advantages_N: torch.Tensor
    """Advantages for the policy."""
    values_N: torch.Tensor
    returns_N: torch.Tensor
    """Targets of the values."""


@dataclass(frozen=True, slots=True)
class PreviousOutputs:
    """Outputs for a row from before the step's first update; None if they are not needed."""

    policy_logprobs_N: torch.Tensor | None = None
    reference_logprobs_N: torch.Tensor | None = None
    """Log-probabilities under the model that training started from."""
    critic: CriticTargets | None = None
    """None without a critic: the advantages then come with the rollouts."""


def accumulate_gradient(
    forward: Forward, row: PackedRow, previous: PreviousOutputs, *, first: bool, denominator: float, config: LossConfig
) -> TokenSums:
    """Add a row's gradient to the parameters' gradients; return the sums over its tokens.

    Args:
        forward: the policy.
        row: the row.
        previous: outputs from before the step.
        first: whether this is the step's first update. The policy's outputs are then those from before the step.
        denominator: divides the losses of the whole mini-batch.
        config: the loss.
    """
    logprobs_N, entropies_N = forward(row)
    policy_N = logprobs_N.detach() if first else previous.policy_logprobs_N
    old_N = row.rollout_logprobs_N if config.old_logprobs == "rollout" else policy_N
    assert old_N is not None  # noqa: S101 (with `recompute`, computed before the step)
    tokens = policy_losses(
        logprobs_N,
        old_N,
        row.rollout_logprobs_N,
        previous.reference_logprobs_N,
        row.advantages_N if previous.critic is None else previous.critic.advantages_N,
        row.lengths_R,
        config,
    )
    loss = (token_weights(row.lengths_R, config) * tokens.losses_N).sum()
    (loss / denominator).backward()  # type: ignore[no-untyped-call]
    return _sums(row, loss.detach(), entropies_N, tokens, policy_N)


def _sums(
    row: PackedRow,
    loss: torch.Tensor,
    entropies_N: torch.Tensor,
    tokens: TokenLosses,
    policy_N: torch.Tensor | None,
) -> TokenSums:
    num_tokens = torch.tensor(float(row.targets_N.numel()), device=loss.device)
    zero = torch.zeros_like(num_tokens)
    values = {
        "loss": loss,
        "num_tokens": num_tokens,
        "entropy": entropies_N.sum(),
        "clip_low": tokens.policy.low_N.sum(),
        "clip_high": tokens.policy.high_N.sum(),
        "dual_clip": tokens.policy.dual_N.sum(),
        "truncated": tokens.truncated_N.sum(),
    }
    if tokens.reference_kl_N is not None:
        values["reference_kl"] = tokens.reference_kl_N.sum()
    if policy_N is not None:
        differences_N = policy_N - row.rollout_logprobs_N
        values["num_compared"] = num_tokens
        values["mismatch_logprob"] = differences_N.abs().sum()
        values["mismatch_kl"] = (differences_N.exp() - 1 - differences_N).sum()
    # One transfer from the device instead of twelve.
    return TokenSums.from_tensor(torch.stack([values.get(field.name, zero).double() for field in fields(TokenSums)]))
