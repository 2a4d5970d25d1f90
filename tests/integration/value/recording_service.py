"""The value service as it is, which besides writes down what each probe was fitted on: run by the tests as a process.

Usage: recording_service.py RECORD_FILE [options of poise.value]. A line a fit, before its probe can answer:
{"domain", "version", "seen": [[run_id, step], ...]}. Of two lines with the same version the later holds: the earlier
probe died with its process before it was durable.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from poise.runtime.main import service_main
from poise.value import app
from poise.value.config import ValueConfig
from poise.value.gram import GramFitter
from poise.value.keeper import StateKeeper
from poise.value.pins import VersionedProbe
from poise.value.probe import FittedProbe
from poise.value.rows import LabelledRows

seen_by_probe: dict[int, list[tuple[str, int]]] = {}
record_file = Path(sys.argv[1])


class RecordingFitter(GramFitter):
    def fit(self, groups: Sequence[LabelledRows]) -> FittedProbe:
        probe = super().fit(groups)
        seen_by_probe[id(probe)] = sorted({(group.run_id, group.step) for group in groups})
        return probe


class RecordingKeeper(StateKeeper):
    async def install(self, domain: str, probe: VersionedProbe) -> None:
        line = {"domain": domain, "version": probe.version, "seen": seen_by_probe[id(probe.probe)]}
        with record_file.open("a") as file:
            file.write(json.dumps(line) + "\n")
        await super().install(domain, probe)


if __name__ == "__main__":
    app.GramFitter, app.StateKeeper = RecordingFitter, RecordingKeeper
    sys.exit(service_main("value", ValueConfig, app.build, sys.argv[2:]))
