"""When pods are started anew, and how long they are given to end."""

from __future__ import annotations

import re

import pytest
from tests.chart.rendering import VALUES, merged, render, values_of


def test_a_changed_config_rolls_its_pods_and_no_others() -> None:
    before = render(values_of("laptop"))
    after = render(merged(values_of("laptop"), {"value": {"config": {"horizon_steps": 7}}}))
    changed = {
        owner["metadata"]["name"]
        for (owner, pod), (_, other) in zip(before.pods(), after.pods(), strict=True)
        if pod["metadata"].get("annotations", {}).get("checksum/config")
        != other["metadata"].get("annotations", {}).get("checksum/config")
    }
    assert changed == {"run-poise-value"}


def test_a_job_with_other_settings_is_another_job_on_the_same_folder() -> None:
    before, after = (
        render(merged(values_of("laptop"), {"train": {"config": {"num_steps": steps}}})).all("Job")[0]
        for steps in (5, 6)
    )
    assert before["metadata"]["name"] != after["metadata"]["name"]
    assert before["spec"]["template"]["spec"]["volumes"] == after["spec"]["template"]["spec"]["volumes"]


@pytest.mark.parametrize("name", VALUES)
def test_pods_live_longer_than_their_services_drain(name: str) -> None:
    release = render(values_of(name))
    for role in ("generation", "value", "learner"):
        pod = release.one("StatefulSet", f"run-poise-{role}")["spec"]["template"]["spec"]
        assert pod["terminationGracePeriodSeconds"] >= release.config(role)["drain_timeout_s"] + 30


@pytest.mark.parametrize("changes", [{"nodes": 2}, {"gpusPerNode": 2}], ids=str)
def test_torchrun_lets_the_learner_drain_and_is_done_before_the_pods_time_is_over(changes: dict[str, int]) -> None:
    settings = {"learner": changes | {"config": {"drain_timeout_s": 200.5}}}
    pod = render(merged(values_of("laptop"), settings)).one("StatefulSet", "run-poise-learner")["spec"]["template"][
        "spec"
    ]
    (container,) = pod["containers"]
    (limit,) = re.findall(r"--shutdown-timeout=(\d+)", " ".join(container["args"]))
    assert 200.5 < int(limit) < pod["terminationGracePeriodSeconds"]


def test_every_pod_of_a_learner_is_asked_what_it_can_answer() -> None:
    # Only the first process speaks gRPC; the others answer on the admin port alone.
    for nodes, kind in ((1, "grpc"), (2, "httpGet")):
        learner = render(merged(values_of("laptop"), {"learner": {"nodes": nodes}})).one(
            "StatefulSet", "run-poise-learner"
        )
        (container,) = learner["spec"]["template"]["spec"]["containers"]
        assert kind in container["readinessProbe"]
