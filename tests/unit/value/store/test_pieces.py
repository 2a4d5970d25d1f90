from __future__ import annotations

import numpy as np
import pytest
from tests.unit.value.parts import stored

from poise.value.dedup import LedgerSnapshot, RunEntries
from poise.value.probe.model import FittedProbe, PromptProbe
from poise.value.step_probes import StepPin, VersionedProbe
from poise.value.store.pieces import join, split
from poise.value.store.snapshot import DomainSnapshot, Snapshot


def probe(version: int, width: int = 6) -> VersionedProbe:
    weights = {"prompt_hidden": np.arange(width, dtype=np.float64) / version, "entropy": np.full(3, 1 / 3)}
    prompt_only = PromptProbe(np.full(width, 0.1 * version), 1 / 9)
    if version == 5:
        weights["sibling_reward"] = np.full(1, 1 / 11)
        prompt_only = None
    return VersionedProbe(version, FittedProbe(weights, 1 / 7, prompt_only), 3 * version, 0.25)


@pytest.fixture
def snapshot(make) -> Snapshot:
    math, old_math, code = probe(2), probe(1), probe(5, width=9)
    return Snapshot(
        instance_id="instance",
        domains=(
            DomainSnapshot(
                "math", (make.label(0, n=3, domain="math"), make.label(2**63, "h", domain="math")), 7, 4, math
            ),
            DomainSnapshot("code", (make.label(0, run_id="other", domain="code", width=9),), 1, 1, code),
            DomainSnapshot("none.yet", (make.label(1, domain="none.yet"),), 1, 1, None),
        ),
        ledger=LedgerSnapshot(
            5, {"old": 3, "older": 2**63}, 4, (RunEntries("run", 3, 2, ((2, b'{"math":["g","h"]}'), (2**63, b"{}"))),)
        ),
        pins=(
            ("run", 0, StepPin({}, None)),
            ("run", 1, StepPin({"math": old_math, "code": code}, frozenset({"math", "none.yet"}))),
            ("other", 1, StepPin({"math": old_math}, frozenset())),
            ("run", 2**64 - 1, StepPin({"math": math}, None)),
        ),
        num_groups_consumed=9,
        num_duplicates=2,
    )


def test_everything_comes_back_to_the_last_bit(snapshot) -> None:
    again = stored(snapshot)
    for name in ("instance_id", "num_groups_consumed", "num_duplicates"):
        assert getattr(again, name) == getattr(snapshot, name)
    assert (again.ledger.revision, again.ledger.retired, again.ledger.retired_revision) == (
        5,
        snapshot.ledger.retired,
        4,
    )
    (run,), (run_again,) = snapshot.ledger.runs, again.ledger.runs
    for name in ("run_id", "revision", "first_known_step", "steps"):
        assert getattr(run_again, name) == getattr(run, name)
    for before, after in zip(snapshot.domains, again.domains, strict=True):
        for name in ("domain", "num_added", "num_steps_seen", "num_recorded"):
            assert getattr(after, name) == getattr(before, name)
        assert_same_probe(before.probe, after.probe)
        for mine, theirs in zip(before.groups, after.groups, strict=True):
            for name in ("run_id", "step", "group_id", "domain"):
                assert getattr(theirs, name) == getattr(mine, name)
            for name in ("prompt_hidden", "response_hidden", "entropies"):
                np.testing.assert_array_equal(getattr(theirs.rows, name), getattr(mine.rows, name))
            np.testing.assert_array_equal(theirs.rewards, mine.rewards)
    for (run, step, before), (run_again, step_again, after) in zip(snapshot.pins, again.pins, strict=True):
        assert (run_again, step_again, list(after.probes)) == (run, step, list(before.probes))
        assert after.behind == before.behind
        for name in before.probes:
            assert_same_probe(before.probes[name], after.probes[name])


def test_of_a_state_that_does_not_tell_what_was_behind_nothing_is_known(snapshot) -> None:
    document, pieces = split(snapshot, None)
    del document["behind"]
    again = join(document, {name: encode() for name, encode in pieces.items()})
    assert [(run, step, pin.behind) for run, step, pin in again.pins] == [
        ("run", 0, None),
        ("run", 1, None),
        ("other", 1, None),
        ("run", 2**64 - 1, None),
    ]


def assert_same_probe(before: VersionedProbe | None, after: VersionedProbe | None) -> None:
    if before is None or after is None:
        assert before is after
        return
    assert (after.version, after.num_added, after.fit_s) == (before.version, before.num_added, before.fit_s)
    assert after.probe.bias == before.probe.bias
    assert after.probe.weights.keys() == before.probe.weights.keys()
    for name, weights in before.probe.weights.items():
        np.testing.assert_array_equal(after.probe.weights[name], weights)
    if before.probe.prompt_only is None:
        assert after.probe.prompt_only is None
    else:
        np.testing.assert_array_equal(after.probe.prompt_only.weights_d, before.probe.prompt_only.weights_d)
        assert after.probe.prompt_only.bias == before.probe.prompt_only.bias


def test_a_probe_that_many_steps_pin_is_stored_once_and_stays_one(snapshot) -> None:
    document, pieces = split(snapshot, None)
    assert [(each["domain"], each["version"]) for each in document["probes"]] == [("math", 2), ("code", 5), ("math", 1)]
    assert sum(name.startswith("probe ") for name in pieces) == 3
    again = stored(snapshot)
    pinned = {(run, step): pin.probes for run, step, pin in again.pins}
    assert pinned["run", 1]["math"] is pinned["other", 1]["math"]
    assert pinned["run", 2**64 - 1]["math"] is again.domains[0].probe


def test_a_service_that_knows_nothing_yet_can_be_saved() -> None:
    again = stored(Snapshot("instance", (), LedgerSnapshot(), (), 0, 0))
    assert (again.instance_id, again.domains, again.pins, again.ledger.runs) == ("instance", (), (), ())


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"domains": None}, TypeError),
        ({"probes": []}, LookupError),
        ({"pins": [["run", 0, [99]]], "behind": [None]}, LookupError),
        ({"behind": []}, ValueError),
        ({"ledger": {}}, LookupError),
    ],
)
def test_what_split_did_not_give_is_refused(snapshot, change, error) -> None:
    document, pieces = split(snapshot, None)
    with pytest.raises(error):
        join(document | change, {name: encode() for name, encode in pieces.items()})


def test_missing_pieces_and_arrays_are_refused(snapshot) -> None:
    document, made = split(snapshot, None)
    pieces = {name: encode() for name, encode in made.items()}
    for name in pieces:
        with pytest.raises(LookupError):
            join(document, {key: arrays for key, arrays in pieces.items() if key != name})
    window = next(name for name in pieces if name.startswith("window "))
    for array in pieces[window]:
        with pytest.raises(LookupError):
            join(document, pieces | {window: {key: a for key, a in pieces[window].items() if key != array}})


def windowed(make, num_added: int, num_kept: int) -> Snapshot:
    """A domain whose window holds the last of so many groups, told apart by their steps."""
    groups = tuple(make.label(step) for step in range(num_added - num_kept, num_added))
    return Snapshot("instance", (DomainSnapshot("math", groups, num_added, 1, None),), LedgerSnapshot(), (), 0, 0)


def test_a_state_stored_beside_an_earlier_one_takes_its_pieces_and_adds_what_is_new(make) -> None:
    shared: dict[str, object] = {}
    document = None
    expected = {
        3: ["window math 0 3"],
        5: ["window math 0 3", "window math 3 5"],
        9: ["window math 3 5", "window math 5 9"],
    }
    for num_added, names in expected.items():
        document, made = split(windowed(make, num_added, min(num_added, 5)), document)
        windows = [name for name in made if name.startswith("window")]
        assert windows == names
        shared |= {name: encode() for name, encode in made.items() if name not in shared}
        (domain,) = join(document, shared).domains
        assert [group.step for group in domain.groups] == list(range(num_added))[-5:]


def test_a_window_that_was_replaced_whole_takes_nothing_of_before(make) -> None:
    document, _ = split(windowed(make, 4, 4), None)
    _, made = split(windowed(make, 9, 2), document)
    assert [name for name in made if name.startswith("window")] == ["window math 7 9"]


def test_a_log_in_very_many_segments_is_written_anew_as_one(make) -> None:
    document, counts = None, []
    for num_added in range(1, 40):
        document, made = split(windowed(make, num_added, num_added), document)
        counts.append(sum(name.startswith("window") for name in made))
    assert max(counts) == 32
    assert counts[32] == 1  # [0, 33)
