"""The commands, settings and manifests in the guides for Kubernetes work."""

from __future__ import annotations

import re
import textwrap

import kubernetes_validate
import pytest
import yaml
from tests.chart.pod_security import violations
from tests.chart.rendering import CHART, Manifest, merged, render, values_of

ROOT = CHART.parents[1]
PAGES = [CHART / "README.md", *(ROOT / "docs").rglob("*.md")]
GUIDE = (CHART / "README.md").read_text() + (ROOT / "docs" / "how_to" / "kubernetes.md").read_text()
SETTINGS = re.findall(r"--set ([\w.]+=[^\s`]*)", GUIDE) + re.findall(r"`(monitoring\.\w+=\w+)`", GUIDE)


def as_values(text: str) -> Manifest:
    """Return `a.b=1,c=x` as values, as Helm reads it."""
    values: Manifest = {}
    for setting in re.split(r",(?=\w+\.)", text):
        path, _, value = setting.partition("=")
        read = value.strip("{}").split(",") if value.startswith("{") else yaml.safe_load(value or "''")
        for name in reversed(path.split(".")):
            read = {name: read}
        values = merged(values, read)
    return values


@pytest.mark.parametrize("text", SETTINGS)
def test_every_setting_in_the_guides_exists(text: str) -> None:
    values = values_of("qwen3-4b-two-gpus") | {"networkPolicy": {"monitors": [{"namespaceSelector": {}}]}}
    assert render(merged(values, as_values(text.replace("$PREFIX", "registry:5000/you")))).all("Job")


def test_labels_in_the_guide_select_secrets_claims_and_pods() -> None:
    release = render(values_of("qwen3-4b-two-gpus"))
    assert re.findall(r"app.kubernetes.io/instance=(\w+)", GUIDE)
    for kind in ("Secret", "PersistentVolumeClaim", "StatefulSet"):
        assert all(one["metadata"]["labels"]["app.kubernetes.io/instance"] == "run" for one in release.all(kind))


def typed_manifests() -> list[Manifest]:
    """Return the manifests that the guides apply by hand, with the names of claims filled in."""
    heredoc = re.compile(r"<<'?END'?.*?\n(.*?)\n +END$", re.DOTALL | re.MULTILINE)
    applied = [text for page in PAGES for text in heredoc.findall(page.read_text())]
    filled = [re.sub(r"\$\{?\d(:-\$\d\})?", "claim", textwrap.dedent(text)) for text in applied]
    return [manifest for text in filled for manifest in yaml.safe_load_all(text)]


def test_pods_in_the_guides_satisfy_the_restricted_profile() -> None:
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
def test_a_pod_with_more_privileges_is_found(change: Manifest, complaint: str) -> None:
    (pod,) = (manifest for manifest in typed_manifests() if manifest["kind"] == "Pod")
    assert complaint in list(violations(pod | {"spec": pod["spec"] | change}))


def test_values_files_in_the_guides_exist() -> None:
    files = re.findall(r"-f (helm/poise/\S+)", GUIDE)
    assert files and all((ROOT / file).exists() for file in files)
