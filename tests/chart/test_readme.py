"""What the chart's README tells an operator to type exists."""

from __future__ import annotations

import re
import textwrap

import kubernetes_validate
import pytest
import yaml
from tests.chart.pod_security import violations
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


def typed_manifests() -> list[Manifest]:
    """What the guides of the repository apply by hand, claims filled in."""
    texts = [path.read_text() for path in (CHART / "README.md", *(CHART.parents[1] / "docs").rglob("*.md"))]
    heredoc = re.compile(r"<<'?END'?.*?\n(.*?)\n +END$", re.DOTALL | re.MULTILINE)
    applied = [text for page in texts for text in heredoc.findall(page)]
    filled = [re.sub(r"\$\{?\d(:-\$\d\})?", "claim", textwrap.dedent(text)) for text in applied]
    return [manifest for text in filled for manifest in yaml.safe_load_all(text)]


def test_pods_that_are_typed_satisfy_the_restricted_profile() -> None:
    pods = [manifest for manifest in typed_manifests() if manifest["kind"] == "Pod"]
    assert pods
    for pod in pods:
        kubernetes_validate.validate(pod, "1.29", strict=True)
        assert list(violations(pod)) == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"securityContext": {"runAsUser": 10001}}, "copy: may be root"),
        ({"hostNetwork": True}, "hostNetwork"),
        ({"volumes": [{"name": "data", "hostPath": {"path": "/"}}]}, "volume data"),
        ({"containers": [{"name": "copy"}]}, "copy: privileges"),
        ({"containers": [{"name": "copy"}]}, "copy: capabilities"),
    ],
    ids=str,
)
def test_a_pod_that_asks_for_more_would_be_found(change: Manifest, complaint: str) -> None:
    (pod,) = (manifest for manifest in typed_manifests() if manifest["kind"] == "Pod")
    assert complaint in list(violations(pod | {"spec": pod["spec"] | change}))


def test_every_file_that_is_linked_or_installed_with_is_there() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)", README) if not link.startswith("http")]
    assert links and all((CHART / link).exists() for link in links)
    files = re.findall(r"-f (helm/poise/\S+)", README)
    assert files and all((CHART.parents[1] / file).exists() for file in files)
