from __future__ import annotations

import json

import numpy as np
import pytest

from poise.value.pins import VersionedProbe
from poise.value.probe import FittedProbe, PromptProbe
from poise.value.snapshot import SCHEMA_VERSION, DomainSnapshot, Snapshot


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
        ledger={"retired": {"old": 3}, "runs": []},
        pins=(
            ("run", 0, {}),
            ("run", 1, {"math": old_math, "code": code}),
            ("other", 1, {"math": old_math}),
            ("run", 2**64 - 1, {"math": math}),
        ),
        num_groups_consumed=9,
        num_duplicates=2,
    )


def copy(snapshot: Snapshot) -> Snapshot:
    document, arrays = snapshot.encode()
    return Snapshot.decode(json.loads(json.dumps(document)), arrays)


def test_everything_comes_back_to_the_last_bit(snapshot) -> None:
    again = copy(snapshot)
    for name in ("instance_id", "ledger", "num_groups_consumed", "num_duplicates"):
        assert getattr(again, name) == getattr(snapshot, name)
    for before, after in zip(snapshot.domains, again.domains, strict=True):
        for name in ("domain", "num_added", "num_steps_seen"):
            assert getattr(after, name) == getattr(before, name)
        assert_same_probe(before.probe, after.probe)
        for mine, theirs in zip(before.groups, after.groups, strict=True):
            for name in ("run_id", "step", "group_id", "domain"):
                assert getattr(theirs, name) == getattr(mine, name)
            for name in ("prompt_hidden", "response_hidden", "entropies"):
                np.testing.assert_array_equal(getattr(theirs.rows, name), getattr(mine.rows, name))
            np.testing.assert_array_equal(theirs.rewards, mine.rewards)
    for (run, step, before), (run_again, step_again, after) in zip(snapshot.pins, again.pins, strict=True):
        assert (run_again, step_again, list(after)) == (run, step, list(before))
        for name in before:
            assert_same_probe(before[name], after[name])


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
    document, _ = snapshot.encode()
    assert [(each["domain"], each["version"]) for each in document["probes"]] == [("math", 2), ("code", 5), ("math", 1)]
    again = copy(snapshot)
    pinned = {(run, step): probes for run, step, probes in again.pins}
    assert pinned["run", 1]["math"] is pinned["other", 1]["math"]
    assert pinned["run", 2**64 - 1]["math"] is again.domains[0].probe


def test_a_service_that_knows_nothing_yet_can_be_saved() -> None:
    empty = Snapshot("instance", (), {"retired": {}, "runs": []}, (), 0, 0)
    document, arrays = empty.encode()
    assert arrays == {}
    assert copy(empty) == copy(empty) or copy(empty).domains == ()
    assert copy(empty).encode() == (document, {})


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"schema_version": SCHEMA_VERSION + 1}, ValueError),
        ({"domains": None}, TypeError),
        ({"probes": []}, LookupError),
        ({"pins": [["run", 0, [99]]]}, LookupError),
    ],
)
def test_what_encode_did_not_give_is_refused(snapshot, change, error) -> None:
    document, arrays = snapshot.encode()
    with pytest.raises(error):
        Snapshot.decode(document | change, arrays)


def test_missing_arrays_are_refused(snapshot) -> None:
    document, arrays = snapshot.encode()
    for name in [name for name in arrays if name.startswith("window.") or name.endswith(".bias")]:
        with pytest.raises(LookupError):
            Snapshot.decode(document, {key: array for key, array in arrays.items() if key != name})
