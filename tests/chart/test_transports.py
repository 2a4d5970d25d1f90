"""The chart opens the ports that a push transport needs, and rejects transports that cannot work."""

from __future__ import annotations

from typing import Any

import helm_python
import pytest
from tests.chart.rendering import Manifest, Release, merged, render, values_of

BOTH: Manifest = {"images": {"learner": "poise-generation"}}


def pushing(transport: str, changes: Manifest | None = None, name: str = "cluster") -> Release:
    values = merged(values_of(name), {"learner": {"config": {"push": {"transport": transport}}}})
    return render(merged(values, changes or {}))


@pytest.mark.parametrize(
    ("transport", "changes", "name", "remedy"),
    [
        ("nccl", {}, "cluster", "set images.learner: poise-generation"),
        ("nccl", {}, "qwen3-4b-two-gpus", "set images.learner: poise-generation"),
        ("nccl", {"images": {"prefix": "registry:5000/you/"}}, "cluster", "set images.learner: poise-generation"),
        ("nccl", {"images": {"learner": "you/poise-learner:7"}}, "cluster", "set images.learner: poise-generation"),
        ("nccl", {"images": {"learner": "poise-cpu"}}, "cluster", "set images.learner: poise-generation"),
        ("nccl", BOTH, "laptop", "set generation.gpus and learner.gpusPerNode above 0"),
        ("nccl", BOTH | {"generation": {"gpus": 0}}, "cluster", "set generation.gpus"),
        ("shared", {}, "cluster", "pods have no folder in common"),
        ("shared", {}, "laptop", "set grpc"),
        ("lora", {"learner": {"config": {"lora": {"rank": 8}}}}, "cluster", "set generation.config.lora"),
    ],
)
def test_a_transport_that_cannot_work_is_rejected(transport: str, changes: Manifest, name: str, remedy: str) -> None:
    with pytest.raises(helm_python.HelmError, match=remedy):
        pushing(transport, changes, name)


def test_nccl_accepts_a_custom_learner_image() -> None:
    assert pushing("nccl", {"images": {"learner": "you/learner-with-vllm:7"}}).config("generation")["nccl"] is True


def open_between(release: Release, direction: str, role: str, other: str) -> list[Any]:
    """Return the ports of each rule of `role` towards or from `other`; None means all."""
    policy = release.one("NetworkPolicy", f"run-poise-{role}")["spec"]
    side = "to" if direction == "egress" else "from"
    return [
        rule.get("ports")
        for rule in policy[direction]
        for peer in rule[side]
        if peer.get("podSelector", {}).get("matchLabels", {}).get("app.kubernetes.io/component") == other
    ]


@pytest.mark.parametrize("prefix", ["", "registry:5000/you/"])
@pytest.mark.parametrize("name", ["cluster", "qwen3-4b-two-gpus"])
def test_nccl_finds_vllm_its_replicas_and_open_ports(name: str, prefix: str) -> None:
    release = pushing("nccl", merged(BOTH, {"images": {"prefix": prefix}}), name)
    assert release.config("generation")["nccl"] is True
    image = release.one("StatefulSet", "run-poise-learner")["spec"]["template"]["spec"]["containers"][0]["image"]
    assert image == f"{prefix}poise-generation:0.1.0"
    for role, other in (("learner", "generation"), ("generation", "learner")):
        for direction in ("ingress", "egress"):
            assert None in open_between(release, direction, role, other), (direction, role, other)


@pytest.mark.parametrize("transport", ["grpc", "lora"])
def test_other_transports_open_no_more_than_grpc(transport: str) -> None:
    lora = {"learner": {"config": {"lora": {"rank": 8}}}, "generation": {"config": {"lora": {"max_rank": 8}}}}
    release = pushing(transport, lora)
    assert "nccl" not in release.config("generation")
    assert open_between(release, "egress", "generation", "learner") == []
    assert open_between(release, "egress", "learner", "generation") == [[{"port": "grpc", "protocol": "TCP"}]]


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"learner": {"config": {"export_dir": "/exports"}}}, "learner.config.export_dir is /exports.*/state or /tmp"),
        ({"learner": {"config": {"export_dir": "/stateful"}}}, "where the pod has no volume"),
        (
            {"generation": {"config": {"staging_dir": "/var/tmp"}}},
            "generation.config.staging_dir is /var/tmp",
        ),
    ],
    ids=str,
)
def test_a_folder_that_no_pod_can_write_is_rejected(changes: Manifest, remedy: str) -> None:
    with pytest.raises(helm_python.HelmError, match=remedy):
        render(merged(values_of("laptop"), changes))


@pytest.mark.parametrize("folder", ["/state", "/state/exports/a", "/tmp/exports"])
def test_folders_of_the_pods_volumes_are_accepted(folder: str) -> None:
    changes = {"learner": {"config": {"export_dir": folder}}, "generation": {"config": {"staging_dir": "/dev/shm/w"}}}
    assert render(merged(values_of("laptop"), changes)).config("learner")["export_dir"] == folder
