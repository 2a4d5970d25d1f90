"""Which labelled groups were consumed: what makes the probe learn each at most once.

Owns ids alone: exact ones for the most recent steps of a run, and below them a line under which nothing is known
any more, hence nothing is admitted.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto

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


@dataclass(frozen=True, slots=True, eq=False)
class RunEntries:
    """What is known of one run. Immutable, and the same object until the run's next label."""

    run_id: str
    revision: int
    """`LedgerSnapshot.revision` when it last changed: of a run, two with the same number are the same."""
    first_known_step: int
    steps: tuple[tuple[int, bytes], ...]
    """Each step with its groups by domain, as JSON."""


@dataclass(frozen=True, slots=True, eq=False)
class LedgerSnapshot:
    """All that a ledger knows, independent of later changes."""

    revision: int = 0
    """Grows with every change."""
    retired: Mapping[str, int] = field(default_factory=dict)
    """The first known step of runs of which no more is known."""
    retired_revision: int = 0
    """The same of `retired`."""
    runs: tuple[RunEntries, ...] = ()
    """The least recently used first."""


@dataclass
class _Run:
    first_known_step: int = 0
    domains_by_group_by_step: dict[int, dict[str, str]] = field(default_factory=dict)
    encoded: dict[int, bytes] = field(default_factory=dict)
    """The steps that have not changed since they were last written out."""
    entries: RunEntries | None = None
    """The run, if it has not changed since."""

    def changed(self, step: int) -> None:
        """Note a change of one step."""
        self.encoded.pop(step, None)
        self.entries = None


class Ledger:
    """Consumed ids by run and step. Bounded: old steps of a run, and long unused runs, sink under the line.

    Written out often, as it grows: so what has not changed since the last time is not made again.
    """

    def __init__(self, horizon_steps: int, max_runs: int) -> None:
        self._horizon_steps = horizon_steps
        self._max_runs = max_runs
        self._runs: OrderedDict[str, _Run] = OrderedDict()
        self._retired: OrderedDict[str, int] = OrderedDict()
        self._revision = self._retired_revision = 0
        self._retired_before: Mapping[str, int] | None = None
        """The retired runs, if none came or went since they were last written out."""

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
        self._run(run_id).changed(step)
        # Counted in steps seen, not in step numbers: one absurd number must not push everything under the line.
        while len(steps) > self._horizon_steps:
            oldest = min(steps)
            del steps[oldest]
            self._run(run_id).changed(oldest)
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
            self._retired_before = None
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

    def snapshot(self) -> LedgerSnapshot:
        """Return everything known. Costs what changed since the last time."""
        self._revision += 1
        if self._retired_before is None:
            self._retired_before, self._retired_revision = dict(self._retired), self._revision
        runs = tuple(self._entries(run_id, run) for run_id, run in self._runs.items())
        return LedgerSnapshot(self._revision, self._retired_before, self._retired_revision, runs)

    def _entries(self, run_id: str, run: _Run) -> RunEntries:
        if run.entries is None:
            steps = run.domains_by_group_by_step
            for step in steps.keys() - run.encoded.keys():
                run.encoded[step] = _encode(steps[step])
            run.entries = RunEntries(run_id, self._revision, run.first_known_step, tuple(run.encoded.items()))
        return run.entries

    def restore(self, saved: LedgerSnapshot) -> None:
        """Take over what `snapshot` gave."""
        self._revision = saved.revision
        self._retired, self._retired_before = OrderedDict(saved.retired), saved.retired
        self._retired_revision = saved.retired_revision
        for entries in saved.runs:
            groups = {step: dict(step_groups(encoded)) for step, encoded in entries.steps}
            self._runs[entries.run_id] = _Run(entries.first_known_step, groups, dict(entries.steps), entries)


def step_groups(encoded: bytes) -> Mapping[str, str]:
    """Return the domains of a step's groups, by group, from `RunEntries.steps`."""
    return {group: domain for domain, groups in json.loads(encoded).items() for group in groups}


def _encode(domains_by_group: Mapping[str, str]) -> bytes:
    """Domain → groups: a domain's name is written once a step, not once a group."""
    by_domain: dict[str, list[str]] = {}
    for group, domain in domains_by_group.items():
        by_domain.setdefault(domain, []).append(group)
    return json.dumps(by_domain, separators=(",", ":")).encode()
