"""The settings of the value service."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, Self
from urllib.parse import parse_qsl, urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from poise.queue.redis_scripts import dead_letter_key
from poise.runtime.config.settings import AdminConfig, GrpcConfig, ServiceConfig, StrictModel
from poise.value.estimators.probe.model import ProbeInput
from poise_client.types import Estimator


class QueueConfig(StrictModel):
    """The queue of labelled rollouts, a Redis Stream."""

    url: SecretStr = SecretStr("redis://127.0.0.1:6379/0")
    """`redis://[user:password@]host:port/db`, `rediss://…` for TLS, or `unix://path`. Options after `?` are `db` and,
    with TLS, `ssl_ca_certs`, `ssl_ca_path`, `ssl_certfile`, `ssl_keyfile`, `ssl_cert_reqs` and `ssl_check_hostname`."""
    stream: str = Field("poise:labels", min_length=1)
    """Key of the stream. The key of the dead letters is `{<stream>}:dead`; a Redis cluster keeps both on one node."""
    group: str = Field("value", min_length=1)
    """Consumer group."""
    max_entries: int = Field(8192, ge=1)
    """Maximum groups that are published and not saved yet. At the limit, publishing fails with QUEUE_FULL."""
    max_bytes: int = Field(512 * 1024 * 1024, ge=1024)
    """Maximum memory of these groups in the server. At the limit, publishing fails with QUEUE_FULL. Set the server's
    `maxmemory` to at least 1.25 times `max_bytes` + `max_dead_letter_bytes`."""
    max_entry_bytes: int = Field(4 * 1024 * 1024, ge=1024)
    """Maximum size of one serialised group."""
    max_dead_letters: int = Field(1000, ge=1)
    """Maximum dead letters kept. The oldest are dropped first."""
    max_dead_letter_bytes: int = Field(64 * 1024 * 1024, ge=1024)
    """Maximum memory of the dead letters in the server. The newest one is always kept."""
    claim_idle_s: float = Field(30.0, gt=0)
    """Claim entries of another consumer that it has not acknowledged for this long, s."""
    batch_entries: int = Field(256, ge=1)
    """Maximum groups per save."""

    @model_validator(mode="after")
    def _fits_an_entry(self) -> Self:
        if self.max_bytes < 2 * self.max_entry_bytes:  # an entry takes more memory than its bytes
            raise ValueError(
                f"max_bytes = {self.max_bytes} must be at least 2 * max_entry_bytes = {2 * self.max_entry_bytes}: "
                "the largest group would never fit"
            )
        return self

    @field_validator("stream")
    @classmethod
    def _has_a_key_for_dead_letters(cls, stream: str) -> str:
        dead_letter_key(stream)
        return stream

    @field_validator("url")
    @classmethod
    def _is_redis_url(cls, url: SecretStr) -> SecretStr:
        # Checked here because later parsers may quote the URL with its password.
        text = url.get_secret_value()
        if not _is_url_of_redis(text):
            raise ValueError(
                "is not the URL of a Redis server. Allowed: redis://[user:password@]host:port/db, rediss://… or "
                "unix:///path, with / ? # @ : in the password percent-encoded"
            )
        if not _has_known_options(text):
            raise ValueError(
                f"has an unknown option after ?, or one with an invalid value. Allowed: {', '.join(_URL_OPTIONS)}; "
                "those that start with ssl_ need rediss://"
            )
        return url


_URL_OPTIONS = {
    "db": r"\d{1,9}",
    "username": ".+",
    "password": ".+",
    "ssl_ca_certs": ".+",
    "ssl_ca_path": ".+",
    "ssl_certfile": ".+",
    "ssl_keyfile": ".+",
    "ssl_cert_reqs": "none|optional|required",
    "ssl_check_hostname": "(?i:true|false|yes|no|0|1)",
}
"""Allowed options of the URL and the patterns of their values. Others could change the queue's time limits."""


def _has_known_options(url: str) -> bool:
    parts = urlsplit(url)
    return all(
        re.fullmatch(_URL_OPTIONS.get(name, "(?!)"), value)
        and (parts.scheme == "rediss" or not name.startswith("ssl_"))
        for name, value in parse_qsl(parts.query, keep_blank_values=True)
    )


def _is_url_of_redis(url: str) -> bool:
    if not url.isprintable() or " " in url:
        return False
    try:
        parts = urlsplit(url)
        if parts.scheme == "unix":
            return bool(parts.path)
        has_host = bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port is no number, usually because the password contains / or #
        return False
    return parts.scheme in ("redis", "rediss") and has_host and re.fullmatch(r"\d{0,9}", parts.path[1:]) is not None


class ProbeConfig(StrictModel):
    """The probes."""

    inputs: tuple[ProbeInput, ...] = Field(
        ("prompt_hidden", "response_hidden", "entropy", "sibling_reward"), min_length=1
    )
    """The probe's inputs: any of `prompt_hidden`, `response_hidden`, `entropy` (three mean token entropies) and
    `sibling_reward` (the rollout's reward, used in its siblings' baselines; requests must contain it)."""
    prompt_components: int = Field(32, ge=1)
    """Maximum PCA components of prompt_hidden."""
    response_components: int = Field(64, ge=1)
    """Maximum PCA components of response_hidden."""
    rows_per_component: int = Field(64, ge=1)
    """Rows of the window per PCA component. A hidden state gets at most rows / rows_per_component components, but at
    least four. In a small window, more components would fit noise. The paper uses 1."""
    alpha: float = Field(100.0, gt=0)
    """Ridge penalty on standardised inputs."""
    refit: Literal["incremental", "fresh"] = "incremental"
    """How a probe is refitted. `incremental` updates the last fit at the cost of the changed rows. `fresh` fits the
    window from scratch at the cost of all rows; the result is the same after any restart, to the last bit."""
    warmup_steps: int = Field(16, ge=1)
    """Distinct steps with labels that a domain needs before its first fit."""
    min_rows: int = Field(64, ge=2)
    """Rollouts that a window needs before the first fit."""
    window_rows: int = Field(3072, ge=2)
    """Maximum rollouts in a domain's sliding window. The oldest groups leave first, whole."""
    window_rows_by_domain: dict[str, int] = Field({"math": 4096})
    """`window_rows` of individual domains."""
    max_domains: int = Field(64, ge=1)
    """Maximum domains. Each has a window in memory. Labels of further domains are rejected."""

    @model_validator(mode="after")
    def _windows_fit_min_rows(self) -> Self:
        sizes = {"window_rows": self.window_rows}
        sizes |= {f"window_rows_by_domain.{domain}": rows for domain, rows in self.window_rows_by_domain.items()}
        for name, rows in sizes.items():
            if rows < self.min_rows:
                raise ValueError(
                    f"{name} = {rows} must be at least min_rows = {self.min_rows}: no probe would ever be fitted"
                )
        return self

    def rows_of(self, domain: str) -> int:
        """Return the size of a domain's window."""
        return self.window_rows_by_domain.get(domain, self.window_rows)


class ValueConfig(ServiceConfig):
    """The value service."""

    model_config = SettingsConfigDict(env_prefix="POISE_VALUE_")

    grpc: GrpcConfig = GrpcConfig(port=50052)
    """Where the gRPC service listens."""
    admin: AdminConfig = AdminConfig(port=8052)
    """Where the admin app listens."""
    state_dir: Path
    """Folder of the durable state: windows, probes, pinned steps, consumed ids. Only one service can use it."""
    queue: QueueConfig = QueueConfig()
    """The queue of labelled rollouts."""
    estimator: Estimator = "probe"
    """How baselines are computed: `probe`, `score_mean`, `score_prefix`, `score_prompt`, or `auto`, which uses the
    score-weighted estimator with the smallest error on earlier steps. The probe needs two rollouts per prompt."""
    estimator_by_domain: dict[str, Estimator] = Field({})
    """`estimator` of individual domains."""
    probe: ProbeConfig = ProbeConfig()
    """The probes, and the windows of all estimators."""
    horizon_steps: int = Field(1024, ge=1)
    """Most recent steps of a run whose consumed ids are kept. Labels of older steps go to the dead letters."""
    pinned_steps: int = Field(16, ge=1)
    """Maximum steps per run with pinned estimators. The least recently requested step is dropped first."""
    max_runs: int = Field(64, ge=1)
    """Most recently used runs whose consumed ids and pinned probes are kept. Of an older run only the last step is
    kept, and labels up to that step are rejected."""

    def estimator_of(self, domain: str) -> Estimator:
        """Return the estimator of a domain."""
        return self.estimator_by_domain.get(domain, self.estimator)
