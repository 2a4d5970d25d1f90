"""Which labelled groups were consumed: what makes the probe learn each at most once.

Owns ids alone: exact ones for the most recent steps of a run, and below them a line under which nothing is known
any more, hence nothing is admitted.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

_MAX_RETIRED_RUNS = 65_536
"""Runs of which only the line is remembered: a bound against endless growth, far beyond any real number of runs."""


class Admission(Enum):
    """What to do with a labelled group."""

    NEW = auto()
    """Never seen; now it is."""
    DUPLICATE = auto()
    """Consumed before."""
    TOO_OLD = auto()
    """Under the line: whether it was consumed is not known any more."""


@dataclass
class _Run:
    first_known_step: int = 0
    domains_by_group_by_step: dict[int, dict[str, str]] = field(default_factory=dict)


class Ledger:
    """Consumed ids by run and step. Bounded: old steps of a run, and long unused runs, sink under the line."""

    def __init__(self, horizon_steps: int, max_runs: int) -> None:
        self._horizon_steps = horizon_steps
        self._max_runs = max_runs
        self._runs: OrderedDict[str, _Run] = OrderedDict()
        self._retired: OrderedDict[str, int] = OrderedDict()

    def admit(self, run_id: str, step: int, group_id: str, domain: str) -> Admission:
        """Note a group as consumed, unless it was or cannot be told."""
        if step < self._first_known_step(run_id):
            return Admission.TOO_OLD
        steps = self._run(run_id).domains_by_group_by_step
        if step not in steps and len(steps) >= self._horizon_steps and step < min(steps):
            return Admission.TOO_OLD
        groups = steps.setdefault(step, {})
        if group_id in groups:
            return Admission.DUPLICATE
        groups[group_id] = domain
        # Counted in steps seen, not in step numbers: one absurd number must not push everything under the line.
        while len(steps) > self._horizon_steps:
            oldest = min(steps)
            del steps[oldest]
            self._run(run_id).first_known_step = oldest + 1
        return Admission.NEW

    def may_have_labels_of(self, run_id: str, step: int) -> bool:
        """Whether a label of the step was consumed, or cannot be ruled out."""
        if step < self._first_known_step(run_id):
            return True
        run = self._runs.get(run_id)
        return run is not None and step in run.domains_by_group_by_step

    def has_domain_in(self, run_id: str, step: int, domain: str) -> bool:
        """Whether a label of the domain was consumed in the step."""
        run = self._runs.get(run_id)
        return run is not None and domain in run.domains_by_group_by_step.get(step, {}).values()

    def _first_known_step(self, run_id: str) -> int:
        run = self._runs.get(run_id)
        return run.first_known_step if run is not None else self._retired.get(run_id, 0)

    def _run(self, run_id: str) -> _Run:
        run = self._runs.get(run_id)
        if run is None:
            run = self._runs[run_id] = _Run(self._retired.pop(run_id, 0))
            while len(self._runs) > self._max_runs:
                self._retire()
        self._runs.move_to_end(run_id)
        return run

    def _retire(self) -> None:
        run_id, run = self._runs.popitem(last=False)
        self._retired[run_id] = max(run.domains_by_group_by_step, default=run.first_known_step - 1) + 1
        while len(self._retired) > _MAX_RETIRED_RUNS:
            self._retired.popitem(last=False)

    def to_json(self) -> dict[str, Any]:
        """Return everything known, as JSON: independent of later changes."""
        return {
            "retired": dict(self._retired),
            "runs": [
                {"run_id": run_id, "first_known_step": run.first_known_step, "steps": _groups_by_domain(run)}
                for run_id, run in self._runs.items()
            ],
        }

    def restore(self, document: dict[str, Any]) -> None:
        """Take over what `to_json` gave."""
        self._retired = OrderedDict(document["retired"])
        for saved in document["runs"]:
            self._runs[saved["run_id"]] = _Run(
                saved["first_known_step"],
                {
                    int(step): {group: domain for domain, groups in domains.items() for group in groups}
                    for step, domains in saved["steps"].items()
                },
            )


def _groups_by_domain(run: _Run) -> dict[str, dict[str, list[str]]]:
    """Step → domain → groups: a domain's name is written once a step, not once a group."""
    steps: dict[str, dict[str, list[str]]] = {}
    for step, domains in run.domains_by_group_by_step.items():
        by_domain = steps[str(step)] = {}
        for group, domain in domains.items():
            by_domain.setdefault(domain, []).append(group)
    return steps
