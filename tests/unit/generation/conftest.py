"""Settings and engines for the tests of the generation service."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.scripted_engine import ScriptedEngine

from poise.generation.config import GenerationConfig


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., GenerationConfig]:
    def build(**changes: object) -> GenerationConfig:
        defaults = {"model": "scripted", "staging_dir": tmp_path / "staging", "max_num_seqs": 4}
        return GenerationConfig(**defaults | {"default_max_tokens": 8} | changes)

    return build


@pytest.fixture
async def engine() -> ScriptedEngine:
    """A started engine."""
    engine = ScriptedEngine()
    await engine.start()
    return engine
