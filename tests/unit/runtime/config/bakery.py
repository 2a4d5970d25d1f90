"""Settings of an invented service, for the tests of settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
from pydantic import Field, SecretStr
from pydantic_settings import SettingsConfigDict

from poise.runtime.config.load import parse_config
from poise.runtime.config.settings import ConfigError, GrpcConfig, ServiceConfig, StrictModel


class OvenConfig(StrictModel):
    """Heat."""

    RENAMED: ClassVar[Mapping[str, str]] = {"heat": "degrees"}
    MOVED: ClassVar[Mapping[str, str]] = {"flour": "`doughs`"}

    degrees: float = Field(180, gt=0)
    """How hot, °C."""
    racks: dict[str, int] = Field({"upper": 1})
    """Racks by place."""
    door_code: SecretStr | None = None
    """Opens it."""


class CakeConfig(StrictModel):
    """One kind of batter."""

    kind: Literal["cake"]
    sugar_g: int = 200


class BreadConfig(StrictModel):
    """Another."""

    kind: Literal["bread"]
    rye_share: float = 0.3


class BakeryConfig(ServiceConfig):
    """A service."""

    model_config = SettingsConfigDict(env_prefix="POISE_BAKERY_")

    grpc: GrpcConfig = GrpcConfig(port=50059)
    """Where gRPC listens."""
    oven: OvenConfig = OvenConfig(degrees=200)
    """Its oven.

    Of stone."""
    doughs: tuple[Annotated[CakeConfig | BreadConfig, Field(discriminator="kind")], ...] = ()
    """What is baked."""
    shelf: Path = Path("/srv/shelf")
    """Where finished loaves are."""


def problems_of(*arguments: Any, **options: Any) -> list[str]:
    """Return the lines of the error that these settings raise."""
    with pytest.raises(ConfigError) as caught:
        parse_config(BakeryConfig, *arguments, **options)
    return str(caught.value).splitlines()
