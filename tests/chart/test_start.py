"""The rendered manifests, run as processes, train."""

from __future__ import annotations

import json
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.chart.cluster import Cluster
from tests.chart.monitoring import DASHBOARD, Prometheus, filled_in, find, promtool
from tests.chart.rendering import merged, render, values_of

from poise.local.models.catalog import make_model

SHORT = {"train": {"config": {"num_steps": 6, "evaluation": {"num_prompts": 16}}}}
SERVICES = ("run-poise-valkey-0", "run-poise-value-0", "run-poise-learner-0", "run-poise-generation-0")

ADMIN = {"value": 8052, "learner": 8053, "generation": 8051}
"""Where metrics are."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(render(merged(values_of("laptop"), SHORT)), tmp_path, "127.77.0")
    for name in SERVICES:
        if "/models" in cluster.pods[name].mounts:  # built once for all tests; each pod would take half a minute
            shutil.copytree(make_model("tiny"), cluster.pods[name].mounts["/models"] / "tiny")
    try:
        yield cluster
    finally:
        cluster.close()


def test_laptop_values_train_and_pass_helm_test(cluster: Cluster, tmp_path: Path) -> None:
    (job,) = (name for name in cluster.pods if name.startswith("run-poise-train"))
    for name in (*SERVICES, job):  # in any order: no service may need another one to start
        cluster.start(name)
    if find("prometheus") is None:  # without it, everything but monitoring is tested; test_monitoring reports the skip
        cluster.wait_ready(*SERVICES)
        cluster.wait_success(job)
    else:
        watch_the_run(cluster, job, tmp_path / "prometheus")
    lines = (tmp_path / "claims" / "run-poise-train" / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(6))

    cluster.start("run-poise-test")
    cluster.wait_success("run-poise-test")
    assert "all checks passed" in cluster.pods["run-poise-test"].log.read_text()

    for name in reversed(SERVICES):
        cluster.terminate(name)
    assert sum(pod.num_restarts for pod in cluster.pods.values()) == 0, cluster.logs()


def watch_the_run(cluster: Cluster, job: str, folder: Path) -> None:
    """Scrape the run until it ends; every query of the dashboard must return data."""
    scraped = {f"poise-{role}": f"{cluster.pods[f'run-poise-{role}-0'].address}:{port}" for role, port in ADMIN.items()}
    prometheus = Prometheus(folder, "127.77.1.1:9090", scraped)  # before the first push, to scrape each one
    try:
        cluster.wait_ready(*SERVICES)
        cluster.wait_success(job)
        for address in scraped.values():
            with urllib.request.urlopen(f"http://{address}/metrics") as answer:
                promtool("check", "metrics", text=answer.read().decode())
        for panel in json.loads(DASHBOARD.read_text())["panels"]:
            for target in panel.get("targets", ()):
                prometheus.wait_for(filled_in(target["expr"]))
    finally:
        prometheus.stop()
