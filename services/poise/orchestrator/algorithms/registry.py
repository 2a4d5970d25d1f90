"""All algorithms, by name. To add one, add its options to the union."""

from __future__ import annotations

from typing import Annotated, Any, get_args

from pydantic import BeforeValidator, Field

from poise.orchestrator.algorithms.dapo import DapoOptions
from poise.orchestrator.algorithms.group import (
    BatchMeanOptions,
    DrGrpoOptions,
    GrpoOptions,
    NoneOptions,
    OpoOptions,
    ReinforcePpOptions,
    RlooOptions,
)
from poise.orchestrator.algorithms.poise import PoiseOptions
from poise.orchestrator.algorithms.ppo import PpoOptions
from poise.orchestrator.algorithms.spo import SpoOptions


def _options_of_name(value: Any) -> Any:
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
    | NoneOptions
    | BatchMeanOptions
)

_Options = Annotated[AnyOptions, Field(discriminator="kind")]
_Name = Annotated[
    str, Field(json_schema_extra={"enum": [cls.model_fields["kind"].default for cls in get_args(AnyOptions)]})
]

AlgorithmConfig = Annotated[_Options, BeforeValidator(_options_of_name, json_schema_input_type=_Name | _Options)]
"""Settings of an algorithm: its name, or a mapping of `kind` and options."""
