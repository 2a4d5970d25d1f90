"""Kubernetes and the services accept the rendered chart, and it satisfies the restricted security profile."""

from __future__ import annotations

import base64
import itertools
import re
from typing import Any

import helm_python
import kubernetes_validate
import pytest
import yaml
from tests.chart.pod_security import violations
from tests.chart.rendering import CHART, NAMESPACE, VALUES, Manifest, Release, merged, render, values_of

from poise.generation.config import GenerationConfig
from poise.learner.config import LearnerConfig
from poise.orchestrator.algorithms.poise import PoiseOptions
from poise.orchestrator.check import CheckConfig
from poise.orchestrator.config import OrchestratorConfig
from poise.runtime.config.load import parse_config
from poise.value.config import ValueConfig

SWITCHES: dict[str, Manifest] = {
    "loop of one's own": {"train": {"enabled": False}},
    "another queue": {"valkey": {"enabled": False, "externalSecret": "redis"}},
    "own token": {"auth": {"existingSecret": "token"}},
    "own certificate": {"tls": {"enabled": True, "existingSecret": "certificate"}},
    "cert-manager": {"tls": {"enabled": True, "issuer": {"name": "ca", "kind": "ClusterIssuer"}}},
    "no policies": {"networkPolicy": {"enabled": False}},
    "no replica": {"generation": {"replicas": 0}, "train": {"enabled": False}},
    "watched": {"monitoring": {"podMonitor": True, "rules": True, "dashboard": True, "labels": {"team": "rl"}}},
    "traced": {
        "tracing": {"otlpEndpoint": "http://collector:4318"},
        "networkPolicy": {"collectors": [{"namespaceSelector": {}}]},
    },
    "autoscaled": {"generation": {"autoscaling": {"enabled": True}}, "monitoring": {"rules": True}},
    "autoscaled by KEDA": {
        "generation": {"autoscaling": {"enabled": True, "through": "keda", "prometheusUrl": "http://prometheus:9090"}}
    },
    "own data": {"train": {"dataConfigMap": "problems", "dataClaim": ""}},
    "callers": {"networkPolicy": {"clients": [{"namespaceSelector": {}}], "monitors": [{"namespaceSelector": {}}]}},
    "labelled": {"pods": {"labels": {"team": "rl"}, "annotations": {"note": "x"}}, "images": {"pullSecrets": ["pull"]}},
}

CONFIGS = {"generation": GenerationConfig, "value": ValueConfig, "learner": LearnerConfig, "train": OrchestratorConfig}

ALL = [*VALUES, *itertools.product(["cluster"], SWITCHES)]


@pytest.fixture(scope="module", params=ALL, ids=str)
def release(request: pytest.FixtureRequest) -> Release:
    name, switch = request.param if isinstance(request.param, tuple) else (request.param, None)
    return render(merged(values_of(name), SWITCHES[switch] if switch else {}))


@pytest.mark.parametrize("version", ["1.29", "1.37"])
def test_manifests_satisfy_the_kubernetes_schema(release: Release, version: str) -> None:
    for manifest in release.manifests:
        if manifest["apiVersion"].split("/")[0] in ("cert-manager.io", "keda.sh", "monitoring.coreos.com"):
            continue  # operators define these schemas
        kubernetes_validate.validate(manifest, version, strict=True)


def test_manifests_have_unique_names_and_release_labels(release: Release) -> None:
    names = [(manifest["kind"], manifest["metadata"]["name"]) for manifest in release.manifests]
    assert len(set(names)) == len(names)
    for manifest in release.manifests:
        assert manifest["metadata"]["namespace"] == NAMESPACE
        assert manifest["metadata"]["labels"]["app.kubernetes.io/instance"] == "run"


def test_every_service_accepts_its_rendered_config(release: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    # Values that come from a secret at run time.
    monkeypatch.setenv("POISE_VALUE_QUEUE__URL", "redis://poise:x@queue:6379/0")
    roles = [role for role in CONFIGS if role != "train" or release.all("Job")]
    for role in roles:
        parse_config(CONFIGS[role], release.config(role))
    if release.config("test")["endpoints"]["generation"]:
        parse_config(CheckConfig, release.config("test"))


def test_mounts_exist_and_cover_the_paths_in_configs(release: Release) -> None:
    made = {
        kind: {manifest["metadata"]["name"] for manifest in release.all(kind)}
        for kind in ("ConfigMap", "Secret", "PersistentVolumeClaim")
    }
    outside = {"redis", "token", "certificate", "problems", "models", "math-problems", "run-poise-tls"}
    for _, pod in release.pods():
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        for volume in volumes.values():
            name = (
                volume.get("configMap", {}).get("name")
                or volume.get("secret", {}).get("secretName")
                or volume.get("persistentVolumeClaim", {}).get("claimName")
            )
            assert name is None or name in outside or any(name in names for names in made.values()), name
        for container in containers(pod):
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            assert set(mounts.values()) <= volumes.keys()
            paths = re.findall(r"/(?:etc/poise|state|runs|models|data)\b[^\s\"',\]]*", str(config_of(release, pod)))
            for path in paths if container in pod["spec"]["containers"] else ():
                if path == "/state" and pod["metadata"]["labels"].get("poise/rank") == "follower":
                    continue  # only the first pod has that volume
                assert any(path.startswith(mount) for mount in mounts), f"{path} is in no volume"


def test_containers_are_unprivileged_and_read_only(release: Release) -> None:
    for _, pod in release.pods():
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        for container in containers(pod):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert "memory" in container["resources"]["limits"] or container["resources"]["limits"]["nvidia.com/gpu"]
            assert container["resources"]["requests"]["ephemeral-storage"]


def test_every_pod_satisfies_the_restricted_profile(release: Release) -> None:
    for owner, pod in release.pods():
        assert list(violations(pod)) == [], owner["metadata"]["name"]


def test_no_secret_leaks_into_other_manifests(release: Release) -> None:
    secrets = release.all("Secret")
    hidden = [value for secret in secrets for value in secret.get("stringData", {}).values()]
    encoded = [value for secret in secrets for value in secret.get("data", {}).values()]
    hidden += [*encoded, *(base64.b64decode(value).decode() for value in encoded)]
    others = str([manifest for manifest in release.manifests if manifest["kind"] != "Secret"])
    assert not any(value in others for value in hidden)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"generation": {"replica": 2}}, "replica"),
        ({"generation": {"replicas": "two"}}, "replicas"),
        ({"generation": {"replicas": -1}}, "replicas"),
        ({"learner": {"nodes": 0}}, "nodes"),
        ({"value": {"storage": {"size": "5 GB"}}}, "size"),
        ({"images": {"pullPolicy": "Sometimes"}}, "pullPolicy"),
        ({"pods": {"userId": 0}}, "userId"),
        ({"model": {"claim": "models"}}, "keep one"),
        ({"model": {"builtin": ""}}, "no model"),
        ({"train": {"config": {"tasks": []}}}, "train.config.tasks"),
        ({"valkey": {"enabled": False}}, "no queue"),
        ({"valkey": {"externalSecret": "redis"}}, "set valkey.enabled: false"),
        ({"tls": {"enabled": True}}, "tls.issuer.name"),
        ({"train": {"dataClaim": "a", "dataConfigMap": "b"}}, "keep one"),
        ({"value": {"config": {"estimator": "score_mean"}}}, "names no estimator: set only train.config.algorithm"),
        (
            {
                "train": {"config": {"algorithm": {"estimator": "score_prefix"}}},
                "value": {"config": {"estimator": "score_mean"}},
            },
            "value.config.estimator is score_mean, but train.config.algorithm has estimator score_prefix",
        ),
    ],
    ids=str,
)
def test_wrong_values_are_rejected_by_name(changes: Manifest, complaint: str) -> None:
    with pytest.raises(helm_python.HelmError, match=complaint):
        render(merged(values_of("laptop"), changes))


def test_value_service_gets_the_estimator_of_the_algorithm() -> None:
    def estimators(algorithm: Any, value: Manifest, *, enabled: bool = True) -> tuple[Any, Any]:
        values = values_of("cluster")
        values["train"]["enabled"] = enabled
        values["train"]["config"]["algorithm"] = algorithm
        values["value"]["config"] = value
        release = render(values)
        config = parse_config(OrchestratorConfig, release.config("train")) if enabled else None
        return release.config("value").get("estimator"), config and config.group_size

    assert estimators({"kind": "poise", "estimator": "score_prefix"}, {}) == ("score_prefix", 1)
    assert estimators({"kind": "poise", "estimator": "auto"}, {"estimator": "auto"}) == ("auto", 1)
    assert estimators("poise", {}) == (None, 2)
    assert PoiseOptions().estimator == ValueConfig.model_fields["estimator"].default
    assert estimators("spo", {"estimator": "score_mean"}) == ("score_mean", 1)
    assert estimators({}, {"estimator": "score_mean"}, enabled=False) == ("score_mean", None)


@pytest.mark.parametrize("name", VALUES)
def test_helm_lint_finds_nothing(name: str) -> None:
    report = helm_python.lint(str(CHART), values_of(name), strict=True)
    assert [message for message in report["messages"] if message["severity"] > 1] == []


def test_every_value_is_described() -> None:
    def undescribed(schema: dict[str, Any], path: str) -> list[str]:
        missing = [path] if path and not schema.get("description") else []
        return missing + [
            name
            for key, child in schema.get("properties", {}).items()
            if (path, key) != ("", "global")
            for name in undescribed(child, f"{path}.{key}")
        ]

    assert undescribed(yaml.safe_load((CHART / "values.schema.json").read_text()), "") == []


def containers(pod: Manifest) -> list[Manifest]:
    return [*pod["spec"].get("initContainers", ()), *pod["spec"]["containers"]]


def config_of(release: Release, pod: Manifest) -> Manifest:
    role = pod["metadata"]["labels"]["app.kubernetes.io/component"]
    return {} if role == "valkey" else release.config(role)


def test_every_program_may_send_traces_to_the_collector() -> None:
    release = render(merged(values_of("cluster"), SWITCHES["traced"]))
    for role in CONFIGS:
        assert release.config(role)["tracing"] == {"otlp_endpoint": "http://collector:4318"}
        (policy,) = (one for one in release.all("NetworkPolicy") if one["metadata"]["name"] == f"run-poise-{role}")
        assert [{"port": 4318, "protocol": "TCP"}] in [rule.get("ports") for rule in policy["spec"]["egress"]]
