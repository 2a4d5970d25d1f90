"""The value service as it is, which besides writes down what each probe was fitted on: run by the tests as a process.

Usage: recording_service.py RECORD_FILE [options of poise.value]. A line a fit, before its probe can answer:
{"domain", "version", "seen": [[run_id, step], ...]}. Of two lines with the same version the later holds: the earlier
probe died with its process before it was durable.

It may be ambushed: RECORD_FILE.ambush holds {"phase", "delay_s", "dies"}. So long after the phase next begins, the
phases then going on are written to RECORD_FILE.sprung, and the process dies, if it is to. While RECORD_FILE.hold
exists no fit ends.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from poise.queue.interface import Delivery
from poise.queue.redis_queue import RedisQueue
from poise.runtime.cli.service_main import service_main
from poise.value import app
from poise.value.config import ValueConfig
from poise.value.consumer import LabelConsumer
from poise.value.label_barrier import Settling
from poise.value.probe.features import LabelledRows
from poise.value.probe.incremental import GramFitter
from poise.value.probe.model import FittedProbe
from poise.value.step_probes import VersionedProbe
from poise.value.store.folder import StateStore
from poise.value.store.saver import StateKeeper
from poise.value.store.snapshot import Snapshot

seen_by_probe: dict[int, list[tuple[str, int]]] = {}
record_file = Path(sys.argv[1])
ambush_file, sprung_file, hold_file = (record_file.with_suffix(f".{name}") for name in ("ambush", "sprung", "hold"))
going_on = Counter[str]()
consuming = ExitStack()


@contextmanager
def phase(name: str) -> Iterator[None]:
    going_on[name] += 1
    if ambush_file.exists():
        ambush = json.loads(ambush_file.read_text())
        if ambush["phase"] == name:
            ambush_file.unlink()
            threading.Timer(ambush["delay_s"], spring, [ambush["dies"]]).start()
    try:
        yield
    finally:
        going_on[name] -= 1


def spring(dies: bool) -> None:
    partial = sprung_file.with_suffix(".part")
    partial.write_text(json.dumps(sorted(+going_on)))
    partial.replace(sprung_file)
    if dies:
        os.kill(os.getpid(), signal.SIGKILL)


class RecordingFitter(GramFitter):
    def fit(self, groups: Sequence[LabelledRows]) -> FittedProbe:
        with phase("fit"):
            probe = super().fit(groups)
            while hold_file.exists():
                time.sleep(0.01)
        seen_by_probe[id(probe)] = sorted({(group.run_id, group.step) for group in groups})
        return probe


class RecordingKeeper(StateKeeper):
    async def install(self, domain: str, probe: VersionedProbe) -> None:
        line = {"domain": domain, "version": probe.version, "seen": seen_by_probe[id(probe.probe)]}
        with record_file.open("a") as file:
            file.write(json.dumps(line) + "\n")
        await super().install(domain, probe)


class RecordingQueue(RedisQueue):
    async def publish(self, payloads: Sequence[bytes]) -> None:
        with phase("publish"):
            await super().publish(payloads)


class RecordingConsumer(LabelConsumer):
    """Consumes from a batch's first label until all of it is settled with the queue."""

    def _learn(self, delivery: Delivery) -> str | None:
        if not going_on["consume"]:
            consuming.enter_context(phase("consume"))
        return super()._learn(delivery)

    async def _settle(self) -> None:
        with consuming:
            await super()._settle()


class RecordingSettling(Settling):
    async def settle(self, run_id: str, asked: Collection[str], limit_s: float) -> frozenset[str] | None:
        with phase("settle"):
            return await super().settle(run_id, asked, limit_s)


class RecordingStore(StateStore):
    def save(self, snapshot: Snapshot) -> Path:
        with phase("checkpoint"):
            return super().save(snapshot)


if __name__ == "__main__":
    app.GramFitter, app.StateKeeper = RecordingFitter, RecordingKeeper
    app.RedisQueue, app.LabelConsumer, app.StateStore = RecordingQueue, RecordingConsumer, RecordingStore
    app.Settling = RecordingSettling
    sys.exit(service_main("value", ValueConfig, app.build, sys.argv[2:]))
