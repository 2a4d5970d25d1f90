"""Sum what the pods of a release request from a cluster."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from tests.chart.rendering import Manifest, Release

_UNITS = {"": 1.0, "m": 1e-3, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
GIBI = 2.0**30


@dataclass(frozen=True)
class Needs:
    """Sums over all lasting pods and the claims that the chart creates."""

    gpus: int
    cpus: float
    memory_gib: float
    """Memory requested."""
    limit_gib: float
    """Memory limit."""
    disk_gib: float
    """Disk of the claims."""


def needs_of(release: Release) -> Needs:
    """Return the sums of requests, limits and claims, without the pod of `helm test`."""
    containers = [one for owner, pod in _lasting(release) for one in pod["spec"]["containers"] * _replicas(owner)]
    claims = release.all("PersistentVolumeClaim")
    return Needs(
        gpus=int(sum(quantity(one["resources"]["requests"].get("nvidia.com/gpu", "0")) for one in containers)),
        cpus=sum(quantity(one["resources"]["requests"]["cpu"]) for one in containers),
        memory_gib=sum(quantity(one["resources"]["requests"]["memory"]) for one in containers) / GIBI,
        limit_gib=sum(quantity(one["resources"]["limits"]["memory"]) for one in containers) / GIBI,
        disk_gib=sum(quantity(one["spec"]["resources"]["requests"]["storage"]) for one in claims) / GIBI,
    )


def quantity(text: str) -> float:
    """Return a Kubernetes quantity as a number; sizes in bytes."""
    match = re.fullmatch(r"([\d.]+)(m|Mi|Gi|Ti)?", text)
    assert match is not None, text
    return float(match[1]) * _UNITS[match[2] or ""]


def _lasting(release: Release) -> Iterator[tuple[Manifest, Manifest]]:
    return ((owner, pod) for owner, pod in release.pods() if owner["kind"] != "Pod")


def _replicas(owner: Manifest) -> int:
    return int(owner["spec"].get("replicas", 1))
