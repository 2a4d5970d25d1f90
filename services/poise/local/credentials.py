"""What callers show to the services of a run, and what they trust: worked out from what the services are told.

Every caller here has one token and one set of authorities for all that it calls. Reads tokens to compare them, and
keeps none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from poise.runtime.config.settings import ServiceConfig


@dataclass(frozen=True, slots=True)
class Credentials:
    """What the services of `names` ask of whoever calls them."""

    token_file: Path | None
    """Holds the token that all take which want one; None where none does, or there is no such file."""
    ca_file: Path | None
    """The certificate that all show; None where they speak no TLS, or there is no such file."""
    token_wanted: str
    """Why there must be a token file, and what to do where there is none; empty where none is needed."""
    ca_wanted: str
    """The same of authorities."""

    def settings(self, prefix: str = "") -> dict[str, str]:
        """Return the settings of a caller whose names begin with `prefix`, as far as they are known."""
        files = {"token_file": self.token_file, "ca_file": self.ca_file}
        return {f"{prefix}{name}": str(file) for name, file in files.items() if file is not None}

    def missing(self, section: str, token_file: Path | None, ca_file: Path | None) -> Iterator[str]:
        """Yield what a caller lacks, whose settings hold these two, their names beginning with `section`."""
        if self.token_wanted and token_file is None:
            yield f"{section}token_file: required, for {self.token_wanted}"
        if self.ca_wanted and ca_file is None:
            yield f"{section}ca_file: required, for {self.ca_wanted}"


def wanted_by(services: Mapping[str, ServiceConfig | None]) -> Credentials:
    """Return what services want of one caller. None stands for one whose settings are wrong.

    Raises:
        ConfigError: a token's file cannot be read.
    """
    known = {name: service for name, service in services.items() if service is not None}
    token_file, token_wanted = _token(known)
    ca_file, ca_wanted = _authorities(known)
    return Credentials(token_file, ca_file, token_wanted, ca_wanted)


def _token(services: Mapping[str, ServiceConfig]) -> tuple[Path | None, str]:
    auths = {name: service.auth for name, service in services.items()}
    asking = {name: auth for name, auth in auths.items() if auth.token is not None or auth.token_file is not None}
    if not asking:
        return None, ""
    names = " and ".join(asking)
    files = [auth.token_file for auth in asking.values() if auth.token_file is not None]
    if not files:
        return None, f"{names} got a token from the environment: write it to a file and name that in auth.token_file"
    is_one_file = len(files) == len(asking) and len(set(files)) == 1
    if not is_one_file and len({auth.read_token() for auth in asking.values()}) > 1:
        return None, f"{names} have different tokens, and a caller shows all of them the same one: give them one"
    return files[0], f"{names} want a token"


def _authorities(services: Mapping[str, ServiceConfig]) -> tuple[Path | None, str]:
    chains = {name: service.grpc.tls_cert_file for name, service in services.items()}
    secure = [name for name, chain in chains.items() if chain is not None]
    if not secure:
        return None, ""
    if len(secure) < len(chains):
        plain = " and ".join(name for name in chains if name not in secure)
        return None, f"{' and '.join(secure)} speak TLS and {plain} not, and a caller speaks alike to all: change one"
    if len({*chains.values()}) > 1:
        return None, "the services show different certificates: name a file with the authorities that signed them"
    return next(iter(chains.values())), "the services speak TLS"
