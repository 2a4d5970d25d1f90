"""Parse, join and bind hosts and ports. An IPv6 address has brackets if a port follows."""

from __future__ import annotations

import ipaddress
import re
import socket
from urllib.parse import urlsplit

EVERY_HOST = ("", "0.0.0.0", "::")  # noqa: S104 (compared, not bound)
"""Hosts that mean every interface of this machine."""

_NAME = re.compile(r"[^\s/:*@?#\[\]]*")
_NUMBERS = re.compile(r"[0-9.]+")


def bare_host(host: str) -> str:
    """Return a host to listen on, without the brackets of an IPv6 address.

    Raises:
        ValueError: it is not a host.
    """
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if ":" in bare or bare != host:
        try:
            ipaddress.IPv6Address(bare)
        except ValueError:
            raise ValueError(
                "must be a name or an address, without scheme or port, such as 127.0.0.1, ::1 or localhost"
            ) from None
    elif not _NAME.fullmatch(bare) or (_NUMBERS.fullmatch(bare) and not _is_ipv4(bare)):
        raise ValueError("must be a name or an address, such as 127.0.0.1, ::1 or localhost")
    return bare


def _is_ipv4(text: str) -> bool:
    try:
        ipaddress.IPv4Address(text)
    except ValueError:
        return False
    return True


def bare_name(host: str) -> str:
    """Return a name or address that clients use, without brackets; `.example.com` is a domain.

    Raises:
        ValueError: it is neither, or empty.
    """
    if not host.strip("."):
        raise ValueError("must be a name or an address without a port, such as poise.example.com or .example.com")
    return bare_host(host)


def join_address(host: str, port: int) -> str:
    """Return `host:port`, or `[host]:port` for an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_address(address: str) -> tuple[str, int]:
    """Return the host, without brackets, and the port of an address. Raises `ValueError`."""
    parts = urlsplit(f"//{address}")
    if not parts.hostname or not parts.port:
        raise ValueError(f"{address!r} must look like host:port or [IPv6 address]:port")
    return parts.hostname, parts.port


def reachable_host(host: str) -> str:
    """Return the host at which this machine reaches a listener on `host`."""
    return {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 (compared, not bound)


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. `::` and the empty host accept IPv4 too, and only IPv4 on a machine without IPv6.

    Raises:
        OSError: the host is not an address of this machine, or the port is taken.
    """
    if host in ("", "::"):
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        host = "0.0.0.0"  # noqa: S104 (the caller wants all interfaces)
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    return socket.create_server((host, port), family=family)
