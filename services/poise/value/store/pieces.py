"""A snapshot as pieces that never change, and a small document that says which of them make it up.

Owns the format. Knows no files. A save costs what is new: windows and records are logs, cut into segments of which the
newest alone is new; a probe, and the consumed ids of a run, are a piece each, named by what they were when they last
changed. Whoever stores pieces may rely on the name: in one history it never names two contents.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from poise.value.dedup import LedgerSnapshot, RunEntries
from poise.value.probe.diagnostics import ValuedGroup
from poise.value.probe.features import FeatureRows, LabelledRows
from poise.value.probe.model import FittedProbe
from poise.value.step_probes import StepPin, VersionedProbe
from poise.value.store.snapshot import DomainSnapshot, Snapshot

SCHEMA_VERSION = 3

Arrays = dict[str, NDArray[Any]]
Document = dict[str, Any]
"""JSON."""
Segment = tuple[int, int]
"""A stretch of a log: [first, end), counted from the first entry ever."""

_Entry = TypeVar("_Entry")

_MOST_SEGMENTS = 32
"""Of a log; one more, and it is written anew as one: a start reads few files, and a save seldom writes all."""


def split(snapshot: Snapshot, before: Document | None) -> tuple[Document, dict[str, Callable[[], Arrays]]]:
    """Return the document, and by name what makes each piece that it refers to.

    `before` is the document of an earlier state in whose company this one is stored: pieces are cut as they were.
    """
    pieces: dict[str, Callable[[], Arrays]] = {}
    probes: dict[tuple[str, int], VersionedProbe] = {}
    for domain in snapshot.domains:
        if domain.probe is not None:
            probes[domain.domain, domain.probe.version] = domain.probe
    for _, _, pin in snapshot.pins:
        probes |= {(name, probe.version): probe for name, probe in pin.probes.items()}
    numbers = {key: number for number, key in enumerate(probes)}
    for (name, version), probe in probes.items():
        pieces[_probe_piece(name, version)] = probe.probe.arrays

    cut_before = {each["domain"]: each for each in before["domains"]} if before else {}
    domains = []
    for domain in snapshot.domains:
        cut = cut_before.get(domain.domain, {})
        window = _segments(domain.num_added, len(domain.groups), cut.get("window", ()))
        record = _segments(domain.num_recorded, len(domain.record), cut.get("record", ()))
        pieces |= _log_pieces("window", domain.domain, window, domain.num_added, domain.groups, _window_arrays)
        pieces |= _log_pieces("record", domain.domain, record, domain.num_recorded, domain.record, _record_arrays)
        domains.append(
            {
                "domain": domain.domain,
                "num_added": domain.num_added,
                "num_groups": len(domain.groups),
                "window": window,
                "num_recorded": domain.num_recorded,
                "num_judged": len(domain.record),
                "record": record,
                "num_steps_seen": domain.num_steps_seen,
                "probe": domain.probe and numbers[domain.domain, domain.probe.version],
            }
        )

    ledger = snapshot.ledger
    pieces[_retired_piece(ledger.retired_revision)] = partial(_as_bytes, ledger.retired)
    pieces |= {_run_piece(run.run_id, run.revision): partial(_run_arrays, run) for run in ledger.runs}
    document = {
        "schema_version": SCHEMA_VERSION,
        "instance_id": snapshot.instance_id,
        "num_groups_consumed": snapshot.num_groups_consumed,
        "num_duplicates": snapshot.num_duplicates,
        "newest_entry": snapshot.newest_entry,
        "ledger": {
            "revision": ledger.revision,
            "retired_revision": ledger.retired_revision,
            "runs": [[run.run_id, run.revision] for run in ledger.runs],
        },
        "probes": [
            {"domain": name, "version": version, "num_added": probe.num_added, "fit_s": probe.fit_s}
            for (name, version), probe in probes.items()
        ],
        "domains": domains,
        "pins": [
            [run_id, step, [numbers[name, probe.version] for name, probe in pin.probes.items()]]
            for run_id, step, pin in snapshot.pins
        ],
        # Beside the pins: releases that know nothing of it read the rest.
        "behind": [None if pin.behind is None else sorted(pin.behind) for _, _, pin in snapshot.pins],
    }
    return document, pieces


def join(document: Mapping[str, Any], pieces: Mapping[str, Mapping[str, NDArray[Any]]]) -> Snapshot:
    """Rebuild what `split` gave.

    Raises:
        LookupError, TypeError, ValueError: not what `split` gives.
    """
    probes = [
        (
            each["domain"],
            VersionedProbe(
                each["version"],
                FittedProbe.from_arrays(dict(pieces[_probe_piece(each["domain"], each["version"])])),
                each["num_added"],
                each["fit_s"],
            ),
        )
        for each in document["probes"]
    ]
    ledger, pins = document["ledger"], document["pins"]
    behind = document.get("behind", [None] * len(pins))  # absent in states of earlier releases
    return Snapshot(
        instance_id=document["instance_id"],
        domains=tuple(_domain(each, pieces, probes) for each in document["domains"]),
        ledger=LedgerSnapshot(
            ledger["revision"],
            _from_bytes(pieces[_retired_piece(ledger["retired_revision"])]),
            ledger["retired_revision"],
            tuple(_run(name, revision, pieces[_run_piece(name, revision)]) for name, revision in ledger["runs"]),
        ),
        pins=tuple(
            (
                run_id,
                step,
                StepPin(dict(probes[number] for number in numbers), None if names is None else frozenset(names)),
            )
            for (run_id, step, numbers), names in zip(pins, behind, strict=True)
        ),
        num_groups_consumed=document["num_groups_consumed"],
        num_duplicates=document["num_duplicates"],
        newest_entry=document.get("newest_entry", ""),  # absent in states of earlier releases
    )


def _probe_piece(domain: str, version: int) -> str:
    return f"probe {domain} {version}"


def _retired_piece(revision: int) -> str:
    return f"retired {revision}"


def _run_piece(run_id: str, revision: int) -> str:
    return f"run {run_id} {revision}"


def _log_piece(kind: str, domain: str, segment: Sequence[int]) -> str:
    return f"{kind} {domain} {segment[0]} {segment[1]}"


def _segments(num_added: int, num_kept: int, before: Sequence[Sequence[int]]) -> list[Segment]:
    """Return what covers the last `num_kept` entries of a log: segments of before, and one of what came since."""
    first = num_added - num_kept
    segments = [(start, end) for start, end in before if end > first]
    written = segments[-1][1] if segments else first
    if written < num_added:
        segments.append((written, num_added))
    return segments if len(segments) <= _MOST_SEGMENTS else [(first, num_added)]


def _log_pieces(
    kind: str,
    domain: str,
    segments: Sequence[Segment],
    num_added: int,
    entries: tuple[_Entry, ...],
    encode: Callable[[Sequence[_Entry]], Arrays],
) -> Iterator[tuple[str, Callable[[], Arrays]]]:
    """Of a segment of before, what is made would lack the entries that have left: but it is not made again."""
    first = num_added - len(entries)
    for start, end in segments:
        yield (
            _log_piece(kind, domain, (start, end)),
            partial(_encode, encode, entries, max(start - first, 0), end - first),
        )


def _encode(encode: Callable[[Sequence[_Entry]], Arrays], entries: tuple[_Entry, ...], start: int, end: int) -> Arrays:
    return encode(entries[start:end])


def _window_arrays(groups: Sequence[LabelledRows]) -> Arrays:
    rows = FeatureRows.concatenate([group.rows for group in groups])
    return {
        "prompt_hidden": rows.prompt_hidden,
        "response_hidden": rows.response_hidden,
        "entropies": rows.entropies,
        "rewards": np.concatenate([group.rewards for group in groups]),
        **_as_bytes([[group.run_id, group.step, group.group_id, len(group.rows)] for group in groups]),
    }


def _record_arrays(groups: Sequence[ValuedGroup]) -> Arrays:
    return {
        "values": np.concatenate([group.values for group in groups]),
        "rewards": np.concatenate([group.rewards for group in groups]),
        **_as_bytes([[group.run_id, group.step, len(group.values)] for group in groups]),
    }


def _domain(
    saved: Mapping[str, Any],
    pieces: Mapping[str, Mapping[str, NDArray[Any]]],
    probes: Sequence[tuple[str, VersionedProbe]],
) -> DomainSnapshot:
    name = saved["domain"]
    groups = [
        LabelledRows(run_id, step, group_id, name, FeatureRows(*features), rewards)
        for segment in saved["window"]
        for (run_id, step, group_id, _), (*features, rewards) in _entries(
            pieces[_log_piece("window", name, segment)],
            ("prompt_hidden", "response_hidden", "entropies", "rewards"),  # as in `FeatureRows`
        )
    ]
    record = [
        ValuedGroup(run_id, step, values, rewards)
        for segment in saved["record"]
        for (run_id, step, _), (values, rewards) in _entries(
            pieces[_log_piece("record", name, segment)], ("values", "rewards")
        )
    ]
    return DomainSnapshot(
        name,
        _last(saved["num_groups"], groups),
        saved["num_added"],
        saved["num_steps_seen"],
        None if saved["probe"] is None else probes[saved["probe"]][1],
        _last(saved["num_judged"], record),
        saved["num_recorded"],
    )


def _entries(piece: Mapping[str, NDArray[Any]], names: Sequence[str]) -> Iterator[tuple[list[Any], list[NDArray[Any]]]]:
    """Yield each entry of a segment: its facts, the last of which is its number of rows, and its part of the arrays."""
    start = 0
    for facts in _from_bytes(piece):
        end = start + facts[-1]
        yield facts, [piece[name][start:end] for name in names]
        start = end


def _last(count: int, entries: Sequence[_Entry]) -> tuple[_Entry, ...]:
    if count > len(entries):
        raise ValueError(f"{count} entries are told of and {len(entries)} there")
    return tuple(entries[len(entries) - count :])


def _run_arrays(run: RunEntries) -> Arrays:
    steps = b",".join(b"[%d,%s]" % step for step in run.steps)
    return {"json": np.frombuffer(b"[%d,[%s]]" % (run.first_known_step, steps), np.uint8)}


def _run(run_id: str, revision: int, piece: Mapping[str, NDArray[Any]]) -> RunEntries:
    first_known_step, steps = _from_bytes(piece)
    encoded = tuple((step, json.dumps(groups, separators=(",", ":")).encode()) for step, groups in steps)
    return RunEntries(run_id, revision, first_known_step, encoded)


def _as_bytes(value: Any) -> Arrays:
    return {"json": np.frombuffer(json.dumps(value, separators=(",", ":")).encode(), np.uint8)}


def _from_bytes(piece: Mapping[str, NDArray[Any]]) -> Any:
    return json.loads(piece["json"].tobytes())
