"""Targets of channels: `host:port`, `[IPv6 address]:port`, `dns:///name:port`, `unix:path`."""

from __future__ import annotations

import ipaddress

_FORMS = "host:port, [IPv6 address]:port, dns:///name:port or unix:path"
_OWN_SCHEMES = ("unix:", "unix-abstract:", "ipv4:", "ipv6:", "dns://", "xds:", "vsock:")
"""gRPC checks targets of these forms."""


def check_target(target: str) -> None:
    """Raise `ValueError` for a target that gRPC would misread or never reach.

    gRPC reads `::1:50051` as an address without a port, and uses port 443 if there is none.
    """
    if target.startswith("dns:///"):
        target = target.removeprefix("dns:///")
    elif target.startswith(_OWN_SCHEMES):
        return
    else:
        target = target.removeprefix("dns:")
    host, colon, port = target.rpartition(":")
    if "/" in target or not host or not colon:
        raise ValueError(f"target must be {_FORMS}, not {target!r}")
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise ValueError(f"the port in target {target!r} is {port!r}; required: a number from 1 to 65535")
    if host.startswith("[") and host.endswith("]"):
        _check_ipv6(host[1:-1], target)
    elif ":" in host or "[" in host or "]" in host:
        raise ValueError(f"target {target!r}: an IPv6 address needs brackets, such as [::1]:50051")


def _check_ipv6(address: str, target: str) -> None:
    try:
        ipaddress.IPv6Address(address)
    except ValueError as error:
        raise ValueError(f"target {target!r}: {address!r} is not an IPv6 address: {error}") from error
