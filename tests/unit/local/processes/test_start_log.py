"""When the progress of a start is logged."""

from __future__ import annotations

import pytest

from poise.local.processes import start_log
from poise.local.processes.start_log import StartLog


def test_unchanged_stage_is_logged_at_growing_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(start_log.time, "monotonic", lambda: now[0])
    log, said = StartLog(15.0), []
    for second in range(600):
        now[0] = float(second)
        stage = "starting" if second < 50 else "loading weights"
        if log.is_due([f"generation: {stage}, {second} s"]):
            said.append(second)
    assert said == [16, 32, 50, 66, 97, 158, 279, 400, 521]


def test_new_stage_is_logged_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(start_log.time, "monotonic", lambda: now[0])
    log = StartLog(15.0)
    now[0] = 16
    assert log.is_due(["generation: loading weights, 16 s"])
    now[0] = 20
    assert not log.is_due(["generation: the engine died"])
    now[0] = 32
    assert log.is_due(["generation: the engine died"])
