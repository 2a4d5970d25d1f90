"""The algorithms there are, by name. One more is one more name in the union."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from poise.orchestrator.algorithms.dapo import DapoOptions
from poise.orchestrator.algorithms.group import DrGrpoOptions, GrpoOptions, OpoOptions, ReinforcePpOptions, RlooOptions
from poise.orchestrator.algorithms.poise import PoiseOptions
from poise.orchestrator.algorithms.ppo import PpoOptions
from poise.orchestrator.algorithms.spo import SpoOptions


def _by_one_word(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


AnyOptions = (
    PoiseOptions
    | RlooOptions
    | GrpoOptions
    | DrGrpoOptions
    | DapoOptions
    | OpoOptions
    | ReinforcePpOptions
    | SpoOptions
    | PpoOptions
)

AlgorithmConfig = Annotated[Annotated[AnyOptions, Field(discriminator="kind")], BeforeValidator(_by_one_word)]
"""Settings of an algorithm: its name, or its name as `kind` and its options."""
