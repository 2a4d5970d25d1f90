"""Whether someone is told why sampling stands still while weights load."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from poise.generation.engines.vllm.weights.updates import prepare_weights


class FakeEngine:
    """Two ranks that say the same, and are done at the second question."""

    errored = False

    def __init__(self) -> None:
        self.told: tuple[int, str] = (logging.NOTSET, "")
        self.preparing = [[True, False], [False, False]]

    async def collective_rpc(self, method: str, args: tuple[str, ...] = ()) -> list[Any]:
        if method == "poise_prepare":
            assert args == ("weights",)
            return [list(self.told)] * 2
        assert method == "poise_is_preparing"
        return self.preparing.pop(0) if len(self.preparing) > 1 else self.preparing[0]


@pytest.mark.parametrize("level", [logging.INFO, logging.WARNING])
async def test_an_obstacle_is_told_once_until_it_is_another(level: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    engine = FakeEngine()
    known = ""
    for obstacle in ("no room", "no room", "", "no room", "no turn"):
        engine.told = (level, obstacle)
        known = await prepare_weights(engine, Path("weights"), known)
        assert known == obstacle
    assert [record.levelno for record in caplog.records] == [level] * 3
    told = [record.getMessage().rpartition(": ")[2] for record in caplog.records]
    assert told == ["no room", "no room", "no turn"]


async def test_it_is_waited_until_the_weights_are_ready_and_nothing_is_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    engine = FakeEngine()
    assert await prepare_weights(engine, Path("weights"), "no room") == ""
    assert len(engine.preparing) == 1
    assert not caplog.records
