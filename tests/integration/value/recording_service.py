"""The value service, which also records the labels of each fit. Tests run it as a process.

Usage: recording_service.py RECORD_FILE [options of poise.value]. Each fit adds a line before its probe can answer:
{"domain", "version", "seen": [[run_id, step], ...]}. Of two lines with the same version the later one is valid: the
process of the earlier one died before the probe was saved.

A test can look into a phase, or kill the process in it: RECORD_FILE.order contains {"phase", "delay_s", "dies"}. That
long after the phase next begins, the current phases are written to RECORD_FILE.phases, and the process dies if `dies`
is set. While RECORD_FILE.hold exists, fits do not end.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

from poise.queue.redis_queue import RedisQueue
from poise.runtime.cli.service_main import service_main
from poise.value import app, servicer
from poise.value.config import ValueConfig
from poise.value.dedup import Admission
from poise.value.estimators.features import Label
from poise.value.estimators.probe.incremental import IncrementalFitter
from poise.value.estimators.probe.model import FittedProbe
from poise.value.estimators.score.fitter import ScoreFitter
from poise.value.estimators.score.model import FittedScore
from poise.value.label_barrier import wait_for_labels
from poise.value.state import ValueState
from poise.value.store import Snapshot, StateStore
from poise.value.updater import Updater

Fitted = TypeVar("Fitted")

seen_by_probe: dict[int, list[tuple[str, int]]] = {}
record_file = Path(sys.argv[1])
order_file, phases_file, hold_file = (record_file.with_suffix(f".{name}") for name in ("order", "phases", "hold"))
current_phases = Counter[str]()
consuming = ExitStack()


@contextmanager
def phase(name: str) -> Iterator[None]:
    current_phases[name] += 1
    if order_file.exists():
        order = json.loads(order_file.read_text())
        if order["phase"] == name:
            order_file.unlink()
            threading.Timer(order["delay_s"], write_phases, [order["dies"]]).start()
    try:
        yield
    finally:
        current_phases[name] -= 1


def write_phases(dies: bool) -> None:
    partial = phases_file.with_suffix(".part")
    partial.write_text(json.dumps(sorted(+current_phases)))
    partial.replace(phases_file)
    if dies:
        os.kill(os.getpid(), signal.SIGKILL)


def recorded(fit: Callable[[Sequence[Label]], Fitted], groups: Sequence[Label]) -> Fitted:
    with phase("fit"):
        fitted = fit(groups)
        while hold_file.exists():
            time.sleep(0.01)
    seen_by_probe[id(fitted)] = sorted({(group.run_id, group.step) for group in groups})
    return fitted


class RecordingFitter(IncrementalFitter):
    def fit(self, groups: Sequence[Label]) -> FittedProbe:
        return recorded(super().fit, groups)


class RecordingScoreFitter(ScoreFitter):
    def fit(self, groups: Sequence[Label]) -> FittedScore:
        return recorded(super().fit, groups)


class RecordingEstimator(ValueState):
    """The phase "consume" lasts from the first label of a batch until the queue has acknowledged all of them."""

    def learn(self, label: Label) -> Admission:
        if not current_phases["consume"]:
            consuming.enter_context(phase("consume"))
        return super().learn(label)


class RecordingQueue(RedisQueue):
    async def publish(self, payloads: Sequence[bytes]) -> None:
        with phase("publish"):
            await super().publish(payloads)

    async def ack(self, entry_ids: Sequence[str]) -> None:
        with consuming:
            await super().ack(entry_ids)


class RecordingStore(StateStore):
    def save(self, snapshot: Snapshot) -> Path:
        for domain in snapshot.domains:
            seen = domain.probe and seen_by_probe.pop(id(domain.probe.probe), None)
            if domain.probe and seen is not None:
                line = {"domain": domain.domain, "version": domain.probe.version, "seen": seen}
                with record_file.open("a") as file:
                    file.write(json.dumps(line) + "\n")
        with phase("checkpoint"):
            return super().save(snapshot)


async def recording_wait(
    updater: Updater, run_id: str, domains: Collection[str], limit_s: float
) -> frozenset[str] | None:
    with phase("wait_for_labels"):
        return await wait_for_labels(updater, run_id, domains, limit_s)


if __name__ == "__main__":
    app.IncrementalFitter, app.ScoreFitter = RecordingFitter, RecordingScoreFitter
    app.ValueState = RecordingEstimator
    app.RedisQueue, app.StateStore = RecordingQueue, RecordingStore
    servicer.wait_for_labels = recording_wait
    sys.exit(service_main("value", ValueConfig, app.build, sys.argv[2:]))
