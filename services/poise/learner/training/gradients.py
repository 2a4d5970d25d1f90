"""The gradient of a mini-batch, row by row, and what its tokens add up to.

The loss is the weighted sum over all tokens of the mini-batch by one denominator, so however its rollouts are spread
over rows, and rows over processes, the gradients add up to the same.

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
"""Log-probabilities, with a gradient, and entropies of a row's targets, [N] each."""


@dataclass(frozen=True, slots=True)
class Sums:
    """Over tokens, but for the loss."""

    loss: float = 0.0
    """That of the mini-batch, times its denominator."""
    num_tokens: float = 0.0
    entropy: float = 0.0
    clip_low: float = 0.0
    clip_high: float = 0.0
    dual_clip: float = 0.0
    truncated: float = 0.0
    reference_kl: float = 0.0
    num_compared: float = 0.0
    """Tokens of which it is known what the policy said before the step."""
    mismatch_logprob: float = 0.0
    """Over those."""
    mismatch_kl: float = 0.0
    """Over those."""
    value_loss: float = 0.0
    """That of the critic."""

    def to_tensor(self, device: torch.device) -> torch.Tensor:
        """Return all in order, float64."""
        return torch.tensor(astuple(self), dtype=torch.float64, device=device)

    @staticmethod
    def from_tensor(values: torch.Tensor) -> Sums:
        """Undo `to_tensor`."""
        return Sums(*values.tolist())

    def __add__(self, other: Sums) -> Sums:
        """Add up."""
        return Sums(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True, slots=True)
class Lesson:
    """What a critic made of a row's tokens, [N] each."""

    advantages_N: torch.Tensor
    """For the policy."""
    values_N: torch.Tensor
    returns_N: torch.Tensor
    """What the values should have been."""


@dataclass(frozen=True, slots=True)
class Before:
    """What is known of a row's tokens before the step's first update; None where it is not."""

    policy_logprobs_N: torch.Tensor | None = None
    """By the policy."""
    reference_logprobs_N: torch.Tensor | None = None
    """By the model that training started from."""
    lesson: Lesson | None = None
    """By the critic; without one, rollouts bring their advantages."""


def accumulate(
    forward: Forward, row: PackedRow, before: Before, *, first: bool, denominator: float, config: LossConfig
) -> Sums:
    """Add a row's share to the gradients of the parameters.

    Args:
        forward: the policy.
        row: the row.
        before: what was computed of it earlier.
        first: whether the policy has not been updated in this step: what it says now is then what it said before.
        denominator: by which the losses of the whole mini-batch are divided.
        config: the loss.
    """
    logprobs_N, entropies_N = forward(row)
    policy_N = logprobs_N.detach() if first else before.policy_logprobs_N
    old_N = row.rollout_logprobs_N if config.old_logprobs == "rollout" else policy_N
    assert old_N is not None  # noqa: S101 (computed before, where it is needed)
    tokens = policy_losses(
        logprobs_N,
        old_N,
        row.rollout_logprobs_N,
        before.reference_logprobs_N,
        row.advantages_N if before.lesson is None else before.lesson.advantages_N,
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
) -> Sums:
    num_tokens = torch.tensor(float(row.targets_N.numel()), device=loss.device)
    nothing = torch.zeros_like(num_tokens)
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
    # One transfer from the device, not twelve.
    return Sums.from_tensor(torch.stack([values.get(field.name, nothing).double() for field in fields(Sums)]))
