from __future__ import annotations

import pytest
from tests.unit.value.harness import saved_and_read

from poise.value.dedup import Admission, ConsumedLabels, DedupSnapshot, groups_of
from poise.value.store import Snapshot

NEW, DUPLICATE, TOO_OLD = Admission.NEW, Admission.DUPLICATE, Admission.TOO_OLD


def restored(consumed: ConsumedLabels) -> ConsumedLabels:
    return ConsumedLabels(3, 2, saved_and_read(Snapshot("instance", (), consumed.snapshot(), (), 0, 0)).consumed)


@pytest.mark.parametrize("after", [lambda consumed: consumed, restored], ids=["same", "restored"])
def test_a_group_is_new_once(after) -> None:
    consumed = ConsumedLabels(3, 2)
    assert consumed.admit("run", 0, "g", "math") is NEW
    consumed = after(consumed)
    assert consumed.admit("run", 0, "g", "math") is DUPLICATE
    assert consumed.admit("run", 0, "g", "code") is DUPLICATE  # the domain is not part of the id
    assert consumed.admit("run", 0, "h", "math") is NEW
    assert consumed.admit("run", 1, "g", "math") is NEW
    assert consumed.admit("other", 0, "g", "math") is NEW


@pytest.mark.parametrize("after", [lambda consumed: consumed, restored], ids=["same", "restored"])
def test_steps_beyond_the_horizon_are_too_old(after) -> None:
    consumed = ConsumedLabels(horizon_steps=3, max_runs=2)
    for step in range(5):
        consumed.admit("run", step, "g", "math")
    consumed = after(consumed)
    assert [consumed.admit("run", step, "g", "math") for step in range(5)] == [TOO_OLD] * 2 + [DUPLICATE] * 3
    assert consumed.admit("run", 1, "never seen", "math") is TOO_OLD
    assert consumed.may_have_labels_of("run", 1)
    assert not consumed.may_have_labels_of("run", 5)


def test_steps_may_come_out_of_order_within_the_horizon() -> None:
    consumed = ConsumedLabels(3, 2)
    assert [consumed.admit("run", step, "g", "math") for step in (7, 2, 5)] == [NEW] * 3
    assert consumed.admit("run", 1, "g", "math") is TOO_OLD  # would be dropped immediately
    assert consumed.admit("run", 2, "h", "math") is NEW
    assert consumed.admit("run", 6, "g", "math") is NEW  # makes step 2 too old
    assert consumed.admit("run", 3, "g", "math") is TOO_OLD or not consumed.may_have_labels_of("run", 3)
    assert consumed.admit("run", 2, "g", "math") is TOO_OLD


def test_one_huge_step_number_makes_no_other_step_too_old() -> None:
    consumed = ConsumedLabels(3, 2)
    assert consumed.admit("run", 2**63, "g", "math") is NEW
    assert [consumed.admit("run", step, "g", "math") for step in range(10)] == [NEW] * 10


def test_a_step_without_labels_between_consumed_ones_has_none() -> None:
    consumed = ConsumedLabels(3, 2)
    consumed.admit("run", 0, "g", "math")
    consumed.admit("run", 2, "g", "math")
    assert [consumed.may_have_labels_of("run", step) for step in range(4)] == [True, False, True, False]
    assert not consumed.may_have_labels_of("other", 0)


@pytest.mark.parametrize("after", [lambda consumed: consumed, restored], ids=["same", "restored"])
def test_only_the_last_step_of_a_long_unused_run_is_known(after) -> None:
    consumed = ConsumedLabels(3, max_runs=2)
    consumed.admit("old", 4, "g", "math")
    consumed.admit("second", 0, "g", "math")
    consumed.admit("third", 0, "g", "math")
    consumed = after(consumed)
    assert consumed.admit("old", 4, "g", "math") is TOO_OLD
    assert consumed.may_have_labels_of("old", 3)
    assert not consumed.may_have_labels_of("old", 5)
    assert consumed.admit("old", 5, "g", "math") is NEW
    assert consumed.admit("old", 4, "h", "math") is TOO_OLD


def test_all_steps_of_a_run_in_use_are_known() -> None:
    consumed = ConsumedLabels(3, max_runs=2)
    consumed.admit("one", 0, "g", "math")
    consumed.admit("two", 0, "g", "math")
    consumed.admit("one", 1, "g", "math")
    consumed.admit("three", 0, "g", "math")
    assert consumed.admit("one", 0, "g", "math") is DUPLICATE
    assert consumed.admit("two", 0, "g", "math") is TOO_OLD


def test_the_domains_of_a_step_are_known() -> None:
    consumed = ConsumedLabels(3, 2)
    consumed.admit("run", 0, "g", "math")
    consumed = restored(consumed)
    assert consumed.has_domain_in("run", 0, "math")
    assert not consumed.has_domain_in("run", 0, "code")
    assert not consumed.has_domain_in("run", 1, "math")


def facts(snapshot: DedupSnapshot) -> list[object]:
    runs = [(run.run_id, [(step, groups_of(groups)) for step, groups in run.steps.items()]) for run in snapshot.runs]
    return [runs, dict(snapshot.retired)]


def test_a_snapshot_does_not_change_later() -> None:
    consumed = ConsumedLabels(3, 2)
    consumed.admit("run", 0, "g", "math")
    written = consumed.snapshot()
    before = facts(written)
    consumed.admit("run", 0, "h", "math")
    consumed.admit("other", 0, "h", "math")
    consumed.admit("third", 0, "h", "math")
    assert facts(written) == before
    assert facts(consumed.snapshot()) == [
        [("other", [(0, {"h": "math"})]), ("third", [(0, {"h": "math"})])],
        {"run": 1},
    ]


@pytest.mark.parametrize("after", [lambda consumed: consumed, restored], ids=["same", "restored"])
def test_a_snapshot_encodes_only_what_has_changed(after) -> None:
    consumed = ConsumedLabels(3, 2)
    for step in range(3):
        consumed.admit("one", step, "g", "math")
        consumed.admit("two", step, "g", "math")
    consumed = after(consumed)
    one, two = consumed.snapshot().runs
    consumed.admit("two", 2, "h", "math")
    assert consumed.admit("one", 2, "g", "math") is DUPLICATE  # this changes nothing
    same, changed = sorted(consumed.snapshot().runs, key=lambda run: run.run_id)
    assert same is one
    assert changed is not two
    assert [changed.steps[step] is two.steps[step] for step in range(3)] == [True, True, False]
    consumed.admit("two", 3, "g", "math")  # step 0 is dropped
    assert sorted(consumed.snapshot().runs[-1].steps) == [1, 2, 3]
