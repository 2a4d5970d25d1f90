"""Render the chart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import helm_python
import yaml

CHART = Path(__file__).parents[2] / "helm" / "poise"
VALUES = {path.stem: path for path in sorted((CHART / "values").glob("*.yaml"))}
NAMESPACE = "rl"

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Release:
    """The manifests of one installation."""

    manifests: tuple[Manifest, ...]

    def all(self, kind: str) -> list[Manifest]:
        return [manifest for manifest in self.manifests if manifest["kind"] == kind]

    def one(self, kind: str, name: str) -> Manifest:
        (found,) = (manifest for manifest in self.all(kind) if manifest["metadata"]["name"] == name)
        return found

    def pods(self) -> Iterator[tuple[Manifest, Manifest]]:
        """Yield every manifest that creates pods, with its pod template."""
        for manifest in self.manifests:
            if manifest["kind"] == "Pod":
                yield manifest, manifest
            elif "template" in manifest.get("spec", {}):
                yield manifest, manifest["spec"]["template"]

    def config(self, role: str) -> Manifest:
        name = f"run-poise-{role}"
        values = yaml.safe_load(self.one("ConfigMap", name)["data"]["config.yaml"])
        assert isinstance(values, dict)
        return values


def values_of(name: str) -> Manifest:
    values = yaml.safe_load(VALUES[name].read_text())
    assert isinstance(values, dict)
    return values


def merged(base: Manifest, changes: Manifest) -> Manifest:
    """Return `base` with `changes` applied, as Helm merges values files."""
    both = dict(base)
    for key, value in changes.items():
        both[key] = merged(both[key], value) if isinstance(value, dict) and isinstance(both.get(key), dict) else value
    return both


def render(values: Manifest, *, name: str = "run", namespace: str = NAMESPACE, chart: Path = CHART) -> Release:
    rendered = _load(chart).render(values, name=name, namespace=namespace)
    texts = (text for name, text in sorted(rendered.items()) if name.endswith(".yaml"))
    return Release(tuple(manifest for text in texts for manifest in yaml.safe_load_all(text) if manifest))


@cache
def _load(chart: Path) -> helm_python.Chart:
    return helm_python.Chart.load(str(chart))
