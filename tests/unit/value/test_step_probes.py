from __future__ import annotations

import pytest

from poise.errors import LabelsConsumed
from poise.value.probe.model import FittedProbe
from poise.value.step_probes import StepPins, VersionedProbe


def probes(version: int) -> dict[str, VersionedProbe]:
    return {"default": VersionedProbe(version, FittedProbe({}, 0.5), 0, 0.0)}


FIRST, SECOND = probes(1), probes(2)


def restored(pins: StepPins, max_steps: int, max_runs: int) -> StepPins:
    return StepPins(max_steps, max_runs, pins.all())


def ask(pins: StepPins, step: int, current=FIRST, *, run_id: str = "run", labels_consumed: bool = False):
    return pins.answering(run_id, step, current, labels_consumed=labels_consumed).probes


def test_the_first_question_decides_for_all_later_ones() -> None:
    pins = StepPins(4, 4)
    assert ask(pins, 0) is FIRST
    assert ask(pins, 0, SECOND) is FIRST
    assert ask(pins, 0, SECOND, labels_consumed=True) is FIRST
    assert ask(pins, 1, SECOND) is SECOND
    assert ask(pins, 0, SECOND, run_id="other") is SECOND


def test_a_step_whose_labels_came_first_is_refused_with_a_remedy_and_not_pinned() -> None:
    pins = StepPins(4, 4)
    with pytest.raises(LabelsConsumed, match="step 7 of run 'run'") as caught:
        ask(pins, 7, labels_consumed=True)
    assert "RLOO" in caught.value.remedy
    assert pins.pinned("run", 7) is None
    assert pins.all() == ()


def test_no_probe_at_all_is_an_answer_that_is_pinned_too() -> None:
    pins = StepPins(4, 4)
    assert ask(pins, 0, {}) == {}
    assert ask(pins, 0, FIRST, labels_consumed=True) == {}


@pytest.mark.parametrize("after", [lambda pins, *_: pins, restored], ids=["same", "restored"])
def test_which_domains_were_settled_is_decided_by_the_first_question_too(after) -> None:
    pins = StepPins(4, 4)
    told = [frozenset(), frozenset({"math"}), None]
    for step, first in enumerate(told):
        pins.answering("run", step, FIRST, labels_consumed=False, behind=first)
    pins = after(pins, 4, 4)
    settled = []
    for step, later in enumerate(reversed(told)):
        pin = pins.answering("run", step, SECOND, labels_consumed=True, behind=later)
        settled.append([pin.is_settled(domain) for domain in ("math", "unheard.of")])
    assert settled == [[True, True], [False, True], [False, False]]


@pytest.mark.parametrize("after", [lambda pins, *_: pins, restored], ids=["same", "restored"])
def test_the_steps_least_recently_asked_about_are_forgotten(after) -> None:
    pins = StepPins(2, 2)
    for step in (0, 1, 0):
        ask(pins, step)
    pins = after(pins, 2, 2)
    ask(pins, 2)
    assert [pins.pinned("run", step) is not None for step in (0, 1, 2)] == [True, False, True]


@pytest.mark.parametrize("after", [lambda pins, *_: pins, restored], ids=["same", "restored"])
def test_the_runs_least_recently_asked_about_are_forgotten(after) -> None:
    pins = StepPins(2, 2)
    for run in ("one", "two", "one"):
        ask(pins, 0, run_id=run)
    pins = after(pins, 2, 2)
    ask(pins, 0, run_id="three")
    assert [pins.pinned(run, 0) is not None for run in ("one", "two", "three")] == [True, False, True]


def test_smaller_bounds_after_a_restart_keep_the_latest() -> None:
    pins = StepPins(4, 4)
    for step in range(4):
        ask(pins, step)
    assert [step for _, step, _ in restored(pins, 2, 4).all()] == [2, 3]
