from __future__ import annotations

import pytest

from poise.errors import LabelsConsumed
from poise.value.estimators.probe.model import FittedProbe
from poise.value.estimators.step_probes import StepProbes, VersionedProbe


def probes(version: int) -> dict[str, VersionedProbe]:
    return {"default": VersionedProbe(version, FittedProbe({}, 0.5), 0, 0.0)}


FIRST, SECOND = probes(1), probes(2)


def restored(pins: StepProbes, max_steps: int, max_runs: int) -> StepProbes:
    return StepProbes(max_steps, max_runs, pins.all())


def request(pins: StepProbes, step: int, current=FIRST, *, run_id: str = "run", labels_consumed: bool = False):
    return pins.get_or_pin(run_id, step, current, labels_consumed=labels_consumed).probes


def test_the_first_request_pins_the_probes_for_later_ones() -> None:
    pins = StepProbes(4, 4)
    assert request(pins, 0) is FIRST
    assert request(pins, 0, SECOND) is FIRST
    assert request(pins, 0, SECOND, labels_consumed=True) is FIRST
    assert request(pins, 1, SECOND) is SECOND
    assert request(pins, 0, SECOND, run_id="other") is SECOND


def test_a_step_whose_labels_were_consumed_is_rejected() -> None:
    pins = StepProbes(4, 4)
    with pytest.raises(LabelsConsumed, match="step 7 of run 'run'") as caught:
        request(pins, 7, labels_consumed=True)
    assert "RLOO" in caught.value.remedy
    assert pins.get("run", 7) is None
    assert pins.all() == ()


def test_the_absence_of_a_probe_is_pinned_too() -> None:
    pins = StepProbes(4, 4)
    assert request(pins, 0, {}) == {}
    assert request(pins, 0, FIRST, labels_consumed=True) == {}


@pytest.mark.parametrize("after", [lambda pins, *_: pins, restored], ids=["same", "restored"])
def test_the_first_request_pins_which_domains_are_behind(after) -> None:
    pins = StepProbes(4, 4)
    behind = [frozenset(), frozenset({"math"}), None]
    for step, first in enumerate(behind):
        pins.get_or_pin("run", step, FIRST, labels_consumed=False, behind=first)
    pins = after(pins, 4, 4)
    up_to_date = []
    for step, later in enumerate(reversed(behind)):
        pin = pins.get_or_pin("run", step, SECOND, labels_consumed=True, behind=later)
        up_to_date.append([pin.is_up_to_date(domain) for domain in ("math", "unheard.of")])
    assert up_to_date == [[True, True], [False, True], [False, False]]


@pytest.mark.parametrize("after", [lambda pins, *_: pins, restored], ids=["same", "restored"])
def test_the_least_recently_used_steps_are_dropped(after) -> None:
    pins = StepProbes(2, 2)
    for step in (0, 1, 0):
        request(pins, step)
    pins = after(pins, 2, 2)
    request(pins, 2)
    assert [pins.get("run", step) is not None for step in (0, 1, 2)] == [True, False, True]


@pytest.mark.parametrize("after", [lambda pins, *_: pins, restored], ids=["same", "restored"])
def test_the_least_recently_used_runs_are_dropped(after) -> None:
    pins = StepProbes(2, 2)
    for run in ("one", "two", "one"):
        request(pins, 0, run_id=run)
    pins = after(pins, 2, 2)
    request(pins, 0, run_id="three")
    assert [pins.get(run, 0) is not None for run in ("one", "two", "three")] == [True, False, True]


def test_smaller_bounds_after_a_restart_keep_the_latest() -> None:
    pins = StepProbes(4, 4)
    for step in range(4):
        request(pins, step)
    assert [pin.step for pin in restored(pins, 2, 4).all()] == [2, 3]
