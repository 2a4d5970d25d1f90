"""All that the service must not lose, as one immutable value.

Owns no format, see `pieces`, and no files, see `state`. Probes, pins, windows and consumed ids belong together: a probe
that survived without the ids it has seen could be pinned for a step whose labels it knows. So they are only ever
written and read as one.
"""

from __future__ import annotations

from dataclasses import dataclass

from poise.value.dedup import LedgerSnapshot
from poise.value.probe.diagnostics import ValuedGroup
from poise.value.probe.features import LabelledRows
from poise.value.step_probes import Pin, VersionedProbe


@dataclass(frozen=True, slots=True, eq=False)
class DomainSnapshot:
    """One domain."""

    domain: str
    groups: tuple[LabelledRows, ...]
    """The window, oldest first."""
    num_added: int
    """Groups ever added to the window."""
    num_steps_seen: int
    """Distinct (run, step) with a consumed label of this domain."""
    probe: VersionedProbe | None
    record: tuple[ValuedGroup, ...] = ()
    """`TrackRecord.groups`."""
    num_recorded: int = 0
    """Groups ever added to the record."""


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """The whole state."""

    instance_id: str
    """Names the state's owner to the queue, so that after a restart it finds what it still owes."""
    domains: tuple[DomainSnapshot, ...]
    ledger: LedgerSnapshot
    pins: tuple[Pin, ...]
    """`StepPins.all`."""
    num_groups_consumed: int
    num_duplicates: int
    newest_entry: str = ""
    """Id of the newest queue entry that was learnt: a queue that ends before it has lost labels."""
