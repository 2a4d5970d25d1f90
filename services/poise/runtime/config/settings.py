"""Typed, frozen settings: one tree a service, unknown keys refused, every problem reported at once.

Precedence: `--set` on the command line > environment > YAML file > default. Owns loading; knows no service's settings,
and not how they are shown: see `config_text`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from poise.errors import Misconfigured
from poise.runtime.config.merge import left_of, spelled_out
from poise.runtime.config.text import explain
from poise.runtime.config.tree import misspelt_variables, takes_number
from poise.runtime.network.addresses import bare_host, bare_name
from poise_client import TokenFile, check_token

MAX_FILE_BYTES = 1024 * 1024

_IPV6 = re.compile(r"\[[0-9A-Fa-f]*:[0-9A-Fa-f.]*:[0-9A-Fa-f:.]*(%\w+)?\](:[0-9]+)?|[0-9A-Fa-f:]*::[0-9A-Fa-f:.]*")

C = TypeVar("C", bound="Settings")

Host = Annotated[str, AfterValidator(bare_host)]
"""A host to listen on."""

_file_values: ContextVar[Mapping[str, Any]] = ContextVar("file_values")


class ConfigError(ValueError, Misconfigured):
    """Settings that cannot be used; the text names every problem and what would be right."""


class _Numbers(BaseModel):
    """Takes numbers for numbers: no `true` for 1, which YAML also reads `yes` and `on` as, and nothing infinite."""

    model_config = ConfigDict(allow_inf_nan=False)

    RENAMED: ClassVar[Mapping[str, str]] = {}
    """Old names of settings in this section, each with its new name. Errors about unknown names show it."""

    @model_validator(mode="before")
    @classmethod
    def _no_boolean_for_a_number(cls, values: Any) -> Any:
        given = values if isinstance(values, Mapping) else {}
        for name, field in cls.model_fields.items():
            if isinstance(given.get(name), bool) and takes_number(field.annotation):
                raise ValueError(f"{name} must be a number, not {str(given[name]).lower()}")
        return values


class StrictModel(_Numbers):
    """Base of nested sections."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)


class GrpcConfig(StrictModel):
    """Where gRPC listens."""

    host: Host = "127.0.0.1"
    """Address to bind; `::` takes IPv4 too. Beyond this machine it needs a token, or `auth.allow_open_bind`."""
    port: int = Field(0, ge=0, le=65535)
    """Port; 0 takes any free one and says which."""
    tls_cert_file: Path | None = None
    """PEM chain of the service; with `tls_key_file` gRPC speaks TLS."""
    tls_key_file: Path | None = None
    """PEM key of that chain."""
    max_concurrent_rpcs: int = Field(256, ge=1)
    """Most calls of one RPC at a time; beyond it a call is refused with RESOURCE_EXHAUSTED. RPCs do not share places: a
    status is answered however many uploads wait."""

    @model_validator(mode="after")
    def _tls_files_go_together(self) -> Self:
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            raise ValueError("tls_cert_file and tls_key_file go together: set both or neither")
        return self


class AdminConfig(StrictModel):
    """Where the REST admin app listens."""

    host: Host = "127.0.0.1"
    """Address to bind; `::` takes IPv4 too. Beyond this machine it needs a token, or `auth.allow_open_bind`."""
    port: int = Field(0, ge=0, le=65535)
    """Port; 0 takes any free one and says which."""
    allowed_hosts: tuple[Annotated[str, AfterValidator(bare_name)], ...] = ()
    """Names and addresses, without a port, that requests may address the app by; `.example.com` allows that name and
    all below it. `localhost`, loopback addresses, `host` and the address that was connected to are always allowed, and
    `/healthz`, `/readyz` and `/metrics` answer under any name. This keeps out web pages that rebind their own name."""


class AuthConfig(StrictModel):
    """Who may call."""

    token: SecretStr | None = None
    """Bearer token that callers must show. From the environment only: a file holding it is `token_file`."""
    token_file: Path | None = None
    """File holding the bearer token, one line, that no other user can read. Read again when it changes; the token
    before is accepted for two more minutes."""
    allow_open_bind: bool = False
    """Listen beyond this machine without a token, because something else (a mesh, a network policy) guards it."""

    @field_validator("token")
    @classmethod
    def _can_be_sent(cls, token: SecretStr | None) -> SecretStr | None:
        if token is not None:
            check_token(token.get_secret_value())  # an empty one would let everybody in
        return token

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.token is not None and self.token_file is not None:
            raise ValueError("token and token_file are both set: keep one")
        return self

    def read_token(self) -> str | None:
        """Return the token in force; None when there is none.

        Raises:
            ConfigError: the file cannot be read, other users can read it, or it holds no token.
        """
        secret = self.open()
        return secret.current if isinstance(secret, TokenFile) else secret

    def open(self) -> str | TokenFile | None:
        """Return the token, or the file that holds it; None when there is none. Raises as `read_token`."""
        if self.token is not None:
            return self.token.get_secret_value()
        return open_token_file(self.token_file, "auth.token_file")


def open_token_file(path: Path | None, field: str) -> TokenFile | None:
    """Return the file with a bearer token that the setting `field` names; None where it names none.

    Raises:
        ConfigError: the file cannot be read, other users can read it, or it holds no token.
    """
    try:
        return None if path is None else TokenFile(path)
    except OSError as error:
        raise ConfigError(f"{field}: {path} cannot be read: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{field}: {error}") from error


def check_readable(path: Path | None, field: str) -> None:
    """Read a file that the setting `field` names, where it names one, before anything depends on it.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        if path is not None:
            path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{field}: {path} cannot be read: {error}") from error


class LoggingConfig(StrictModel):
    """What is logged, to standard error."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Least severe level shown."""
    format: Literal["text", "json"] = "text"
    """`json` writes one object a line, for log collectors."""


class TracingConfig(StrictModel):
    """Traces, one for each step, by OpenTelemetry."""

    otlp_endpoint: str = Field("", pattern=r"^(https?://.+)?$")
    """Where a collector takes OTLP over HTTP, such as `http://collector:4318`; empty records nothing."""
    use_proxy: bool = False
    """Reach the collector through the proxy that `http_proxy` and the like name."""


class Settings(_Numbers, BaseSettings):
    """Base of a program's whole tree."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        env_nested_delimiter="__",
        nested_model_default_partial_update=True,
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Command line (as init arguments), environment, YAML."""
        return init_settings, env_settings, _FileSource(settings_cls)


class ServiceConfig(Settings):
    """What every service has."""

    grpc: GrpcConfig = GrpcConfig()
    """Where gRPC listens."""
    admin: AdminConfig = AdminConfig()
    """Where the REST admin app listens."""
    auth: AuthConfig = AuthConfig()
    """Who may call."""
    logging: LoggingConfig = LoggingConfig()
    """What is logged."""
    tracing: TracingConfig = TracingConfig()
    """What is traced."""
    drain_timeout_s: float = Field(30.0, gt=0)
    """How long shutting down waits for work in hand, s."""


class _FileSource(PydanticBaseSettingsSource):
    """What `load_config` read from YAML."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        values = _file_values.get({})
        return values.get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        return left_of(_file_values.get({}), self.current_state)


def load_config(cls: type[C], path: Path | None, overrides: Sequence[str] = ()) -> C:
    """Build the settings from a YAML file, the environment and `a.b=value` overrides.

    Raises:
        ConfigError: anything wrong, all of it at once, as `field.path: what is wrong`.
    """
    return parse_config(cls, read_yaml(path) if path is not None else {}, overrides, source=str(path or ""))


def parse_config(cls: type[C], values: Mapping[str, Any], overrides: Sequence[str] = (), *, source: str = "") -> C:
    """Build the settings from what a file held. See `load_config`."""
    tree = spelled_out(parse_overrides(overrides), values)
    prefix = cls.model_config.get("env_prefix", "")
    problems = list(misspelt_variables(cls, prefix, os.environ)) if prefix else []
    if any(
        isinstance(auth := place.get("auth"), Mapping) and auth.get("token") is not None for place in (values, tree)
    ):
        problems.append(
            "auth.token: secrets do not belong in files or on command lines; name a file in auth.token_file, "
            f"or set {prefix}AUTH__TOKEN"
        )
    context = _file_values.set(values)
    try:
        settings = cls(**tree)
    except ValidationError as error:
        where = f"{source}: " if source else ""
        problems[:0] = [where + line for line in explain(error, cls)]
    except ValueError as error:  # an environment variable that is no JSON where a list or a map is needed
        problems.append(f"environment: {error}")
    finally:
        _file_values.reset(context)
    if problems:
        raise ConfigError("\n".join(problems))
    return settings


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a mapping. Raises `ConfigError` that names the file, and the line where there is one."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        text = content.decode() if len(content) <= MAX_FILE_BYTES else None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    if text is None:
        raise ConfigError(f"{path}: larger than {MAX_FILE_BYTES} bytes; is it the right file?")
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a 13th month; brackets without end
        raise ConfigError(f"{path}: is not YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold `name: value` lines at its top, not a {type(values).__name__}")
    if odd := [key for key in values if not isinstance(key, str)]:
        raise ConfigError(f"{path}: {odd[0]!r} is no name of a setting; YAML reads on, off, yes and no as booleans")
    return values


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Turn `a.b=value` into a tree; values are read as YAML, so 3, true, null and [1, 2] mean what they look like.

    An IPv6 address, with or without brackets and port, is a string: YAML takes `::` for a mapping, `[::1]` for a list.

    Raises:
        ConfigError: not of that form, or two that contradict.
    """
    tree: dict[str, Any] = {}
    for override in overrides:
        name, equals, text = override.partition("=")
        parts = name.strip().split(".")
        if not equals or not all(parts):
            raise ConfigError(f"--set {override!r}: must look like section.field=value")
        try:
            value = text if _IPV6.fullmatch(text) else yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ConfigError(f"--set {name}: {text!r} is not a YAML value; quote it") from error
        node = tree
        for part in parts[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ConfigError(f"--set {name}: {part} was set to a value before; set one of them")
        node[parts[-1]] = value
    return tree
