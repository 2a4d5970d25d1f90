"""SPO's tracker: numbers calculated by hand, discounting and validation."""

import numpy as np
import pytest

from poise.algorithms.spo_tracker import BetaTracker


def rewards(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def test_two_visits_by_hand() -> None:
    first = BetaTracker(1, 3)
    assert first.value == 0.25
    second = first.after(rewards(1, 0.5), discount=0.5)  # α = 0.5 + 1.5, β = 1.5 + 0.5
    assert (second.successes, second.failures) == (2, 2)
    assert second.value == 0.5
    third = second.after(rewards(0), discount=0.5)  # α = 1, β = 1 + 1
    assert third.value == pytest.approx(1 / 3)
    assert first == BetaTracker(1, 3)


def test_without_a_discount_the_value_is_a_mean() -> None:
    tracker = BetaTracker.prior(0.5, 2)
    for visit in ((1, 1), (0, 1), (1, 0)):
        tracker = tracker.after(rewards(*visit), discount=1)
    assert tracker.value == pytest.approx((1 + 4) / (2 + 6))


def test_only_the_order_of_visits_matters() -> None:
    prior = BetaTracker.prior(0.5, 2)
    assert prior.after(rewards(1, 0), 0.5) == prior.after(rewards(0, 1), 0.5)
    up_last = prior.after(rewards(0), 0.5).after(rewards(1), 0.5)
    down_last = prior.after(rewards(1), 0.5).after(rewards(0), 0.5)
    assert up_last.value > 0.5 > down_last.value


def test_a_prior_has_its_value_and_strength() -> None:
    weak, firm = BetaTracker.prior(0.25, 1), BetaTracker.prior(0.25, 9)
    assert weak.value == firm.value == 0.25
    assert weak.after(rewards(1), 1).value == pytest.approx(1.25 / 2)
    assert firm.after(rewards(1), 1).value == pytest.approx(3.25 / 10)


@pytest.mark.parametrize(("value", "strength"), [(0, 2), (1, 2), (0.5, 0), (0.5, float("inf")), (float("nan"), 2)])
def test_an_invalid_prior_is_rejected(value: float, strength: float) -> None:
    with pytest.raises(ValueError, match="positive and finite"):
        BetaTracker.prior(value, strength)


@pytest.mark.parametrize("discount", [0, -0.5, 1.5, float("nan")])
def test_a_discount_out_of_range_is_rejected(discount: float) -> None:
    with pytest.raises(ValueError, match="discount"):
        BetaTracker(1, 1).after(rewards(1), discount)


@pytest.mark.parametrize("wrong", [-0.1, 1.1, float("nan")])
def test_a_reward_out_of_range_is_rejected(wrong: float) -> None:
    with pytest.raises(ValueError, match="rewards"):
        BetaTracker(1, 1).after(rewards(0.5, wrong), 1)
