"""Every loss against its formula in plain numbers, and its gradient against finite differences of the same numbers."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from poise.learner.config import LossConfig
from poise.learner.training.losses import (
    TokenLosses,
    denominator,
    kl_to_reference,
    policy_losses,
    token_weights,
    value_losses,
)

BOUNDS = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0, "importance_cap": 2.0}
LENGTHS = (1, 7, 30, 2, 60)
N = sum(LENGTHS)
SETTINGS = {
    "ppo": LossConfig(**BOUNDS),
    "gspo": LossConfig(policy="gspo", **BOUNDS | {"clip_low": 0.03, "clip_high": 0.04}),
    "cispo": LossConfig(policy="cispo", **BOUNDS),
    "cispo without a lower bound": LossConfig(policy="cispo", **BOUNDS | {"clip_low": 1.0, "clip_high": 2.0}),
}
AGGREGATIONS = ("token_mean", "sequence_mean", "constant")


class Case:
    """Log-probabilities by learner, old learner, engine and reference, and advantages, one a rollout.

    Ratios go from 0.1 to 10, so that every bound takes hold somewhere.
    """

    def __init__(self, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.old = random.normal(-3, 1, N)
        shift = np.repeat(random.uniform(-0.1, 0.1, len(LENGTHS)), LENGTHS)
        self.logprobs = self.old + shift + random.uniform(-2.2, 2.2, N) * np.repeat(np.arange(5) > 0, LENGTHS)
        self.rollout = self.old + random.uniform(-1.2, 1.2, N)
        self.reference = self.logprobs + random.uniform(-2, 2, N)
        self.advantages = np.repeat(np.array([1.3, -0.7, 0.4, -1.1, -0.6]), LENGTHS)

    def losses(
        self, config: LossConfig, logprobs: torch.Tensor | None = None, *, reference: bool = True
    ) -> TokenLosses:
        logprobs = torch.from_numpy(self.logprobs) if logprobs is None else logprobs
        old, rollout, pulled_to, advantages = (
            torch.from_numpy(x) for x in (self.old, self.rollout, self.reference, self.advantages)
        )
        return policy_losses(
            logprobs, old, rollout, pulled_to if reference else None, advantages, torch.tensor(LENGTHS), config
        )


def ppo(c: LossConfig, logprob: float, old: float, advantage: float) -> tuple[float, str]:
    """Return one token's loss and the clip that applied."""
    ratio = math.exp(logprob - old)
    if advantage > 0 and ratio > 1 + c.clip_high:
        return -advantage * (1 + c.clip_high), "high"
    if advantage < 0 and ratio < 1 - c.clip_low:
        return -advantage * (1 - c.clip_low), "low"
    if advantage < 0 and ratio > c.dual_clip:
        return -advantage * c.dual_clip, "dual"
    return -advantage * ratio, ""


def gspo(c: LossConfig, mean_difference: float, advantage: float) -> tuple[float, str]:
    """One rollout."""
    ratio = math.exp(mean_difference)
    if advantage > 0 and ratio > 1 + c.clip_high:
        return -advantage * (1 + c.clip_high), "high"
    if advantage < 0 and ratio < 1 - c.clip_low:
        return -advantage * (1 - c.clip_low), "low"
    return -advantage * ratio, ""


def reference_of(case: Case, config: LossConfig, logprobs: np.ndarray) -> tuple[list[float], list[str]]:
    """Policy losses of all tokens by the formulas, and the clips that applied; CISPO's weights are those of `case`."""
    losses, bounds, start = [], [], 0
    for length in LENGTHS:
        rows = slice(start, start + length)
        mean = float(np.mean(logprobs[rows] - case.old[rows]))
        for t in range(start, start + length):
            advantage = float(case.advantages[t])
            if config.policy == "ppo":
                loss, bound = ppo(config, logprobs[t], case.old[t], advantage)
            elif config.policy == "gspo":
                loss, bound = gspo(config, mean, advantage)
            else:
                ratio = math.exp(case.logprobs[t] - case.old[t])
                weight = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
                loss, bound = -weight * advantage * logprobs[t], {-1: "high", 0: "", 1: "low"}[np.sign(weight - ratio)]
            losses.append(loss)
            bounds.append(bound)
        start += length
    return losses, bounds


def importance_of(case: Case, config: LossConfig) -> list[float]:
    return [
        min(math.exp(old - rollout), config.importance_cap) for old, rollout in zip(case.old, case.rollout, strict=True)
    ]


def kl_of(case: Case, logprobs: np.ndarray) -> list[float]:
    return [math.exp(r - p) - (r - p) - 1 for r, p in zip(case.reference, logprobs, strict=True)]


def aggregated(losses: list[float], config: LossConfig) -> float:
    """The definition of a mini-batch's loss."""
    rows = np.split(np.array(losses), np.cumsum(LENGTHS)[:-1])
    if config.aggregation == "token_mean":
        return float(np.mean(losses))
    if config.aggregation == "sequence_mean":
        return float(np.mean([row.mean() for row in rows]))
    return float(np.mean([row.sum() / config.normalizer_tokens for row in rows]))


def gradient(loss_of: Callable[[torch.Tensor], torch.Tensor], at: np.ndarray) -> np.ndarray:
    logprobs = torch.from_numpy(at).requires_grad_()
    return torch.autograd.grad(loss_of(logprobs), [logprobs])[0].numpy()


def finite_differences(loss_of: Callable[[np.ndarray], float], at: np.ndarray, step: float = 1e-6) -> np.ndarray:
    moves = step * np.eye(len(at))
    return np.array([(loss_of(at + move) - loss_of(at - move)) / (2 * step) for move in moves])


@pytest.mark.parametrize("name", SETTINGS)
def test_every_token_has_the_loss_and_the_bound_of_the_formula(name):
    case, config = Case(), SETTINGS[name]
    got = case.losses(config, reference=False)
    wanted, bounds = reference_of(case, config, case.logprobs)
    np.testing.assert_allclose(got.policy.losses_N, wanted, rtol=1e-12)
    flags = {"low": got.policy.low_N, "high": got.policy.high_N, "dual": got.policy.dual_N}
    for bound, flag in flags.items():
        assert flag.tolist() == [one == bound for one in bounds], bound
    weights = importance_of(case, config)
    np.testing.assert_allclose(got.losses_N, np.multiply(wanted, weights), rtol=1e-12)
    assert got.truncated_N.tolist() == [weight == config.importance_cap for weight in weights]
    assert got.reference_kl_N is None
    seen = set(bounds)
    assert seen == {"ppo": {"", "low", "high", "dual"}, "cispo without a lower bound": {"", "high"}}.get(
        name, {"", "low", "high"}
    )


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", SETTINGS)
def test_mini_batch_loss_and_gradient_match_the_formula(name, aggregation):
    """Finite differences ignore stopped gradients, so the formula keeps the same terms constant."""
    case = Case()
    config = SETTINGS[name].model_copy(
        update={"aggregation": aggregation, "normalizer_tokens": 50, "kl_coefficient": 0.3}
    )
    weights = token_weights(torch.tensor(LENGTHS), config).double()

    def loss_of(logprobs: torch.Tensor) -> torch.Tensor:
        losses = case.losses(config, logprobs).losses_N
        return (weights * losses).sum() / denominator(N, len(LENGTHS), config)

    def formula(logprobs: np.ndarray) -> float:
        losses, _ = reference_of(case, config, logprobs)
        kl = np.array(kl_of(case, logprobs))
        return aggregated(list(np.multiply(losses, importance_of(case, config)) + 0.3 * kl), config)

    assert float(loss_of(torch.from_numpy(case.logprobs))) == pytest.approx(formula(case.logprobs), rel=1e-6)
    got, wanted = gradient(loss_of, case.logprobs), finite_differences(formula, case.logprobs)
    if config.policy == "gspo":
        # Each token has its own share of a rollout's gradient; the formula has the gradient of their
        # mean. With equal weights over a rollout's tokens, both are the same.
        got, wanted = (np.array([part.sum() for part in np.split(g, np.cumsum(LENGTHS)[:-1])]) for g in (got, wanted))
    np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=1e-9)
    assert np.abs(wanted).max() > 1e-3


def test_gspo_gradient_matches_its_formula():
    case = Case()
    config = SETTINGS["gspo"].model_copy(update={"aggregation": "sequence_mean"})
    case.rollout = case.old

    def loss_of(logprobs: torch.Tensor) -> torch.Tensor:
        losses = case.losses(config, logprobs, reference=False).losses_N
        return (token_weights(torch.tensor(LENGTHS), config).double() * losses).sum() / len(LENGTHS)

    got = gradient(loss_of, case.logprobs)
    wanted = finite_differences(lambda at: aggregated(reference_of(case, config, at)[0], config), case.logprobs)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("name", SETTINGS)
def test_on_policy_gradient_is_weighted_reinforce(name):
    case = Case()
    got = gradient(lambda logprobs: case.losses(SETTINGS[name], logprobs, reference=False).losses_N.sum(), case.old)
    # CISPO's ratio also uses the old policy's log-probabilities.
    np.testing.assert_allclose(got, -case.advantages * np.minimum(np.exp(case.old - case.rollout), 2), rtol=1e-9)


@pytest.mark.parametrize("name", SETTINGS)
def test_no_gradient_goes_through_the_importance_weight(name):
    case = Case()
    tensors = [torch.from_numpy(x).requires_grad_() for x in (case.logprobs, case.old, case.rollout)]
    losses = policy_losses(*tensors, None, torch.from_numpy(case.advantages), torch.tensor(LENGTHS), SETTINGS[name])
    losses.losses_N.sum().backward()
    assert tensors[2].grad is None
    if SETTINGS[name].policy == "ppo":
        np.testing.assert_array_equal(tensors[1].grad, -tensors[0].grad)  # only the ratio's


def test_cispo_leaves_no_token_without_a_gradient():
    case = Case()
    for name, config in SETTINGS.items():
        got = gradient(
            lambda logprobs, config=config: case.losses(config, logprobs).policy.losses_N.sum(), case.logprobs
        )
        assert bool((got != 0).all()) == name.startswith("cispo")


def test_kl_estimate_is_unbiased_and_never_negative():
    random = np.random.default_rng(0)
    policy, reference = (torch.log_softmax(torch.from_numpy(random.normal(0, 1, 6)), 0) for _ in range(2))
    estimates = kl_to_reference(policy, reference)  # of each of six tokens
    assert float((policy.exp() * estimates).sum()) == pytest.approx(float((policy.exp() * (policy - reference)).sum()))
    assert (estimates > 0).all()
    assert float(kl_to_reference(policy, policy).abs().max()) == 0
    slopes = gradient(lambda logprobs: kl_to_reference(logprobs, reference).sum(), policy.numpy())
    np.testing.assert_array_equal(np.sign(slopes), np.sign((policy - reference).numpy()))


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "has_gradient"),
    [
        (1.0, 1.28, -1.28, True),  # the higher clip: up to 1.28
        (1.0, 1.29, -1.28, False),
        (1.0, 0.5, -0.5, True),  # positive advantage, lower probability: not clipped
        (-1.0, 0.81, 0.81, True),
        (-1.0, 0.79, 0.8, False),
        (-1.0, 2.9, 2.9, True),  # negative advantage, higher probability: not clipped, until
        (-1.0, 3.1, 3.0, False),  # the dual clip
        (1.0, 3.1, -1.28, False),  # it applies to negative advantages only
    ],
)
def test_ppo_clips_apply_at_their_bounds(advantage, ratio, loss, has_gradient):
    logprobs = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    advantages = torch.tensor([advantage], dtype=torch.float64)
    losses = policy_losses(logprobs, zero, zero, None, advantages, torch.tensor([1]), SETTINGS["ppo"]).losses_N
    losses.sum().backward()
    assert losses.item() == pytest.approx(loss)
    assert bool(logprobs.grad != 0) == has_gradient


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("difference", [100.0, -100.0])
def test_extreme_ratios_give_finite_losses_and_gradients(name, advantage, difference):
    logprobs = torch.tensor([difference - 200], requires_grad=True)
    old = torch.tensor([-200.0])
    losses = policy_losses(logprobs, old, old, old, torch.tensor([advantage]), torch.tensor([1]), SETTINGS[name])
    losses.losses_N.sum().backward()
    assert torch.isfinite(losses.losses_N).all()
    assert torch.isfinite(logprobs.grad).all()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_every_split_of_a_mini_batch_adds_up_to_the_same_loss(aggregation):
    config = LossConfig(aggregation=aggregation, normalizer_tokens=50)
    losses = torch.from_numpy(np.random.default_rng(0).normal(0, 1, N))
    whole = float((token_weights(torch.tensor(LENGTHS), config) * losses).sum())
    parts = losses.split((8, 92))
    split = [token_weights(torch.tensor(lengths), config) for lengths in (LENGTHS[:2], LENGTHS[2:])]
    assert sum(float((w * part).sum()) for w, part in zip(split, parts, strict=True)) == pytest.approx(whole, rel=1e-6)
    assert whole / denominator(N, 5, config) == pytest.approx(aggregated(losses.tolist(), config), rel=1e-6)


@pytest.mark.parametrize(
    ("value", "loss", "gradient"),
    [  # the old value is 1, the return 3, the clip 0.5
        (1.0, 2.0, -2.0),
        (1.4, 1.28, -1.6),
        (1.6, 1.125, 0.0),  # moved towards 3 by more than the clip: no gradient
        (0.6, 2.88, -2.4),
        (0.4, 3.38, -2.6),  # moved away from 3: full gradient
        (3.0, 1.125, 0.0),
        (4.9, 1.8050, 1.9),  # beyond 3, with a larger error than at the clip: full gradient
    ],
)
def test_value_clip_limits_the_change_of_a_value(value, loss, gradient):
    values = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    one, three = torch.tensor([1.0], dtype=torch.float64), torch.tensor([3.0], dtype=torch.float64)
    losses = value_losses(values, one, three, 0.5)
    losses.sum().backward()
    assert losses.item() == pytest.approx(loss)
    assert values.grad.item() == pytest.approx(gradient)


@pytest.mark.parametrize("clip", [0.2, None])
def test_value_loss_and_gradient_match_the_formula(clip):
    random = np.random.default_rng(0)
    old, returns = random.normal(0, 1, (2, N))
    values = old + random.uniform(-0.5, 0.5, N)

    def reference(values: np.ndarray) -> float:
        errors = [(v - r) ** 2 for v, r in zip(values, returns, strict=True)]
        if clip is not None:
            near = [o + min(max(v - o, -clip), clip) for v, o in zip(values, old, strict=True)]
            errors = [max(e, (v - r) ** 2) for e, v, r in zip(errors, near, returns, strict=True)]
        return sum(errors) / 2

    tensor = torch.from_numpy(values).requires_grad_()
    loss = value_losses(tensor, torch.from_numpy(old), torch.from_numpy(returns), clip).sum()
    loss.backward()
    assert loss.item() == pytest.approx(reference(values))
    for i in range(N):
        step = np.eye(N)[i] * 1e-6
        difference = (reference(values + step) - reference(values - step)) / 2e-6
        assert tensor.grad[i].item() == pytest.approx(difference, abs=1e-6)
