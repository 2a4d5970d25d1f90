"""The ids of consumed labels, so that the probe learns each label at most once.

The ids of a run's most recent steps are kept exactly. Labels of older steps are rejected as too old, because whether
they were consumed is no longer known.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto

_MAX_RETIRED_RUNS = 65_536
"""Runs of which only the first known step is kept. It bounds memory and exceeds any real number of runs."""


class Admission(Enum):
    """Whether a label may be learnt."""

    NEW = auto()
    """First delivery of this group."""
    DUPLICATE = auto()
    """The group was consumed before."""
    TOO_OLD = auto()
    """The ids of the label's step were dropped, so the label may have been consumed."""


@dataclass(frozen=True, slots=True, eq=False)
class ConsumedRun:
    """The consumed ids of one run. Immutable; `snapshot` returns the same object until the run changes."""

    run_id: str
    first_known_step: int
    """Labels of earlier steps are too old."""
    steps: Mapping[int, bytes]
    """The encoded groups of each step, see `groups_of`. The same object until the step changes."""


@dataclass(frozen=True, slots=True, eq=False)
class DedupSnapshot:
    """All consumed ids, unaffected by later changes."""

    runs: tuple[ConsumedRun, ...] = ()
    """Least recently used first."""
    retired: Mapping[str, int] = field(default_factory=dict)
    """The first known step of runs whose ids were dropped. The same object until it changes."""


@dataclass
class _Run:
    first_known_step: int = 0
    domain_by_group_by_step: dict[int, dict[str, str]] = field(default_factory=dict)
    encoded: dict[int, bytes] = field(default_factory=dict)
    """The steps that have not changed since the last snapshot."""
    snapshot: ConsumedRun | None = None
    """None if the run has changed since the last snapshot."""

    def mark_changed(self, step: int) -> None:
        self.encoded.pop(step, None)
        self.snapshot = None


class ConsumedLabels:
    """Consumed ids by run and step.

    Bounded: it drops the oldest steps of a run and the least recently used runs. Snapshots are frequent, so `snapshot`
    encodes only what has changed since the last one.
    """

    def __init__(self, horizon_steps: int, max_runs: int, saved: DedupSnapshot | None = None) -> None:
        self._horizon_steps = horizon_steps
        self._max_runs = max_runs
        saved = saved or DedupSnapshot()
        self._retired: OrderedDict[str, int] = OrderedDict(saved.retired)
        self._retired_snapshot: Mapping[str, int] | None = saved.retired
        """None if `_retired` has changed since the last snapshot."""
        self._runs: OrderedDict[str, _Run] = OrderedDict()
        for run in saved.runs:
            steps = {step: groups_of(encoded) for step, encoded in run.steps.items()}
            self._runs[run.run_id] = _Run(run.first_known_step, steps, dict(run.steps), run)

    def admit(self, run_id: str, step: int, group_id: str, domain: str) -> Admission:
        """Record a group as consumed if it is new; return whether it is."""
        if step < self._first_known_step(run_id):
            return Admission.TOO_OLD
        run = self._use(run_id)
        steps = run.domain_by_group_by_step
        if step not in steps and len(steps) >= self._horizon_steps and step < min(steps):
            return Admission.TOO_OLD
        groups = steps.setdefault(step, {})
        if group_id in groups:
            return Admission.DUPLICATE
        groups[group_id] = domain
        run.mark_changed(step)
        # Count steps seen, not step numbers: one absurdly high number must not make all other steps too old.
        while len(steps) > self._horizon_steps:
            oldest = min(steps)
            del steps[oldest]
            run.mark_changed(oldest)
            run.first_known_step = oldest + 1
        return Admission.NEW

    def may_have_labels_of(self, run_id: str, step: int) -> bool:
        """Whether a label of the step was consumed, or may have been."""
        if step < self._first_known_step(run_id):
            return True
        run = self._runs.get(run_id)
        return run is not None and step in run.domain_by_group_by_step

    def has_domain_in(self, run_id: str, step: int, domain: str) -> bool:
        """Whether a label of the domain was consumed in the step."""
        run = self._runs.get(run_id)
        return run is not None and domain in run.domain_by_group_by_step.get(step, {}).values()

    def _first_known_step(self, run_id: str) -> int:
        run = self._runs.get(run_id)
        return run.first_known_step if run is not None else self._retired.get(run_id, 0)

    def _use(self, run_id: str) -> _Run:
        """Return the run, creating it if necessary, and mark it as most recently used."""
        run = self._runs.get(run_id)
        if run is None:
            self._retired_snapshot = None
            run = self._runs[run_id] = _Run(self._retired.pop(run_id, 0))
            while len(self._runs) > self._max_runs:
                self._retire_oldest()
        self._runs.move_to_end(run_id)
        return run

    def _retire_oldest(self) -> None:
        run_id, run = self._runs.popitem(last=False)
        self._retired[run_id] = max(run.domain_by_group_by_step, default=run.first_known_step - 1) + 1
        while len(self._retired) > _MAX_RETIRED_RUNS:
            self._retired.popitem(last=False)

    def snapshot(self) -> DedupSnapshot:
        """Return all consumed ids. Costs only what has changed since the last snapshot."""
        if self._retired_snapshot is None:
            self._retired_snapshot = dict(self._retired)
        for run_id, run in self._runs.items():
            if run.snapshot is None:
                for step in run.domain_by_group_by_step.keys() - run.encoded.keys():
                    run.encoded[step] = _encode(run.domain_by_group_by_step[step])
                run.snapshot = ConsumedRun(run_id, run.first_known_step, dict(run.encoded))
        return DedupSnapshot(tuple(run.snapshot for run in self._runs.values() if run.snapshot), self._retired_snapshot)


def groups_of(encoded: bytes) -> dict[str, str]:
    """Return the domain of each group of a step in `ConsumedRun.steps`."""
    return {group: domain for domain, groups in json.loads(encoded).items() for group in groups}


def _encode(domain_by_group: Mapping[str, str]) -> bytes:
    """Return JSON {domain: [group, ...]}, which names each domain once."""
    by_domain: dict[str, list[str]] = {}
    for group, domain in domain_by_group.items():
        by_domain.setdefault(domain, []).append(group)
    return json.dumps(by_domain, separators=(",", ":")).encode()
