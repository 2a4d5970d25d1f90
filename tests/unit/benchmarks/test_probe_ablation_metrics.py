"""Figures of `probe_ablation` equal numpy over all pairs, and no value is compared with its own reward."""

import numpy as np
import pytest
from benchmarks.probe_ablation_metrics import (
    beta_moments,
    draws,
    figures,
    other_half,
    others,
    row_sums,
    within_variance,
)


@pytest.fixture
def source() -> np.random.Generator:
    return np.random.default_rng(0)


def plain(values: np.ndarray, rewards: np.ndarray, held_against: np.ndarray) -> dict[str, float]:
    values, rewards = values.astype(np.float64), rewards.astype(np.float64)
    alone = [
        (values[p, j], rewards[p, i])
        for p in range(len(values))
        for j in range(values.shape[1])
        for i in np.flatnonzero(held_against[j])
    ]
    value, reward = np.array(alone).T
    rows = [
        (values[p, j], rewards[p, held_against[j] > 0].mean())
        for p in range(len(values))
        for j in range(values.shape[1])
    ]
    row_value, mean = np.array(rows).T
    return {
        "pearson": np.corrcoef(row_value, mean)[0, 1],
        "mae": np.abs(row_value - mean).mean(),
        "brier": ((row_value - mean) ** 2).mean(),
        "pearson_sibling": np.corrcoef(value, reward)[0, 1],
        "squared_advantage": ((reward - value) ** 2).mean(),
    }


@pytest.mark.parametrize("judged", [others, other_half])
def test_figures_equal_those_over_all_pairs(source: np.random.Generator, judged) -> None:
    values, rewards = source.random((5, 6), np.float32), source.random((5, 6), np.float32)
    found = figures(row_sums(values, rewards, judged(6)).sum(axis=0))
    assert found.keys() == plain(values, rewards, judged(6)).keys()
    for name, wanted in plain(values, rewards, judged(6)).items():
        assert found[name] == pytest.approx(wanted, rel=1e-6), name


def test_a_bootstrap_draw_equals_figures_of_drawn_prompts(source: np.random.Generator) -> None:
    values, rewards = source.random((3, 4), np.float32), source.random((3, 4), np.float32)
    sums = row_sums(values, rewards, others(4))
    taken = [0, 2, 2]
    found = figures(np.array([[1, 0, 2]]) @ sums)
    for name, wanted in plain(values[taken], rewards[taken], others(4)).items():
        assert found[name] == pytest.approx([wanted], rel=1e-6), name


def test_draws_take_as_many_prompts_as_exist() -> None:
    counts = draws(7, 500, seed=0)
    assert counts.shape == (500, 7)
    assert (counts.sum(axis=1) == 7).all()
    assert counts.mean(axis=0) == pytest.approx(np.ones(7), abs=0.2)


@pytest.mark.parametrize("judged", [others, other_half])
def test_no_value_is_compared_with_its_own_reward(judged) -> None:
    held_against = judged(8)
    assert not held_against.diagonal().any()
    # A value that is the rollout's own reward looks perfect only where it meets itself.
    rewards = np.eye(8, dtype=np.float32)[:2]
    assert figures(row_sums(rewards, rewards, held_against).sum(axis=0))["squared_advantage"] > 0


def test_a_constant_has_no_correlation_but_errors(source: np.random.Generator) -> None:
    rewards = source.random((7, 6), np.float32)
    for value in np.linspace(0.1, 0.9, 17):  # of some, the covariance is not 0 but rounding
        found = figures(row_sums(np.full_like(rewards, value), rewards, others(6)).sum(axis=0))
        assert np.isnan(found["pearson"]) and np.isnan(found["pearson_sibling"])
        assert found["mae"] > 0


def test_the_best_baseline_leaves_the_variance_within_prompts(source: np.random.Generator) -> None:
    chances = source.beta(1, 2, (4000, 1))
    rewards = (source.random((4000, 4)) < chances).astype(np.float32)
    assert within_variance(rewards) == pytest.approx(float((chances * (1 - chances)).mean()), abs=0.005)


def test_beta_moments_by_hand() -> None:
    # m = 1/2, Var(p) = Cov(r1, r2) = (3 · 1/4 − 1/4) / 4 = 1/8 = (1/4) / (strength + 1)
    mean, strength = beta_moments(
        np.array([[1, 1], [1, 1], [0, 0], [1, 0], [0, 1], [0, 0], [1, 1], [0, 0]], np.float32)
    )
    assert (mean, strength) == (0.5, pytest.approx(1.0))


def test_beta_moments_recover_the_distribution(source: np.random.Generator) -> None:
    rewards = (source.random((200_000, 2)) < source.beta(1.2, 2.8, (200_000, 1))).astype(np.float32)
    assert beta_moments(rewards) == (pytest.approx(0.3, abs=0.005), pytest.approx(4.0, abs=0.15))


def test_uncorrelated_siblings_give_a_finite_prior() -> None:
    mean, strength = beta_moments(np.array([[1, 0], [0, 1]], np.float32))
    assert mean == 0.5
    assert 50 < strength < 200
