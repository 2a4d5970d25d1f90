"""A learner on two nodes, as rendered: torchrun joins two pods, and both pass their probes."""

from __future__ import annotations

import asyncio
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.chart.cluster import Cluster
from tests.chart.rendering import merged, render, values_of

from poise.local.models.catalog import make_model
from poise_client import LearnerClient

FIRST, SECOND = "run-poise-learner-0", "run-poise-learner-follower-1"
TWO_NODES = {"learner": {"nodes": 2}, "generation": {"replicas": 0}, "train": {"enabled": False}}

pytestmark = pytest.mark.slow


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(render(merged(values_of("laptop"), TWO_NODES)), tmp_path, "127.78.0")
    for name in (FIRST, SECOND):
        shutil.copytree(make_model("tiny"), cluster.pods[name].mounts["/models"] / "tiny")
        cluster.start(name)
    try:
        yield cluster
    finally:
        cluster.close()


async def test_both_pods_work_together_and_stop_in_their_grace(cluster: Cluster) -> None:
    await asyncio.to_thread(cluster.wait_ready, FIRST, SECOND)
    pods = [cluster.pods[name] for name in (FIRST, SECOND)]
    token = (pods[0].mounts["/etc/poise/auth"] / "token").read_text()
    with LearnerClient(f"{pods[0].address}:50053", token=token, allow_insecure_token=True) as client:
        exported = client.export_model("both")  # gathered from both pods
    assert (Path(exported.path) / "model.safetensors").exists()
    assert "rank 1 of 2 follows rank 0" in pods[1].log.read_text()
    for pod in pods:
        assert pod.process is not None
        pod.process.send_signal(signal.SIGTERM)
    for pod in pods:
        assert pod.process is not None
        pod.process.wait(60)
    assert "learner: stopped" in pods[0].log.read_text()
    assert sum(pod.num_restarts for pod in pods) == 0, cluster.logs()
