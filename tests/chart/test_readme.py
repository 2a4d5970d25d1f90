"""What the chart's README tells an operator to type exists."""

from __future__ import annotations

import re

import pytest
import yaml
from tests.chart.rendering import CHART, Manifest, merged, render, values_of

README = (CHART / "README.md").read_text()
SETTINGS = re.findall(r"--set ([\w.]+=[^\s`]*)", README) + re.findall(
    r"^ +`(monitoring\.\w+=\w+)`", README, re.MULTILINE
)


def as_values(text: str) -> Manifest:
    """`a.b=1,c=x` as Helm reads it."""
    values: Manifest = {}
    for setting in re.split(r",(?=\w+\.)", text):
        path, _, value = setting.partition("=")
        read = value.strip("{}").split(",") if value.startswith("{") else yaml.safe_load(value or "''")
        for name in reversed(path.split(".")):
            read = {name: read}
        values = merged(values, read)
    return values


@pytest.mark.parametrize("text", SETTINGS)
def test_every_setting_that_is_typed_is_one(text: str) -> None:
    values = values_of("qwen3-4b-two-gpus") | {"networkPolicy": {"monitors": [{"namespaceSelector": {}}]}}
    assert render(merged(values, as_values(text.replace("$PREFIX", "registry:5000/you")))).all("Job")


def test_all_pods_secrets_and_claims_of_the_worked_example_are_found_by_its_labels() -> None:
    release = render(values_of("qwen3-4b-two-gpus"))
    assert re.findall(r"app.kubernetes.io/instance=(\w+)", README)
    for kind in ("Secret", "PersistentVolumeClaim", "StatefulSet"):
        assert all(one["metadata"]["labels"]["app.kubernetes.io/instance"] == "run" for one in release.all(kind))


def test_every_file_that_is_linked_or_installed_with_is_there() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)", README) if not link.startswith("http")]
    assert links and all((CHART / link).exists() for link in links)
    files = re.findall(r"-f (helm/poise/\S+)", README)
    assert files and all((CHART.parents[1] / file).exists() for file in files)
