"""The order invariant: the baselines of a step are fixed before any label of that step can reach a probe.

The first question about a (run, step) pins every domain's probe of that moment, and all later questions about the
step are answered from the pin. A pin is only ever made while no label of the step has been consumed, so a pinned probe
has by construction seen none. A domain without a probe at that moment has none for the whole step: a probe fitted later
may have seen its labels.

Owns the pins. They are saved with the ids of the consumed labels: a step whose pin a crash took had no label consumed
either, so it is pinned anew and never refused.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from poise.errors import LabelsConsumed
from poise.value.probe.model import FittedProbe


@dataclass(frozen=True, slots=True, eq=False)
class VersionedProbe:
    """A fitted probe and where it stands in its domain's history."""

    version: int
    """From 1, monotone in a domain."""
    probe: FittedProbe
    num_added: int
    """`Window.num_added` when it was fitted."""
    fit_s: float


Probes = Mapping[str, VersionedProbe]
"""By domain. Never changed in place: a new probe makes a new mapping, so a pin is a reference."""


@dataclass(frozen=True, slots=True, eq=False)
class StepPin:
    """What answers for one step."""

    probes: Probes
    behind: frozenset[str] | None
    """Domains whose probes had not seen every label published before the question that pinned them; None where that is
    not known of any."""

    def is_settled(self, domain: str) -> bool:
        """Whether a domain's probe is known to have seen every label published before the question that pinned it."""
        return self.behind is not None and domain not in self.behind


Pin = tuple[str, int, StepPin]
"""Run, step, and what answers for it."""


class StepPins:
    """Which probes answer for which step. Bounded: the least recently asked about are forgotten."""

    def __init__(self, max_steps: int, max_runs: int, pins: Iterable[Pin] = ()) -> None:
        """Keep at most `max_steps` of each of at most `max_runs`, beginning with `pins`, as `all` gave them."""
        self._max_steps = max_steps
        self._max_runs = max_runs
        self._runs: OrderedDict[str, OrderedDict[int, StepPin]] = OrderedDict()
        for run_id, step, pin in pins:
            self._pin(run_id, step, pin)

    def answering(
        self, run_id: str, step: int, current: Probes, *, labels_consumed: bool, behind: frozenset[str] | None = None
    ) -> StepPin:
        """Return what answers for the step, pinning `current`, and `behind`, if it is asked about for the first time.

        Raises:
            LabelsConsumed: it is, but labels of the step have been consumed, or that cannot be ruled out.
        """
        pin = self.pinned(run_id, step)
        if pin is None and labels_consumed:
            raise LabelsConsumed(
                f"labels of step {step} of run {run_id!r} have reached the probe, or may have: "
                "a baseline now would leak them",
                remedy="Keep the first answer, or use RLOO for this step. A new run needs a new run_id.",
            )
        return self._pin(run_id, step, pin or StepPin(current, behind))

    def _pin(self, run_id: str, step: int, pin: StepPin) -> StepPin:
        """Note the answer as the latest given."""
        steps = self._runs.setdefault(run_id, OrderedDict())
        steps[step] = pin
        steps.move_to_end(step)
        self._runs.move_to_end(run_id)
        if len(steps) > self._max_steps:
            steps.popitem(last=False)
        if len(self._runs) > self._max_runs:
            self._runs.popitem(last=False)
        return pin

    def pinned(self, run_id: str, step: int) -> StepPin | None:
        """Return the pin of a step, if it has one."""
        steps = self._runs.get(run_id)
        return None if steps is None else steps.get(step)

    def all(self) -> tuple[Pin, ...]:
        """Return the pins, the least recently asked about first."""
        return tuple((run_id, step, pin) for run_id, steps in self._runs.items() for step, pin in steps.items())
