"""Pins the probes that answer for each step. This enforces the order invariant.

The order invariant: the baselines of a step are fixed before any label of that step can reach a probe. The first
request about a (run, step) pins every domain's current probe, and later requests about the step get the same probes.
A step is pinned only while none of its labels has been consumed, so a pinned probe has never seen one. A domain without
a probe at that moment has none for the whole step, because a later probe may have seen the step's labels.

Pins are saved together with the ids of consumed labels. If a crash loses a step's pin, no label of the step was
consumed either, so the step is pinned again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from poise.errors import LabelsConsumed
from poise.value.estimators.interface import Fitted


@dataclass(frozen=True, slots=True, eq=False)
class VersionedProbe:
    """A fitted probe with its version."""

    version: int
    """From 1, increasing in a domain."""
    probe: Fitted
    num_added: int
    """`Window.num_added` at the fit."""
    fit_s: float


Probes = Mapping[str, VersionedProbe]
"""The probe of each domain. Never changed in place: a new probe makes a new mapping, so a pin can keep a reference."""


@dataclass(frozen=True, slots=True, eq=False)
class PinnedProbes:
    """The probes that answer for one step."""

    run_id: str
    step: int
    probes: Probes
    behind: frozenset[str] | None = None
    """Domains whose probes had not seen every label published before the step was pinned; None if unknown."""

    def is_up_to_date(self, domain: str) -> bool:
        """Whether the domain's probe is known to have seen every label published before the step was pinned."""
        return self.behind is not None and domain not in self.behind


class StepProbes:
    """The pinned probes of the most recently used steps and runs."""

    def __init__(self, max_steps: int, max_runs: int, pins: Iterable[PinnedProbes] = ()) -> None:
        """Keep at most `max_steps` per run and at most `max_runs`, starting with `pins` from an earlier `all()`."""
        self._max_steps = max_steps
        self._max_runs = max_runs
        self._runs: OrderedDict[str, OrderedDict[int, PinnedProbes]] = OrderedDict()
        for pin in pins:
            self._use(pin)

    def get_or_pin(
        self, run_id: str, step: int, current: Probes, *, labels_consumed: bool, behind: frozenset[str] | None = None
    ) -> PinnedProbes:
        """Return the step's probes. If the step has none yet, pin `current` and `behind`.

        Raises:
            LabelsConsumed: the step is not pinned and its labels were consumed, or may have been.
        """
        pin = self.get(run_id, step)
        if pin is None and labels_consumed:
            raise LabelsConsumed(
                f"labels of step {step} of run {run_id!r} may have reached the probe, so a baseline would leak them",
                remedy="Keep the first answer, or use RLOO for this step. A new run needs a new run_id.",
            )
        return self._use(pin or PinnedProbes(run_id, step, current, behind))

    def _use(self, pin: PinnedProbes) -> PinnedProbes:
        """Store the pin as the most recently used one; drop the least recently used beyond the limits."""
        steps = self._runs.setdefault(pin.run_id, OrderedDict())
        steps[pin.step] = pin
        steps.move_to_end(pin.step)
        self._runs.move_to_end(pin.run_id)
        if len(steps) > self._max_steps:
            steps.popitem(last=False)
        if len(self._runs) > self._max_runs:
            self._runs.popitem(last=False)
        return pin

    def get(self, run_id: str, step: int) -> PinnedProbes | None:
        """Return the step's probes; None if it is not pinned."""
        steps = self._runs.get(run_id)
        return None if steps is None else steps.get(step)

    def all(self) -> tuple[PinnedProbes, ...]:
        """Return all pins, least recently used first."""
        return tuple(pin for steps in self._runs.values() for pin in steps.values())
