"""The settings of the value service."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, Self
from urllib.parse import parse_qsl, urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from poise.queue.redis_keys import dead_letter_key
from poise.runtime.config.settings import AdminConfig, GrpcConfig, ServiceConfig, StrictModel
from poise.runtime.network.addresses import EVERY_HOST
from poise.runtime.network.discovery import parse_name
from poise.value.probe.model import ProbeInput


class QueueConfig(StrictModel):
    """The queue of labelled rollouts, a Redis Stream."""

    url: SecretStr = SecretStr("redis://127.0.0.1:6379/0")
    """`redis://[user:password@]host:port/db`, `rediss://…` for TLS, or `unix://path`. Options after `?` are `db`, and
    with TLS `ssl_ca_certs`, `ssl_ca_path`, `ssl_certfile`, `ssl_keyfile`, `ssl_cert_reqs` and `ssl_check_hostname`."""
    stream: str = Field("poise:labels", min_length=1)
    """Key of the stream. Dead letters go to `{<stream>}:dead`: a Redis cluster keeps both keys on one node."""
    group: str = Field("value", min_length=1)
    """Consumer group."""
    max_entries: int = Field(8192, ge=1)
    """Most groups published and not yet in the durable state; beyond, publishing is refused with QUEUE_FULL."""
    max_bytes: int = Field(512 * 1024 * 1024, ge=1024)
    """Most memory that those take in the server; beyond, publishing is refused likewise. The server's `maxmemory` must
    have room for this, `max_dead_letter_bytes`, and a quarter more."""
    max_entry_bytes: int = Field(4 * 1024 * 1024, ge=1024)
    """Largest group, serialised."""
    max_dead_letters: int = Field(1000, ge=1)
    """Dead letters kept; the oldest go first."""
    max_dead_letter_bytes: int = Field(64 * 1024 * 1024, ge=1024)
    """Most memory that they take in the server; the newest one is kept in any case."""
    claim_idle_s: float = Field(30.0, gt=0)
    """After so long without an acknowledgement, entries of another consumer are taken over, s."""
    batch_entries: int = Field(256, ge=1)
    """Most groups made durable at a time."""

    @model_validator(mode="after")
    def _holds_an_entry(self) -> Self:
        if self.max_bytes < 2 * self.max_entry_bytes:  # and what the server needs for it
            raise ValueError(
                f"max_bytes = {self.max_bytes} is below twice max_entry_bytes = {self.max_entry_bytes}: the largest "
                "group would never fit"
            )
        return self

    @field_validator("stream")
    @classmethod
    def _has_a_key_for_dead_letters(cls, stream: str) -> str:
        dead_letter_key(stream)
        return stream

    @field_validator("url")
    @classmethod
    def _names_a_server(cls, url: SecretStr) -> SecretStr:
        # Here, for what fails to parse it later may quote it, password and all.
        text = url.get_secret_value()
        if not _names_redis(text):
            raise ValueError(
                "names no Redis server: must be redis://[user:password@]host:port/db, rediss://… or unix:///path, "
                "with / ? # @ : in the password percent-encoded"
            )
        if not _has_known_options(text):
            raise ValueError(
                f"has an option after ? that is unknown or has a wrong value; known: {', '.join(_URL_OPTIONS)}; those "
                "for TLS need rediss://"
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
"""Options of a URL that leave the queue's own time limits in force, each with the pattern of its values."""


def _has_known_options(url: str) -> bool:
    parts = urlsplit(url)
    return all(
        re.fullmatch(_URL_OPTIONS.get(name, "(?!)"), value)
        and (parts.scheme == "rediss" or not name.startswith("ssl_"))
        for name, value in parse_qsl(parts.query, keep_blank_values=True)
    )


def _names_redis(url: str) -> bool:
    if not url.isprintable() or " " in url:
        return False
    try:
        parts = urlsplit(url)
        if parts.scheme == "unix":
            return bool(parts.path)
        has_host = bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, most often because the password holds a / or #
        return False
    return parts.scheme in ("redis", "rediss") and has_host and re.fullmatch(r"\d{0,9}", parts.path[1:]) is not None


class ProbeConfig(StrictModel):
    """What the probes see and when they learn."""

    inputs: tuple[ProbeInput, ...] = Field(
        ("prompt_hidden", "response_hidden", "entropy", "sibling_reward"), min_length=1
    )
    """What a rollout is valued by: any of `prompt_hidden`, `response_hidden`, `entropy` (the three mean token
    entropies) and `sibling_reward` (the rollout's own reward, for its siblings' baselines; questions must carry it)."""
    prompt_components: int = Field(32, ge=1)
    """Most PCA dimensions of prompt_hidden."""
    response_components: int = Field(64, ge=1)
    """Most PCA dimensions of response_hidden."""
    rows_per_component: int = Field(64, ge=1)
    """Rows that a PCA dimension takes: a hidden state has no more dimensions than the window's rows by this, but four
    in any case. While a window fills, more would fit its noise. 1 is the paper's: as many as there are rows."""
    alpha: float = Field(100.0, gt=0)
    """Ridge penalty on standardised inputs."""
    refit: Literal["incremental", "fresh"] = "incremental"
    """How a probe follows its window: from the fit before, at the cost of the rows that changed; or `fresh`, from the
    window alone, at the cost of all its rows. A fresh probe is a function of its window, and so the same after any
    restart, to the last bit."""
    warmup_steps: int = Field(16, ge=1)
    """Distinct steps whose labels a domain must have consumed before its first fit."""
    min_rows: int = Field(64, ge=2)
    """Rollouts a window must hold before the first fit."""
    window_rows: int = Field(3072, ge=2)
    """Most rollouts in a domain's sliding window; whole groups leave, oldest first."""
    window_rows_by_domain: dict[str, int] = Field({"math": 4096})
    """Exceptions from `window_rows`."""
    max_domains: int = Field(64, ge=1)
    """Most domains; each holds a window in memory. Labels of further ones are refused."""

    @model_validator(mode="after")
    def _windows_hold_a_fit(self) -> Self:
        sizes = {"window_rows": self.window_rows}
        sizes |= {f"window_rows_by_domain.{domain}": rows for domain, rows in self.window_rows_by_domain.items()}
        for name, rows in sizes.items():
            if rows < self.min_rows:
                raise ValueError(f"{name} = {rows} is below min_rows = {self.min_rows}: no probe would ever be fitted")
        return self

    def rows_of(self, domain: str) -> int:
        """Return the size of a domain's window."""
        return self.window_rows_by_domain.get(domain, self.window_rows)


class StandbyConfig(StrictModel):
    """Several replicas on one `state_dir`: one holds it, the others pass calls on to that one, ready to take over."""

    enabled: bool = False
    """Wait while another service holds `state_dir`, instead of refusing to start. The folder's file system must keep
    locks between the replicas: a disk of their own machine does, and NFS 4 between machines."""
    address: str = ""
    """host:port at which the other replicas reach this one; empty takes the one that is bound, which must not be every
    interface's then."""
    ca_file: Path | None = None
    """PEM of the authorities that sign the other replicas' certificates; set it where they speak TLS."""
    server_name: str | None = None
    """The name that those certificates show; null takes the address."""

    @field_validator("address")
    @classmethod
    def _can_be_reached(cls, address: str) -> str:
        if address:
            parse_name(address)
        return address


class ValueConfig(ServiceConfig):
    """The value service."""

    model_config = SettingsConfigDict(env_prefix="POISE_VALUE_")

    grpc: GrpcConfig = GrpcConfig(port=50052)
    """Where the gRPC service listens."""
    admin: AdminConfig = AdminConfig(port=8052)
    """Where the admin app listens."""
    state_dir: Path
    """Folder of the durable state: windows, consumed ids, probes. One service at a time may use it; see `standby`."""
    standby: StandbyConfig = StandbyConfig()
    """Replicas that wait for `state_dir`."""
    queue: QueueConfig = QueueConfig()
    """The queue of labelled rollouts."""
    probe: ProbeConfig = ProbeConfig()
    """The probes."""
    horizon_steps: int = Field(1024, ge=1)
    """Steps of a run whose consumed ids are remembered exactly; labels of older steps are dead-lettered."""
    pinned_steps: int = Field(16, ge=1)
    """Steps of a run whose probes stay pinned for repeated questions."""
    max_runs: int = Field(64, ge=1)
    """Runs remembered in full; of longer unused ones only the last step is, and what is older is refused."""

    @model_validator(mode="after")
    def _replicas_find_this_one(self) -> Self:
        if self.standby.enabled and not self.standby.address and self.grpc.host in EVERY_HOST:
            raise ValueError(
                f"standby.address is empty, and grpc.host = {self.grpc.host!r} is no address at which other replicas "
                "reach this one: set standby.address to host:port"
            )
        return self
