"""Typed, frozen settings: one tree a service, unknown keys refused, every problem reported at once.

Precedence: `--set` on the command line > environment > YAML file > default. Owns loading, explaining and redacting;
knows no service's settings.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

MAX_FILE_BYTES = 1024 * 1024

C = TypeVar("C", bound="Settings")

_file_values: ContextVar[Mapping[str, Any]] = ContextVar("file_values")


class ConfigError(ValueError):
    """Settings that cannot be used; the text names every problem and what would be right."""


class StrictModel(BaseModel):
    """Base of nested sections."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)


class GrpcConfig(StrictModel):
    """Where gRPC listens."""

    host: str = "127.0.0.1"
    """Address to bind. Beyond this machine it needs a token, or `auth.allow_open_bind`."""
    port: int = Field(0, ge=0, le=65535)
    """Port; 0 takes any free one and says which."""
    tls_cert_file: Path | None = None
    """PEM chain of the service; with `tls_key_file` gRPC speaks TLS."""
    tls_key_file: Path | None = None
    """PEM key of that chain."""
    max_concurrent_rpcs: int = Field(256, ge=1)
    """Beyond it a call is refused with RESOURCE_EXHAUSTED."""

    @model_validator(mode="after")
    def _tls_files_go_together(self) -> Self:
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            raise ValueError("tls_cert_file and tls_key_file go together: set both or neither")
        return self


class AdminConfig(StrictModel):
    """Where the REST admin app listens."""

    host: str = "127.0.0.1"
    """Address to bind. Beyond this machine it needs a token, or `auth.allow_open_bind`."""
    port: int = Field(0, ge=0, le=65535)
    """Port; 0 takes any free one and says which."""


class AuthConfig(StrictModel):
    """Who may call."""

    token: SecretStr | None = None
    """Bearer token that callers must show. From the environment only: a file holding it is `token_file`."""
    token_file: Path | None = None
    """File holding the bearer token, one line."""
    allow_open_bind: bool = False
    """Listen beyond this machine without a token, because something else (a mesh, a network policy) guards it."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.token is not None and self.token_file is not None:
            raise ValueError("token and token_file are both set: keep one")
        return self

    def read_token(self) -> str | None:
        """Return the token in force; None when there is none.

        Raises:
            ConfigError: the file cannot be read, or is empty.
        """
        if self.token is not None:
            return self.token.get_secret_value()
        if self.token_file is None:
            return None
        try:
            token = self.token_file.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"auth.token_file: {self.token_file} cannot be read: {error}") from error
        if not token:
            raise ConfigError(f"auth.token_file: {self.token_file} is empty; put the token on its first line")
        return token


class LoggingConfig(StrictModel):
    """What is logged, to standard error."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Least severe level shown."""
    format: Literal["text", "json"] = "text"
    """`json` writes one object a line, for log collectors."""


class Settings(BaseSettings):
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
    drain_timeout_s: float = Field(30.0, gt=0)
    """How long shutting down waits for work in hand, s."""


class _FileSource(PydanticBaseSettingsSource):
    """What `load_config` read from YAML."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        values = _file_values.get({})
        return values.get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        return dict(_file_values.get({}))


def load_config(cls: type[C], path: Path | None, overrides: Sequence[str] = ()) -> C:
    """Build the settings from a YAML file, the environment and `a.b=value` overrides.

    Raises:
        ConfigError: anything wrong, all of it at once, as `field.path: what is wrong`.
    """
    return parse_config(cls, read_yaml(path) if path is not None else {}, overrides, source=str(path or ""))


def parse_config(cls: type[C], values: Mapping[str, Any], overrides: Sequence[str] = (), *, source: str = "") -> C:
    """Build the settings from what a file held. See `load_config`."""
    tree = parse_overrides(overrides)
    for place in (values, tree):
        if isinstance(auth := place.get("auth"), Mapping) and "token" in auth:
            raise ConfigError(
                "auth.token: secrets do not belong in files or on command lines; name a file in auth.token_file, "
                f"or set {cls.model_config.get('env_prefix', '')}AUTH__TOKEN"
            )
    context = _file_values.set(values)
    try:
        return cls(**tree)
    except ValidationError as error:
        where = f"{source}: " if source else ""
        raise ConfigError("\n".join(where + line for line in explain(error, cls))) from None
    except ValueError as error:  # an environment variable that is no JSON where a list or a map is needed
        raise ConfigError(f"environment: {error}") from error
    finally:
        _file_values.reset(context)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a mapping. Raises `ConfigError` that names the file, and the line where there is one."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_FILE_BYTES} bytes; is it the right file?")
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{path}: must hold `name: value` lines at its top, not a {type(values).__name__}")
    return values


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Turn `a.b=value` into a tree; values are read as YAML, so 3, true, null and [1, 2] mean what they look like.

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
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {name}: {text!r} is not a YAML value; quote it") from error
        node = tree
        for part in parts[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ConfigError(f"--set {name}: {part} was set to a value before; set one of them")
        node[parts[-1]] = value
    return tree


def explain(error: ValidationError, cls: type[BaseModel]) -> Iterator[str]:
    """Yield one line a problem: `field.path: what is wrong`, with the nearest known name for an unknown one."""
    for problem in error.errors():
        path = [str(part) for part in problem["loc"]]
        name = ".".join(path) or "settings"
        if problem["type"] == "extra_forbidden":
            known = _fields_at(cls, path[:-1])
            near = difflib.get_close_matches(path[-1], known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
            yield f"{name}: unknown; {hint}"
        elif problem["type"] == "missing":
            yield f"{name}: required, and set nowhere"
        else:
            message = problem["msg"].removeprefix("Value error, ")
            secret = any(word in path[-1:] for word in ("token", "url", "password"))
            given = "" if secret or isinstance(problem["input"], dict) else f" (given: {problem['input']!r})"
            yield f"{name}: {message}{given}"


def _fields_at(cls: type[BaseModel], path: Sequence[str]) -> list[str]:
    model = cls
    for part in path:
        field = model.model_fields.get(part)
        nested = None if field is None else _model_of(field.annotation)
        if nested is None:
            return []
        model = nested
    return list(model.model_fields)


def _model_of(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def redacted(config: BaseModel) -> dict[str, Any]:
    """Return the settings as JSON-able values with every secret masked."""
    values: dict[str, Any] = config.model_dump(mode="json")
    return values


def defaults_yaml(cls: type[BaseModel], indent: int = 0) -> str:
    """Return all settings with their defaults and their descriptions, as YAML to start a file from."""
    lines: list[str] = []
    pad = "  " * indent
    for name, field in cls.model_fields.items():
        lines += [f"{pad}# {line}" for line in (field.description or "").splitlines()]
        nested = _model_of(field.annotation)
        if nested is not None and isinstance(field.default, BaseModel):
            lines += [f"{pad}{name}:", _section_yaml(field.default, indent + 1)]
        elif field.is_required():
            lines.append(f"{pad}{name}:  # required")
        else:
            lines.append(f"{pad}{name}: {_yaml_value(field.get_default(call_default_factory=True))}")
    return "\n".join(lines)


def _section_yaml(section: BaseModel, indent: int) -> str:
    lines: list[str] = []
    pad = "  " * indent
    for name, field in type(section).model_fields.items():
        lines += [f"{pad}# {line}" for line in (field.description or "").splitlines()]
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            lines += [f"{pad}{name}:", _section_yaml(value, indent + 1)]
        elif field.is_required() and value is None:
            lines.append(f"{pad}{name}:  # required")
        else:
            lines.append(f"{pad}{name}: {_yaml_value(value)}")
    return "\n".join(lines)


def _yaml_value(value: Any) -> str:
    if isinstance(value, SecretStr):
        value = value.get_secret_value()  # a default is no secret
    elif isinstance(value, os.PathLike):
        value = str(value)
    elif isinstance(value, tuple):
        value = [item.model_dump(mode="json") if isinstance(item, BaseModel) else item for item in value]
    dumped = yaml.safe_dump(value, default_flow_style=True, width=1000, allow_unicode=True)
    return dumped.removesuffix("...\n").strip()
