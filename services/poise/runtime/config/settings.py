"""The base of all settings, and the sections that programs share. `load` builds settings, `text` shows them.

Settings are typed and frozen. Unknown keys are rejected.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from poise.errors import Misconfigured
from poise.runtime.network.addresses import bare_host, bare_name
from poise_client import TokenFile
from poise_client._transport import check_token

Host = Annotated[str, AfterValidator(bare_host)]
"""A host to listen on."""


class ConfigError(ValueError, Misconfigured):
    """Invalid settings. The message names every problem and its remedy."""


class StrictModel(BaseModel):
    """Base of sections. A number must be finite and not a boolean: YAML reads `yes` and `on` as true."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    RENAMED: ClassVar[Mapping[str, str]] = {}
    """Maps old setting names of this section to new ones. Shown in errors about unknown names."""

    MOVED: ClassVar[Mapping[str, str]] = {}
    """Maps settings that were moved out of this section to their replacements. Shown in errors about unknown names."""

    @model_validator(mode="before")
    @classmethod
    def _no_boolean_for_a_number(cls, values: Any) -> Any:
        for name, value in values.items() if isinstance(values, Mapping) else ():
            if (
                isinstance(value, bool)
                and name in cls.model_fields
                and _takes_number(cls.model_fields[name].annotation)
            ):
                raise ValueError(f"{name} must be a number, not {str(value).lower()}")
        return values


def _takes_number(annotation: Any) -> bool:
    kinds = {annotation, *get_args(annotation)}
    return bool(kinds & {int, float}) and bool not in kinds


class GrpcConfig(StrictModel):
    """Where gRPC listens."""

    host: Host = "127.0.0.1"
    """Address to bind; `::` accepts IPv4 too. Requires a token or `auth.allow_open_bind`, except for loopback."""
    port: int = Field(0, ge=0, le=65535)
    """Port; 0 chooses a free one and logs it."""
    tls_cert_file: Path | None = None
    """PEM certificate chain of the service. With `tls_key_file`, gRPC uses TLS."""
    tls_key_file: Path | None = None
    """PEM private key of `tls_cert_file`."""
    max_concurrent_rpcs: int = Field(256, ge=1)
    """Concurrent calls of each RPC; more are rejected with RESOURCE_EXHAUSTED. Each RPC has its own limit, so uploads
    never block status calls."""

    @model_validator(mode="after")
    def _tls_files_go_together(self) -> Self:
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            raise ValueError("only one of tls_cert_file and tls_key_file is set. Set both or neither")
        return self


class AdminConfig(StrictModel):
    """Where the REST admin app listens."""

    host: Host = "127.0.0.1"
    """Address to bind; `::` accepts IPv4 too. Requires a token or `auth.allow_open_bind`, except for loopback."""
    port: int = Field(0, ge=0, le=65535)
    """Port; 0 chooses a free one and logs it."""
    allowed_hosts: tuple[Annotated[str, AfterValidator(bare_name)], ...] = ()
    """Names and addresses, without a port, that a request's Host header may contain; `.example.com` allows that name
    and its subdomains. `localhost`, loopback addresses, `host` and the connection's own address are always allowed, and
    `/healthz`, `/readyz` and `/metrics` accept any name. This prevents DNS rebinding by web pages."""


class AuthConfig(StrictModel):
    """Authentication of callers."""

    token: SecretStr | None = None
    """Bearer token that callers must send. Allowed only in the environment; elsewhere set `token_file`."""
    token_file: Path | None = None
    """File with the bearer token on one line, which no other user can read. A change takes effect without a restart;
    the previous token is accepted for two more minutes."""
    allow_open_bind: bool = False
    """Allow listening on any address without a token. Set it only if something else protects the service, such as a
    mesh or a network policy."""

    @field_validator("token")
    @classmethod
    def _can_be_sent(cls, token: SecretStr | None) -> SecretStr | None:
        if token is not None:
            check_token(token.get_secret_value())  # an empty one would admit everyone
        return token

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.token is not None and self.token_file is not None:
            raise ValueError("token and token_file are both set. Keep one")
        return self

    def read_token(self) -> str | None:
        """Return the current token; None if there is none.

        Raises:
            ConfigError: the file cannot be read, other users can read it, or it contains no token.
        """
        secret = self.open()
        return secret.current if isinstance(secret, TokenFile) else secret

    def open(self) -> str | TokenFile | None:
        """Return the token, or the file that contains it; None if there is none. Raises as `read_token`."""
        if self.token is not None:
            return self.token.get_secret_value()
        return open_token_file(self.token_file, "auth.token_file")


def open_token_file(path: Path | None, field: str) -> TokenFile | None:
    """Return the token file of the setting `field`; None if `path` is None.

    Raises:
        ConfigError: the file cannot be read, other users can read it, or it contains no token.
    """
    try:
        return None if path is None else TokenFile(path)
    except OSError as error:
        raise ConfigError(f"{field}: {path} cannot be read: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{field}: {error}") from error


def check_readable(path: Path | None, field: str) -> None:
    """Check that the file of the setting `field` can be read; None means no file.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        if path is not None:
            path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{field}: {path} cannot be read: {error}") from error


class LoggingConfig(StrictModel):
    """Logging, to standard error."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Lowest level that is logged."""
    format: Literal["text", "json"] = "text"
    """`json` writes one object per line, for log collectors."""


class TracingConfig(StrictModel):
    """OpenTelemetry tracing: one trace for each step."""

    otlp_endpoint: str = Field("", pattern=r"^(https?://.+)?$")
    """Collector that accepts OTLP over HTTP, such as `http://collector:4318`; empty disables tracing."""
    use_proxy: bool = False
    """Connect to the collector through the proxy of `http_proxy` and similar variables."""


class Settings(StrictModel, BaseSettings):
    """Base of a program's whole tree."""

    model_config = SettingsConfigDict(env_nested_delimiter="__", nested_model_default_partial_update=True)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Use only the arguments: `load` merges the sources, so that errors can name the source."""
        return (init_settings,)


class ServiceConfig(Settings):
    """Settings that every service has."""

    grpc: GrpcConfig = GrpcConfig()
    """Where gRPC listens."""
    admin: AdminConfig = AdminConfig()
    """Where the REST admin app listens."""
    auth: AuthConfig = AuthConfig()
    """Authentication of callers."""
    logging: LoggingConfig = LoggingConfig()
    """Logging."""
    tracing: TracingConfig = TracingConfig()
    """Tracing."""
    drain_timeout_s: float = Field(30.0, gt=0)
    """How long a shutdown waits for running requests, s."""
