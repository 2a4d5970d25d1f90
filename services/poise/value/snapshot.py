"""All that the service must not lose, as one immutable value, and its form as arrays and JSON.

Owns the format. Knows no files. Probes, windows and consumed ids belong together: a probe that survived without the
ids it has seen could be pinned for a step whose labels it knows. So they are only ever written and read as one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.value.pins import VersionedProbe
from poise.value.probe import FittedProbe
from poise.value.rows import FeatureRows, LabelledRows

SCHEMA_VERSION = 1

Arrays = dict[str, NDArray[Any]]


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


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """The whole state."""

    instance_id: str
    """Names the state's owner to the queue, so that after a restart it finds what it still owes."""
    domains: tuple[DomainSnapshot, ...]
    ledger: dict[str, Any]
    """`Ledger.to_json`."""
    num_groups_consumed: int
    num_duplicates: int

    def encode(self) -> tuple[dict[str, Any], Arrays]:
        """Return a JSON document and the arrays it refers to."""
        arrays: Arrays = {}
        domains = []
        for index, domain in enumerate(self.domains):
            arrays |= _window_arrays(f"{index}.window", domain.groups)
            if domain.probe is not None:
                arrays |= {f"{index}.probe.{name}": array for name, array in domain.probe.probe.arrays().items()}
            domains.append(_domain_document(domain))
        document = {
            "schema_version": SCHEMA_VERSION,
            "instance_id": self.instance_id,
            "num_groups_consumed": self.num_groups_consumed,
            "num_duplicates": self.num_duplicates,
            "ledger": self.ledger,
            "domains": domains,
        }
        return document, arrays

    @staticmethod
    def decode(document: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Snapshot:
        """Rebuild what `encode` gave.

        Raises:
            ValueError: another schema version.
            KeyError, TypeError: not what `encode` gives.
        """
        if document["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema_version is {document['schema_version']}; this release reads {SCHEMA_VERSION}")
        return Snapshot(
            instance_id=document["instance_id"],
            domains=tuple(_decode_domain(index, saved, arrays) for index, saved in enumerate(document["domains"])),
            ledger=document["ledger"],
            num_groups_consumed=document["num_groups_consumed"],
            num_duplicates=document["num_duplicates"],
        )


def _window_arrays(prefix: str, groups: tuple[LabelledRows, ...]) -> Arrays:
    if not groups:
        return {}
    rows = FeatureRows.concatenate([group.rows for group in groups])
    return {
        f"{prefix}.prompt_hidden": rows.prompt_hidden,
        f"{prefix}.response_hidden": rows.response_hidden,
        f"{prefix}.entropies": rows.entropies,
        f"{prefix}.rewards": np.concatenate([group.rewards for group in groups]),
    }


def _domain_document(domain: DomainSnapshot) -> dict[str, Any]:
    probe = domain.probe
    return {
        "domain": domain.domain,
        "num_added": domain.num_added,
        "num_steps_seen": domain.num_steps_seen,
        "groups": [[group.run_id, group.step, group.group_id, len(group.rows)] for group in domain.groups],
        "probe": probe and {"version": probe.version, "num_added": probe.num_added, "fit_s": probe.fit_s},
    }


def _decode_domain(index: int, saved: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> DomainSnapshot:
    groups = []
    start = 0
    for run_id, step, group_id, num_rows in saved["groups"]:
        window = {name: arrays[f"{index}.window.{name}"] for name in _WINDOW_ARRAYS}
        rewards = window.pop("rewards")
        end = start + num_rows
        rows = FeatureRows(**window).part(start, end)
        groups.append(LabelledRows(run_id, step, group_id, saved["domain"], rows, rewards[start:end]))
        start = end
    probe = None
    if saved["probe"] is not None:
        prefix = f"{index}.probe."
        parameters = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
        probe = VersionedProbe(probe=FittedProbe.from_arrays(parameters), **saved["probe"])
    return DomainSnapshot(saved["domain"], tuple(groups), saved["num_added"], saved["num_steps_seen"], probe)


_WINDOW_ARRAYS = ("prompt_hidden", "response_hidden", "entropies", "rewards")
