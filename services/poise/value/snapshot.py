"""All that the service must not lose, as one immutable value, and its form as arrays and JSON.

Owns the format. Knows no files. Probes, pins, windows and consumed ids belong together: a probe that survived without
the ids it has seen could be pinned for a step whose labels it knows. So they are only ever written and read as one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.value.pins import Pin, VersionedProbe
from poise.value.probe import FittedProbe
from poise.value.rows import FeatureRows, LabelledRows
from poise.value.track_record import ValuedGroup

SCHEMA_VERSION = 2

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
    record: tuple[ValuedGroup, ...] = ()
    """`TrackRecord.groups`."""


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """The whole state."""

    instance_id: str
    """Names the state's owner to the queue, so that after a restart it finds what it still owes."""
    domains: tuple[DomainSnapshot, ...]
    ledger: dict[str, Any]
    """`Ledger.to_json`."""
    pins: tuple[Pin, ...]
    """`StepPins.all`."""
    num_groups_consumed: int
    num_duplicates: int

    def encode(self) -> tuple[dict[str, Any], Arrays]:
        """Return a JSON document and the arrays it refers to."""
        arrays: Arrays = {}
        probes: dict[int, tuple[str, VersionedProbe]] = {}  # by identity: many pins hold the same
        for domain in self.domains:
            if domain.probe is not None:
                probes[id(domain.probe)] = domain.domain, domain.probe
        for _, _, pinned in self.pins:
            probes |= {id(probe): (name, probe) for name, probe in pinned.items()}
        numbers = {key: number for number, key in enumerate(probes)}
        for number, (_, probe) in enumerate(probes.values()):
            arrays |= {f"probe.{number}.{name}": array for name, array in probe.probe.arrays().items()}
        for index, domain in enumerate(self.domains):
            arrays |= _window_arrays(f"window.{index}", domain.groups) | _record_arrays(
                f"record.{index}", domain.record
            )
        document = {
            "schema_version": SCHEMA_VERSION,
            "instance_id": self.instance_id,
            "num_groups_consumed": self.num_groups_consumed,
            "num_duplicates": self.num_duplicates,
            "ledger": self.ledger,
            "probes": [
                {"domain": name, "version": probe.version, "num_added": probe.num_added, "fit_s": probe.fit_s}
                for name, probe in probes.values()
            ],
            "domains": [
                _domain_document(domain) | {"probe": domain.probe and numbers[id(domain.probe)]}
                for domain in self.domains
            ],
            "pins": [
                [run_id, step, [numbers[id(probe)] for probe in pinned.values()]] for run_id, step, pinned in self.pins
            ],
        }
        return document, arrays

    @staticmethod
    def decode(document: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Snapshot:
        """Rebuild what `encode` gave.

        Raises:
            ValueError: another schema version.
            LookupError, TypeError: not what `encode` gives.
        """
        if document["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema_version is {document['schema_version']}; this release reads {SCHEMA_VERSION}")
        probes = _decode_probes(document["probes"], arrays)
        return Snapshot(
            instance_id=document["instance_id"],
            domains=tuple(
                _decode_domain(index, saved, arrays, probes) for index, saved in enumerate(document["domains"])
            ),
            ledger=document["ledger"],
            pins=tuple(
                (run_id, step, dict(probes[number] for number in numbers)) for run_id, step, numbers in document["pins"]
            ),
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


def _record_arrays(prefix: str, groups: tuple[ValuedGroup, ...]) -> Arrays:
    if not groups:
        return {}
    return {
        f"{prefix}.values": np.concatenate([group.values for group in groups]),
        f"{prefix}.rewards": np.concatenate([group.rewards for group in groups]),
    }


def _domain_document(domain: DomainSnapshot) -> dict[str, Any]:
    return {
        "domain": domain.domain,
        "num_added": domain.num_added,
        "num_steps_seen": domain.num_steps_seen,
        "groups": [[group.run_id, group.step, group.group_id, len(group.rows)] for group in domain.groups],
        "record": [[group.run_id, group.step, len(group.values)] for group in domain.record],
    }


def _decode_probes(
    saved: Sequence[Mapping[str, Any]], arrays: Mapping[str, NDArray[Any]]
) -> list[tuple[str, VersionedProbe]]:
    """Return each probe with its domain."""
    parameters: list[dict[str, NDArray[Any]]] = [{} for _ in saved]
    for name, array in arrays.items():
        kind, number, parameter = name.split(".")
        if kind == "probe":
            parameters[int(number)][parameter] = array
    return [
        (
            each["domain"],
            VersionedProbe(each["version"], FittedProbe.from_arrays(own), each["num_added"], each["fit_s"]),
        )
        for each, own in zip(saved, parameters, strict=True)
    ]


def _decode_domain(
    index: int,
    saved: Mapping[str, Any],
    arrays: Mapping[str, NDArray[Any]],
    probes: Sequence[tuple[str, VersionedProbe]],
) -> DomainSnapshot:
    groups = []
    start = 0
    window = {name: arrays[f"window.{index}.{name}"] for name in _WINDOW_ARRAYS if saved["groups"]}
    for run_id, step, group_id, num_rows in saved["groups"]:
        end = start + num_rows
        *features, rewards = (window[name][start:end] for name in _WINDOW_ARRAYS)
        groups.append(LabelledRows(run_id, step, group_id, saved["domain"], FeatureRows(*features), rewards))
        start = end
    record = []
    start = 0
    for run_id, step, num_rows in saved["record"]:
        end = start + num_rows
        values, rewards = (arrays[f"record.{index}.{name}"][start:end] for name in ("values", "rewards"))
        record.append(ValuedGroup(run_id, step, values, rewards))
        start = end
    probe = None if saved["probe"] is None else probes[saved["probe"]][1]
    return DomainSnapshot(
        saved["domain"], tuple(groups), saved["num_added"], saved["num_steps_seen"], probe, tuple(record)
    )


_WINDOW_ARRAYS = ("prompt_hidden", "response_hidden", "entropies", "rewards")
"""The first three are those of `FeatureRows`, in its order."""
