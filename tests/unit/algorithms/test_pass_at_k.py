"""pass@k against numbers calculated by hand, and against an enumeration of all draws."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from poise.algorithms.pass_at_k import pass_at_k, reported_ks


def test_pass_at_k_by_hand() -> None:
    passed = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]
    assert pass_at_k(passed, 1).tolist() == pytest.approx([1 / 4, 1 / 2, 3 / 4])
    # C(3, 2) / C(4, 2) = 3/6 draws of two hold no pass; of two failures there is one such draw; of one, none.
    assert pass_at_k(passed, 2).tolist() == pytest.approx([1 / 2, 5 / 6, 1])


@pytest.mark.parametrize("k", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("num_passed", range(7))
def test_pass_at_k_is_the_share_of_draws_with_a_pass(num_passed: int, k: int) -> None:
    passed = [index < num_passed for index in range(6)]
    draws = list(combinations(passed, k))
    assert pass_at_k([passed], k)[0] == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_is_exactly_0_or_1_at_its_limits() -> None:
    for k in (1, 3, 8):
        assert pass_at_k([[False] * 8, [True] * 8], k).tolist() == [0, 1]


def test_pass_at_n_is_1_with_any_pass() -> None:
    assert pass_at_k([[0, 0, 0], [0, 0, 1], [1, 1, 1]], 3).tolist() == [0, 1, 1]


def test_many_rollouts_do_not_overflow_or_underflow() -> None:
    passed = np.arange(256) < 1
    assert pass_at_k([passed], 128)[0] == pytest.approx(0.5)


@pytest.mark.parametrize("k", [0, 4, -1])
def test_k_beyond_the_rollouts_is_rejected(k: int) -> None:
    with pytest.raises(ValueError, match="must be 1 to 3, the number of rollouts of a prompt"):
        pass_at_k([[1, 0, 0]], k)


@pytest.mark.parametrize(("num_rollouts", "ks"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4]), (8, [1, 2, 4, 8])])
def test_reported_ks_are_powers_of_two(num_rollouts: int, ks: list[int]) -> None:
    assert reported_ks(num_rollouts) == ks
