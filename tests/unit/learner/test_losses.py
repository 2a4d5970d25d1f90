import math

import numpy as np
import pytest
import torch

from poise.learner.config import LossConfig
from poise.learner.losses import policy_losses

CONFIG = LossConfig(clip_low=0.2, clip_high=0.28, dual_clip=3.0, importance_cap=2.0)


def reference(logprob: float, old: float, rollout: float, advantage: float, c: LossConfig) -> tuple[float, bool, bool]:
    """One token, in plain numbers: loss, clipped, truncated."""
    ratio = math.exp(logprob - old)
    weight = math.exp(old - rollout)
    bounded = min(max(ratio, 1 - c.clip_low), 1 + c.clip_high)
    loss, clipped = -advantage * ratio, False
    if -advantage * bounded > loss:
        loss, clipped = -advantage * bounded, True
    if advantage < 0 and loss > -advantage * c.dual_clip:
        loss, clipped = -advantage * c.dual_clip, True
    return loss * min(weight, c.importance_cap), clipped, weight > c.importance_cap


def tokens(n: int = 400) -> list[torch.Tensor]:
    """Log-probabilities by learner, old learner and engine, and advantages: ratios from 0.1 to 10."""
    random = np.random.default_rng(0)
    old = random.normal(-3, 1, n)
    values = old + random.uniform(-2.3, 2.3, n), old, old + random.uniform(-1.2, 1.2, n), random.normal(0, 1, n)
    return [torch.from_numpy(value) for value in values]


def test_every_token_has_the_loss_of_the_formula():
    inputs = tokens()
    got = policy_losses(*inputs, CONFIG)
    wanted = [reference(*map(float, token), CONFIG) for token in zip(*inputs, strict=True)]
    np.testing.assert_allclose(got.losses_N, [loss for loss, _, _ in wanted], rtol=1e-12)
    assert got.clipped_N.tolist() == [clipped for _, clipped, _ in wanted]
    assert got.truncated_N.tolist() == [truncated for _, _, truncated in wanted]
    assert {True, False} == set(got.clipped_N.tolist()) == set(got.truncated_N.tolist())


def test_the_gradient_is_that_of_the_formula_with_the_importance_weight_held_constant():
    logprobs, old, rollout, advantages = tokens()
    logprobs.requires_grad_()
    policy_losses(logprobs, old, rollout, advantages, CONFIG).losses_N.sum().backward()
    step = 1e-6
    for i in range(len(old)):
        inputs = [float(x) for x in (old[i], rollout[i], advantages[i])]
        up, down = (reference(float(logprobs.detach()[i]) + d, *inputs, CONFIG)[0] for d in (step, -step))
        assert float(logprobs.grad[i]) == pytest.approx((up - down) / (2 * step), rel=1e-5, abs=1e-8)


def test_on_policy_the_gradient_is_that_of_reinforce_with_a_truncated_weight():
    _, old, rollout, advantages = tokens()
    logprobs = old.clone().requires_grad_()
    policy_losses(logprobs, old, rollout, advantages, CONFIG).losses_N.sum().backward()
    np.testing.assert_allclose(logprobs.grad, -advantages * torch.exp(old - rollout).clamp(max=2), rtol=1e-12)


def test_no_gradient_goes_through_the_importance_weight():
    logprobs, old, rollout, advantages = tokens()
    for one in (logprobs, old, rollout):
        one.requires_grad_()
    policy_losses(logprobs, old, rollout, advantages, CONFIG).losses_N.sum().backward()
    np.testing.assert_array_equal(old.grad, -logprobs.grad)  # the ratio's alone
    assert rollout.grad is None


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "has_gradient"),
    [
        (1.0, 1.28, -1.28, True),  # the higher clip: up to 1.28
        (1.0, 1.29, -1.28, False),
        (1.0, 0.5, -0.5, True),  # a good token that became rarer is not clipped
        (-1.0, 0.81, 0.81, True),
        (-1.0, 0.79, 0.8, False),
        (-1.0, 2.9, 2.9, True),  # a bad token that became likelier is not clipped, until
        (-1.0, 3.1, 3.0, False),  # the dual clip
        (1.0, 3.1, -1.28, False),  # which is for bad ones alone
    ],
)
def test_the_clips_take_hold_at_their_bounds(advantage, ratio, loss, has_gradient):
    logprobs = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    losses = policy_losses(logprobs, zero, zero, torch.tensor([advantage], dtype=torch.float64), CONFIG).losses_N
    losses.sum().backward()
    assert losses.item() == pytest.approx(loss)
    assert bool(logprobs.grad != 0) == has_gradient


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("difference", [100.0, -100.0])
def test_a_token_whose_probability_leapt_costs_a_finite_loss_and_gradient(advantage, difference):
    logprobs = torch.tensor([difference - 200], requires_grad=True)
    old = torch.tensor([-200.0])
    losses = policy_losses(logprobs, old, old, torch.tensor([advantage]), CONFIG).losses_N
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert torch.isfinite(logprobs.grad).all()
