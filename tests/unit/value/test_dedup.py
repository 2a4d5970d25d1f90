from __future__ import annotations

import pytest
from tests.unit.value.parts import stored

from poise.value.dedup import Admission, Ledger, LedgerSnapshot, step_groups
from poise.value.store.snapshot import Snapshot

NEW, DUPLICATE, TOO_OLD = Admission.NEW, Admission.DUPLICATE, Admission.TOO_OLD


def restored(ledger: Ledger, horizon_steps: int = 3, max_runs: int = 2) -> Ledger:
    copy = Ledger(horizon_steps, max_runs)
    copy.restore(stored(Snapshot("instance", (), ledger.snapshot(), (), 0, 0)).ledger)
    return copy


@pytest.mark.parametrize("after", [lambda ledger: ledger, restored], ids=["same", "restored"])
def test_a_group_is_new_once(after) -> None:
    ledger = Ledger(3, 2)
    assert ledger.admit("run", 0, "g", "math") is NEW
    ledger = after(ledger)
    assert ledger.admit("run", 0, "g", "math") is DUPLICATE
    assert ledger.admit("run", 0, "g", "code") is DUPLICATE  # the domain is no part of its name
    assert ledger.admit("run", 0, "h", "math") is NEW
    assert ledger.admit("run", 1, "g", "math") is NEW
    assert ledger.admit("other", 0, "g", "math") is NEW


@pytest.mark.parametrize("after", [lambda ledger: ledger, restored], ids=["same", "restored"])
def test_steps_beyond_the_horizon_are_unknown_and_never_admitted_again(after) -> None:
    ledger = Ledger(horizon_steps=3, max_runs=2)
    for step in range(5):
        ledger.admit("run", step, "g", "math")
    ledger = after(ledger)
    assert [ledger.admit("run", step, "g", "math") for step in range(5)] == [TOO_OLD] * 2 + [DUPLICATE] * 3
    assert ledger.admit("run", 1, "never seen", "math") is TOO_OLD
    assert ledger.may_have_labels_of("run", 1)
    assert not ledger.may_have_labels_of("run", 5)


def test_steps_may_come_out_of_order_within_the_horizon() -> None:
    ledger = Ledger(3, 2)
    assert [ledger.admit("run", step, "g", "math") for step in (7, 2, 5)] == [NEW] * 3
    assert ledger.admit("run", 1, "g", "math") is TOO_OLD  # would be forgotten at once
    assert ledger.admit("run", 2, "h", "math") is NEW
    assert ledger.admit("run", 6, "g", "math") is NEW  # pushes 2 under the line
    assert ledger.admit("run", 3, "g", "math") is TOO_OLD or not ledger.may_have_labels_of("run", 3)
    assert ledger.admit("run", 2, "g", "math") is TOO_OLD


def test_one_absurd_step_number_does_not_push_the_rest_under_the_line() -> None:
    ledger = Ledger(3, 2)
    assert ledger.admit("run", 2**63, "g", "math") is NEW
    assert [ledger.admit("run", step, "g", "math") for step in range(10)] == [NEW] * 10


def test_a_step_without_labels_between_consumed_ones_has_none() -> None:
    ledger = Ledger(3, 2)
    ledger.admit("run", 0, "g", "math")
    ledger.admit("run", 2, "g", "math")
    assert [ledger.may_have_labels_of("run", step) for step in range(4)] == [True, False, True, False]
    assert not ledger.may_have_labels_of("other", 0)


@pytest.mark.parametrize("after", [lambda ledger: ledger, restored], ids=["same", "restored"])
def test_a_run_long_unused_is_known_by_its_last_step_alone(after) -> None:
    ledger = Ledger(3, max_runs=2)
    ledger.admit("old", 4, "g", "math")
    ledger.admit("second", 0, "g", "math")
    ledger.admit("third", 0, "g", "math")
    ledger = after(ledger)
    assert ledger.admit("old", 4, "g", "math") is TOO_OLD
    assert ledger.may_have_labels_of("old", 3)
    assert not ledger.may_have_labels_of("old", 5)
    assert ledger.admit("old", 5, "g", "math") is NEW
    assert ledger.admit("old", 4, "h", "math") is TOO_OLD


def test_using_a_run_keeps_it_known_in_full() -> None:
    ledger = Ledger(3, max_runs=2)
    ledger.admit("one", 0, "g", "math")
    ledger.admit("two", 0, "g", "math")
    ledger.admit("one", 1, "g", "math")
    ledger.admit("three", 0, "g", "math")
    assert ledger.admit("one", 0, "g", "math") is DUPLICATE
    assert ledger.admit("two", 0, "g", "math") is TOO_OLD


def test_it_knows_the_domains_of_a_step() -> None:
    ledger = Ledger(3, 2)
    ledger.admit("run", 0, "g", "math")
    ledger = restored(ledger)
    assert ledger.has_domain_in("run", 0, "math")
    assert not ledger.has_domain_in("run", 0, "code")
    assert not ledger.has_domain_in("run", 1, "math")


def facts(snapshot: LedgerSnapshot) -> list[object]:
    runs = [(run.run_id, [(step, step_groups(groups)) for step, groups in run.steps]) for run in snapshot.runs]
    return [runs, dict(snapshot.retired)]


def test_what_was_written_does_not_change_with_the_ledger() -> None:
    ledger = Ledger(3, 2)
    ledger.admit("run", 0, "g", "math")
    written = ledger.snapshot()
    before = facts(written)
    ledger.admit("run", 0, "h", "math")
    ledger.admit("other", 0, "h", "math")
    ledger.admit("third", 0, "h", "math")
    assert facts(written) == before
    assert facts(ledger.snapshot()) == [
        [("other", [(0, {"h": "math"})]), ("third", [(0, {"h": "math"})])],
        {"run": 1},
    ]


@pytest.mark.parametrize("after", [lambda ledger: ledger, restored], ids=["same", "restored"])
def test_only_what_changed_is_made_again_and_under_another_number(after) -> None:
    ledger = Ledger(3, 2)
    for step in range(3):
        ledger.admit("one", step, "g", "math")
        ledger.admit("two", step, "g", "math")
    ledger = after(ledger)
    one, two = ledger.snapshot().runs
    ledger.admit("two", 2, "h", "math")
    assert ledger.admit("one", 2, "g", "math") is DUPLICATE  # which is no change
    later = ledger.snapshot()
    same, changed = sorted(later.runs, key=lambda run: run.run_id)
    assert same is one
    assert changed.revision > two.revision
    assert [new is old for (_, new), (_, old) in zip(sorted(changed.steps), sorted(two.steps), strict=True)] == [
        True,
        True,
        False,
    ]
    ledger.admit("two", 3, "g", "math")  # step 0 sinks
    assert sorted(step for step, _ in ledger.snapshot().runs[-1].steps) == [1, 2, 3]
