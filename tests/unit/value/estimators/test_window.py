from __future__ import annotations

from poise.value.estimators.window import Window


def test_the_oldest_groups_leave_whole(make) -> None:
    window = Window(max_rows=7)
    for step, n in enumerate([2, 3, 2, 3]):
        window.add(make.label(step, n=n))
    assert [group.step for group in window.groups] == [2, 3]  # 3 + 2 + 3 rows would exceed the limit by one
    assert window.num_rows == 5
    assert window.num_added == 4


def test_a_group_larger_than_the_window_is_kept(make) -> None:
    window = Window(max_rows=4)
    window.add(make.label(0, n=2))
    window.add(make.label(1, n=6))
    assert [group.step for group in window.groups] == [1]


def test_a_restored_window_shrinks_to_a_smaller_setting(make) -> None:
    groups = [make.label(step) for step in range(5)]
    window = Window(4, groups, num_added=9)
    assert [group.step for group in window.groups] == [3, 4]
    assert (window.num_rows, window.num_added) == (4, 9)


def test_the_returned_groups_do_not_change_later(make) -> None:
    window = Window(max_rows=2)
    window.add(make.label(0))
    handed_out = window.groups
    window.add(make.label(1))
    assert [group.step for group in handed_out] == [0]
