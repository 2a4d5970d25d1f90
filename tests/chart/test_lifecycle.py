"""Pods restart when their own inputs change, and have time to drain."""

from __future__ import annotations

import re

import pytest
from tests.chart.rendering import VALUES, Manifest, merged, render, values_of

OWN_SECRETS: Manifest = {
    "auth": {"existingSecret": "token"},
    "valkey": {"enabled": False, "externalSecret": "redis"},
}


def test_a_changed_config_restarts_only_its_own_pods() -> None:
    before = render(values_of("laptop"))
    after = render(merged(values_of("laptop"), {"value": {"config": {"horizon_steps": 7}}}))
    changed = {
        owner["metadata"]["name"]
        for (owner, pod), (_, other) in zip(before.pods(), after.pods(), strict=True)
        if pod["metadata"].get("annotations", {}).get("checksum/config")
        != other["metadata"].get("annotations", {}).get("checksum/config")
    }
    assert changed == {"run-poise-value"}


@pytest.mark.parametrize(
    "changes",
    [
        {"train": {"config": {"num_steps": 5}}},
        {"images": {"tag": "0.2.0"}},
        {"images": {"pullPolicy": "Always"}},
        {"train": {"resources": {"requests": {"cpu": "9"}}}},
        {"train": {"env": [{"name": "A", "value": "b"}]}},
        {"train": {"nodeSelector": {"pool": "cpu"}}},
        {"train": {"dataConfigMap": "problems"}},
        {"pods": {"labels": {"team": "rl"}}},
    ],
    ids=str,
)
def test_a_changed_pod_makes_another_job_on_the_same_folder(changes: Manifest) -> None:
    # Kubernetes rejects a change of an existing Job's pod, so `helm upgrade` would fail.
    before, after = (
        render(merged(values, OWN_SECRETS)).all("Job")[0]
        for values in (values_of("laptop"), merged(values_of("laptop"), changes))
    )
    assert before["spec"]["template"] != after["spec"]["template"]
    assert before["metadata"]["name"] != after["metadata"]["name"]
    runs = [
        volume
        for job in (before, after)
        for volume in job["spec"]["template"]["spec"]["volumes"]
        if volume["name"] == "runs"
    ]
    assert runs[0] == runs[1]


def checksums(values: Manifest) -> dict[str, dict[str, str]]:
    """Return the checksums that restart each pod, except that of its settings."""
    return {
        pod["metadata"]["labels"]["app.kubernetes.io/component"]: {
            name: value
            for name, value in pod["metadata"]["annotations"].items()
            if name.startswith("checksum/") and name != "checksum/config"
        }
        for owner, pod in render(values).pods()
        if owner["kind"] != "Pod"
    }


def test_a_new_token_or_password_restarts_its_readers() -> None:
    # Without a cluster, each rendering creates new secrets.
    before, after = checksums(values_of("laptop")), checksums(values_of("laptop"))
    changed = {
        (role, name) for role, values in before.items() for name, value in values.items() if value != after[role][name]
    }
    readers = {(role, "checksum/token") for role in ("generation", "value", "learner", "train")}
    assert changed == readers | {("value", "checksum/queue"), ("valkey", "checksum/queue")}
    assert len({values["checksum/token"] for role, values in before.items() if role != "valkey"}) == 1
    assert checksums(merged(values_of("laptop"), OWN_SECRETS)) == checksums(merged(values_of("laptop"), OWN_SECRETS))


def test_mutable_and_unrelated_settings_keep_the_job() -> None:
    changes = {"train": {"backoffLimit": 7}, "value": {"env": [{"name": "A", "value": "b"}]}}
    names = [
        render(merged(values, OWN_SECRETS)).all("Job")[0]["metadata"]["name"]
        for values in (values_of("laptop"), merged(values_of("laptop"), changes))
    ]
    assert names[0] == names[1]


@pytest.mark.parametrize("name", VALUES)
def test_grace_periods_exceed_the_drain_times(name: str) -> None:
    release = render(values_of(name))
    for role in ("generation", "value", "learner"):
        pod = release.one("StatefulSet", f"run-poise-{role}")["spec"]["template"]["spec"]
        assert pod["terminationGracePeriodSeconds"] >= release.config(role)["drain_timeout_s"] + 30


@pytest.mark.parametrize("changes", [{"nodes": 2}, {"gpusPerNode": 2}], ids=str)
def test_torchrun_waits_for_the_drain_within_the_grace(changes: dict[str, int]) -> None:
    settings = {"learner": changes | {"config": {"drain_timeout_s": 200.5}}}
    pod = render(merged(values_of("laptop"), settings)).one("StatefulSet", "run-poise-learner")["spec"]["template"][
        "spec"
    ]
    (container,) = pod["containers"]
    (limit,) = re.findall(r"--shutdown-timeout=(\d+)", " ".join(container["args"]))
    assert 200.5 < int(limit) < pod["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("nodes", [1, 2, 5])
def test_only_the_first_learner_pod_has_a_readiness_probe(nodes: int) -> None:
    release = render(merged(values_of("laptop"), {"learner": {"nodes": nodes}}))
    sets = {one["metadata"]["name"]: one["spec"] for one in release.all("StatefulSet")}
    first = sets["run-poise-learner"]
    assert first["replicas"] == 1
    assert "grpc" in first["template"]["spec"]["containers"][0]["readinessProbe"]
    if nodes > 1:
        followers = sets["run-poise-learner-follower"]
        assert (followers["replicas"], followers["ordinals"]) == (nodes - 1, {"start": 1})
        # A follower with a readiness probe would block the update that must replace all pods.
        assert not {"startupProbe", "readinessProbe"} & followers["template"]["spec"]["containers"][0].keys()


def spec_of(values: Manifest, role: str) -> Manifest:
    specs = [
        pod["spec"]
        for _, pod in render(values).pods()
        if pod["metadata"]["labels"]["app.kubernetes.io/component"] == role
    ]
    assert all(spec.get("nodeSelector") == specs[0].get("nodeSelector") for spec in specs)
    found = specs[0]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("role", ["generation", "learner"])
def test_replicas_are_spread_over_the_configured_label(role: str) -> None:
    def spread(over: str) -> list[str]:
        constraints = spec_of(merged(values_of("cluster"), {role: {"spreadOver": over}}), role).get(
            "topologySpreadConstraints", ()
        )
        assert all(one["labelSelector"]["matchLabels"]["app.kubernetes.io/component"] == role for one in constraints)
        return [one["topologyKey"] for one in constraints]

    assert spread("topology.kubernetes.io/zone") == ["topology.kubernetes.io/zone"]
    assert spread("") == []


def test_the_test_pod_is_scheduled_like_the_loop() -> None:
    where = {"nodeSelector": {"pool": "cpu"}, "tolerations": [{"key": "cpu", "operator": "Exists"}]}
    spec = spec_of(merged(values_of("laptop"), {"train": where | {"priorityClassName": "low"}}), "test")
    assert spec["nodeSelector"] == where["nodeSelector"]
    assert where["tolerations"][0] in spec["tolerations"]
    assert spec["priorityClassName"] == "low"


GIBI = 2**30


def in_bytes(quantity: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(Mi|Gi)", quantity).groups()  # type: ignore[union-attr]
    return int(number) * {"Mi": 2**20, "Gi": GIBI}[unit]


@pytest.mark.parametrize(("size", "limit"), [("20Gi", 30 * GIBI), ("60Gi", 70 * GIBI), ("512Mi", 10.5 * GIBI)])
def test_storage_limit_covers_the_models_volume(size: str, limit: float) -> None:
    values = merged(values_of("qwen3-4b-two-gpus"), {"model": {"download": {"size": size}}})
    for role in ("generation", "learner"):
        pod = render(values).one("StatefulSet", f"run-poise-{role}")["spec"]["template"]["spec"]
        for container in (*pod["initContainers"], *pod["containers"]):
            assert in_bytes(container["resources"]["limits"]["ephemeral-storage"]) == limit
        # Volumes on the node's disk; those in memory count as memory.
        written = [volume["emptyDir"] for volume in pod["volumes"] if "emptyDir" in volume]
        assert sum(in_bytes(one["sizeLimit"]) for one in written if one.get("medium") != "Memory") < limit
