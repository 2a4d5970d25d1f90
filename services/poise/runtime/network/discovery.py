"""Find replicas: fixed addresses, and all addresses of DNS names."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from poise.runtime.network.addresses import join_address

logger = logging.getLogger(__name__)

_SCHEME = "dns:///"
_ADDRESS = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+(?:%[A-Za-z0-9._-]+)?\]):([0-9]{1,5})")


@dataclass(frozen=True, slots=True)
class Address:
    """Address of a replica."""

    target: str
    """`host:port`, or `unix:path`."""
    server_name: str | None = None
    """DNS name by which it was found, which its certificate contains; None for a fixed address."""


def parse_name(target: str) -> tuple[str, int] | None:
    """Return host and port of a `dns:///` target; None for a fixed address.

    Raises:
        ValueError: it is neither.
    """
    if target.startswith("unix:"):
        return None
    match = _ADDRESS.fullmatch(target.removeprefix(_SCHEME))
    if match is None or not 0 < int(match[2]) < 65536 or not _is_host(match[1]):
        brackets = "; an IPv6 address needs brackets: [::1]:50051" if target.count(":") > 1 else ""
        raise ValueError(f"{target!r} must look like host:port, unix:path or dns:///name:port{brackets}")
    return (match[1].strip("[]"), int(match[2])) if target.startswith(_SCHEME) else None


def _is_host(host: str) -> bool:
    if not host.startswith("["):
        return True
    try:
        ipaddress.IPv6Address(host[1:-1])
    except ValueError:
        return False
    return True


async def resolve(host: str, port: int) -> set[str]:
    """Return `host:port` for every address of a DNS name. Raises `OSError`."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return {join_address(str(where[0]), port) for *_, where in found}


class Discovery:
    """Finds replicas. A name that cannot be resolved keeps its last addresses: replicas survive a DNS failure."""

    def __init__(self, targets: Sequence[str], resolve: Callable[[str, int], Awaitable[set[str]]] = resolve) -> None:
        self._fixed = [Address(target) for target in targets if parse_name(target) is None]
        self._names = [name for target in targets if (name := parse_name(target)) is not None]
        self._resolve = resolve
        self._found: dict[tuple[str, int], set[str]] = {}
        self._failing: set[tuple[str, int]] = set()

    @property
    def is_fixed(self) -> bool:
        """Whether there are no DNS names, so that the result never changes."""
        return not self._names

    async def find(self) -> list[Address]:
        """Return the current addresses of replicas, without duplicates."""
        found = {address.target: address for address in self._fixed}
        for name in self._names:
            try:
                self._found[name] = await self._resolve(*name)
                self._failing.discard(name)
            except (OSError, UnicodeError) as error:  # UnicodeError: not a valid name
                if name not in self._failing:
                    logger.warning("cannot resolve dns:///%s:%d: %s. Keeping its last addresses", *name, error)
                    self._failing.add(name)
            for target in sorted(self._found.get(name, ())):
                found.setdefault(target, Address(target, server_name=name[0]))
        return list(found.values())
