from __future__ import annotations

import numpy as np

from poise.value.probe.window import Window, training_rows


def test_the_oldest_groups_leave_and_never_in_part(make) -> None:
    window = Window(max_rows=7)
    for step, n in enumerate([2, 3, 2, 3]):
        window.add(make.label(step, n=n))
    assert [group.step for group in window.groups] == [2, 3]  # 3 + 2 + 3 rows would be one too many
    assert window.num_rows == 5
    assert window.num_added == 4


def test_a_group_larger_than_the_window_is_kept_alone(make) -> None:
    window = Window(max_rows=4)
    window.add(make.label(0, n=2))
    window.add(make.label(1, n=6))
    assert [group.step for group in window.groups] == [1]


def test_a_restored_window_shrinks_to_a_smaller_setting(make) -> None:
    groups = [make.label(step) for step in range(5)]
    window = Window(4, groups, num_added=9)
    assert [group.step for group in window.groups] == [3, 4]
    assert (window.num_rows, window.num_added) == (4, 9)


def test_groups_handed_out_do_not_change_when_more_arrive(make) -> None:
    window = Window(max_rows=2)
    window.add(make.label(0))
    handed_out = window.groups
    window.add(make.label(1))
    assert [group.step for group in handed_out] == [0]


def test_targets_are_the_mean_rewards_of_the_siblings(make) -> None:
    label = make.label(0, n=3)
    rows, targets = training_rows([label, make.label(1)])
    r = label.rewards
    np.testing.assert_allclose(targets[:3], [(r[1] + r[2]) / 2, (r[0] + r[2]) / 2, (r[0] + r[1]) / 2], rtol=1e-6)
    assert len(rows) == len(targets) == 5
    np.testing.assert_array_equal(rows.prompt_hidden[:3], label.rows.prompt_hidden)
