"""The bundled queue starts, rejects instead of evicting, and answers other hosts."""

from __future__ import annotations

import re
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import yaml
from tests.chart.cluster import PROGRAMS, Cluster
from tests.chart.rendering import CHART, merged, render, values_of

DEADLINE_S = 300.0


@pytest.mark.parametrize(
    ("image", "program"),
    [
        ("valkey/valkey:9.1.2", "valkey"),
        ("redis:7.4", "redis"),
        ("registry:5000/bitnami/redis", "redis"),
        ("redis.example.com/valkey", "valkey"),
        (f"chainguard/valkey@sha256:{'0' * 64}", "valkey"),
    ],
)
def test_the_queue_uses_the_programs_of_its_image(image: str, program: str) -> None:
    release = render(merged(values_of("laptop"), {"images": {"valkey": image}}))
    (container,) = release.one("StatefulSet", "run-poise-valkey")["spec"]["template"]["spec"]["containers"]
    assert container["command"] == [f"{program}-server"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["exec"]["command"] == [f"{program}-cli", "ping"]


def test_labels_may_use_only_part_of_the_memory() -> None:
    changes = {"valkey": {"resources": {"limits": {"memory": "1Gi"}}}}
    release = render(merged(values_of("laptop"), changes))
    pod = release.one("StatefulSet", "run-poise-valkey")["spec"]["template"]["spec"]
    arguments = pod["containers"][0]["args"]
    settings = dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert settings["--maxmemory"] == str(6 * 2**30 // 10)
    assert settings["--maxmemory-policy"] == "noeviction"


@pytest.mark.parametrize("source", ["chart", "compose"])
def test_the_queue_answers_other_hosts(source: str, tmp_path: Path) -> None:
    # Valkey's own image is built without protected mode. The binary here has it, like that of most images.
    cluster = Cluster(render(values_of("laptop")), tmp_path, "127.79.0")
    if source == "chart":
        pod = cluster.start("run-poise-valkey-0")
        process, address = pod.process, pod.address
    else:
        compose = yaml.safe_load((CHART.parents[1] / "deploy" / "compose.yaml").read_text())
        command = [part.replace("/data", str(tmp_path)) for part in compose["services"]["valkey"]["command"]]
        address = "127.79.1.1"
        process = subprocess.Popen([PROGRAMS["valkey-server"], *command[1:], "--bind", address], cwd=tmp_path)
    assert process is not None
    try:
        assert ping(address, other_host()) == b"+PONG\r\n"
    finally:
        process.kill()
        process.wait()


def other_host() -> str:
    """Return an address of this host that a server does not treat as loopback."""
    addresses = [one.address for of_card in psutil.net_if_addrs().values() for one in of_card]
    found = [address for address in addresses if re.fullmatch(r"[\d.]+", address) and not address.startswith("127.")]
    if not found:
        pytest.skip("this machine has no address besides those of its loopback")
    return found[0]


def ping(address: str, source_address: str) -> bytes:
    """Send a command from an address that is not loopback."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        try:
            with socket.create_connection((address, 6379), 5, (source_address, 0)) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(200)
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
