"""Effects of an upgrade, a rollback, a lost node and a larger volume on a release."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import helm_python
import pytest
from tests.chart.rendering import CHART, VALUES, Manifest, Release, merged, render, values_of

OWN_SECRETS: Manifest = {
    "auth": {"existingSecret": "token"},
    "valkey": {"enabled": False, "externalSecret": "redis"},
}
"""Without a cluster, each rendering would create new secrets."""

LOST = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")


def templates(release: Release) -> dict[str, Manifest]:
    return {owner["metadata"]["name"]: pod for owner, pod in release.pods() if owner["kind"] != "Pod"}


@pytest.mark.parametrize("name", VALUES)
def test_another_chart_version_alone_restarts_nothing(name: str, tmp_path: Path) -> None:
    newer = tmp_path / "poise"
    shutil.copytree(CHART, newer)
    about = (newer / "Chart.yaml").read_text()
    about = re.sub(r"^version: .*$", "version: 9.9.9", about, flags=re.MULTILINE)
    (newer / "Chart.yaml").write_text(re.sub(r"^appVersion: .*$", "appVersion: 9.8.7", about, flags=re.MULTILINE))
    values = merged(values_of(name), OWN_SECRETS)
    values = merged(values, {"images": {"tag": "0.1.0"}})
    before, after = render(values), render(values, chart=newer)
    assert templates(before) == templates(after)
    assert {"poise-9.9.9", "9.8.7"} <= {str(label) for label in after.manifests[0]["metadata"]["labels"].values()}


@pytest.mark.parametrize(
    "changes",
    [
        {"monitoring": {"podMonitor": True, "rules": True, "labels": {"a": "b"}}},
        {"networkPolicy": {"monitors": [{"namespaceSelector": {}}]}},
        {"networkPolicy": {"enabled": False}},
        {"generation": {"replicas": 3, "maxUnavailable": 2}},
        {"learner": {"storage": {"size": "600Gi"}}, "value": {"storage": {"size": "600Gi"}}},
        {"train": {"backoffLimit": 3}},
        {"tests": {"timeoutSeconds": 900}},
    ],
    ids=str,
)
def test_changes_outside_the_pods_restart_none(changes: Manifest) -> None:
    values = merged(merged(values_of("laptop"), OWN_SECRETS), {"networkPolicy": {"monitors": [{"podSelector": {}}]}})
    assert templates(render(values)) == templates(render(merged(values, changes)))


@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_no_pod_waits_for_another_before_it_is_replaced(nodes: int) -> None:
    sets = render(merged(values_of("laptop"), {"learner": {"nodes": nodes}})).all("StatefulSet")
    assert len(sets) == 4 + (nodes > 1)
    for one in sets:
        # OrderedReady would never replace a pod that is not ready, not even on a rollback.
        assert one["spec"]["podManagementPolicy"] == "Parallel", one["metadata"]["name"]
        # Pods that are only ready together would block each other's update.
        are_a_group = one["spec"]["replicas"] > 1 and "learner" in one["metadata"]["name"]
        assert not (are_a_group and "readinessProbe" in one["spec"]["template"]["spec"]["containers"][0])


@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_every_selector_finds_the_pods_of_its_own_set(nodes: int) -> None:
    sets = render(merged(values_of("laptop"), {"learner": {"nodes": nodes}})).all("StatefulSet")
    for one in sets:
        selector = one["spec"]["selector"]["matchLabels"].items()
        found = [
            other["metadata"]["name"]
            for other in sets
            if selector <= other["spec"]["template"]["metadata"]["labels"].items()
        ]
        assert found == [one["metadata"]["name"]]


@pytest.mark.parametrize("name", VALUES)
def test_volumes_may_grow_and_only_their_users_have_one(name: str) -> None:
    release = render(merged(values_of(name), {"learner": {"nodes": 3}}))
    users: dict[str, list[str]] = {}
    for owner, pod in release.pods():
        assert "volumeClaimTemplates" not in owner["spec"], "their size could never change"
        for volume in pod["spec"]["volumes"]:
            if claim := volume.get("persistentVolumeClaim", {}).get("claimName"):
                users.setdefault(claim, []).append(owner["metadata"]["name"])
    for made in release.all("PersistentVolumeClaim"):
        (user,) = users[made["metadata"]["name"]]
        assert user.startswith(made["metadata"]["name"]) and "follower" not in user
        assert made["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
        assert made["spec"]["accessModes"] == ["ReadWriteOnce"]


@pytest.mark.parametrize("role", ["value", "learner", "train", "valkey"])
def test_an_existing_claim_replaces_the_charts_own(role: str) -> None:
    release = render(merged(values_of("laptop"), {role: {"storage": {"claim": "mine"}}}))
    assert f"run-poise-{role}" not in [one["metadata"]["name"] for one in release.all("PersistentVolumeClaim")]
    (pod,) = (pod for name, pod in templates(release).items() if name.startswith(f"run-poise-{role}"))
    claims = [volume["persistentVolumeClaim"] for volume in pod["spec"]["volumes"] if "persistentVolumeClaim" in volume]
    assert {"claimName": "mine"} in claims


@pytest.mark.parametrize("seconds", [1, 60, 300])
def test_pods_of_a_lost_node_are_evicted_after_the_set_time(seconds: int) -> None:
    for pod in templates(render(merged(values_of("cluster"), {"pods": {"lostNodeSeconds": seconds}}))).values():
        limits = {one["key"]: one.get("tolerationSeconds") for one in pod["spec"]["tolerations"] if one["key"] in LOST}
        assert limits == dict.fromkeys(LOST, seconds)


def test_own_tolerations_of_a_lost_node_are_kept() -> None:
    own = {"key": LOST[0], "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 9}
    release = render(merged(values_of("laptop"), {"value": {"tolerations": [own]}}))
    given = templates(release)["run-poise-value"]["spec"]["tolerations"]
    assert [one["tolerationSeconds"] for one in given if one["key"] == LOST[0]] == [9]
    assert [one["tolerationSeconds"] for one in given if one["key"] == LOST[1]] == [60]


@pytest.mark.parametrize("role", ["generation", "value", "learner", "train", "valkey"])
@pytest.mark.parametrize("toleration", [{"operator": "Exists"}, {"operator": "Exists", "effect": "NoExecute"}], ids=str)
def test_a_toleration_of_the_out_of_service_taint_is_rejected(role: str, toleration: Manifest) -> None:
    with pytest.raises(helm_python.HelmError, match=f"{role}.tolerations tolerates every taint.*name the key"):
        render(merged(values_of("laptop"), {role: {"tolerations": [toleration]}}))
    harmless = [toleration | {"effect": "NoSchedule"}, {"key": "nvidia.com/gpu", "operator": "Exists"}]
    assert render(merged(values_of("laptop"), {role: {"tolerations": harmless}})).all("Job")


@pytest.mark.parametrize("page", ["docs/how_to/kubernetes.md", "docs/how_to/runbook.md"])
def test_the_guides_name_the_taint_of_a_lost_node(page: str) -> None:
    text = (CHART.parents[1] / page).read_text()
    assert "kubectl taint nodes NAME node.kubernetes.io/out-of-service=nodeshutdown:NoExecute" in text
    assert "kubectl taint nodes NAME node.kubernetes.io/out-of-service-" in text
