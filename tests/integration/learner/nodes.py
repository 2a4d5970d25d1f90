"""A learner on several nodes, each a torchrun that is restarted whenever it exits, as by a kubelet."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import psutil
from tests.support.forking import ForkedProgram
from tests.support.ports import free_port

from poise.learner.config import LearnerConfig
from poise_client import AsyncLearnerClient, RetryPolicy
from poise_client.errors import PoiseClientError

T = TypeVar("T")

DEADLINE_S = 600.0
"""Deadline of an answer over restarts, generous for busy machines."""
_LOOK_EVERY_S = 0.5
_FAILED_LOOKS = 6


class Nodes:
    """Two processes of one learner, on one or two nodes."""

    def __init__(self, config: LearnerConfig, folder: Path, *, num_nodes: int = 2) -> None:
        self._folder = folder
        self._num_nodes = num_nodes
        self._admin_ports = [free_port() for _ in range(num_nodes)]
        self._rendezvous = free_port()
        self._processes: list[ForkedProgram] = []
        self._keeping: list[asyncio.Task[None]] = []
        self.num_starts = [0] * num_nodes
        folder.mkdir(parents=True, exist_ok=True)
        settings = config.model_dump(mode="json", exclude={"admin"}) | {"grpc": {"port": 0}}
        (folder / "learner.yaml").write_text(json.dumps(settings))

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Nodes]:
        """Keep all nodes running meanwhile."""
        self._processes = [self._start(node) for node in range(self._num_nodes)]
        self._keeping = [asyncio.create_task(self._keep(node)) for node in range(self._num_nodes)]
        try:
            yield self
        finally:
            for task in self._keeping:
                task.cancel()
            await asyncio.gather(*self._keeping, return_exceptions=True)
            for process in self._processes:
                _kill_family(process)

    async def ask(self, question: Callable[[AsyncLearnerClient], Awaitable[T]]) -> T:
        """Return the answer, waiting over restarts."""
        last: Exception | None = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DEADLINE_S):
                while True:
                    try:
                        address = json.loads((self._folder / "address.json").read_text())["grpc"]
                        async with AsyncLearnerClient(address, retries=RetryPolicy(max_attempts=1)) as client:
                            return await question(client)
                    except (PoiseClientError, FileNotFoundError, ValueError) as error:
                        last = error
                        await asyncio.sleep(0.2)
        raise AssertionError(f"no answer: {last}\n{self.log()}")

    def pid(self, rank: int) -> int:
        """Return the id of a learner process."""
        return int((self._folder / f"pid-{rank}").read_text())

    def flag(self, name: str) -> Path:
        """Return the path of a file that `hanging.py` reads or writes."""
        return self._folder / name

    async def restarted(self, before: list[int]) -> None:
        """Wait until every node has restarted since `before`."""
        async with asyncio.timeout(DEADLINE_S):
            while any(now <= then for now, then in zip(self.num_starts, before, strict=True)):
                await asyncio.sleep(0.1)

    def log(self) -> str:
        """The last lines of every node."""
        logs = (self._folder / f"log-{node}" for node in range(self._num_nodes))
        return "\n".join(f"== {log.name}\n{log.read_text()[-40_000:]}" for log in logs)

    def _start(self, node: int) -> ForkedProgram:
        self.num_starts[node] += 1
        options = ["--run-path", "--start-method=fork", "--shutdown-timeout=20"]  # workers are forks, too
        options += [f"--nproc-per-node={2 // self._num_nodes}"]
        if self._num_nodes == 1:
            options += ["--standalone"]
        else:
            options += [f"--nnodes={self._num_nodes}", f"--node-rank={node}", "--rdzv-backend=static", "--rdzv-id=test"]
            options += [f"--rdzv-endpoint=127.0.0.1:{self._rendezvous}"]
        script = [str(Path(__file__).with_name("hanging.py")), str(self._folder)]
        settings = ["-c", str(self._folder / "learner.yaml"), "--set", f"admin.port={self._admin_ports[node]}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        if node == 0:
            environment["POISE_ADDRESS_FILE"] = str(self._folder / "address.json")
        log = self._folder / f"log-{node}"
        return ForkedProgram("torch.distributed.run", [*options, *script, *settings], environment, log)

    async def _keep(self, node: int) -> None:
        """Restart a node when it has exited; kill it first if it stops answering."""
        has_answered, num_failed = False, 0
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            lives = await asyncio.to_thread(self._lives, node)
            has_answered = has_answered or lives
            num_failed = 0 if lives or not has_answered else num_failed + 1
            process = self._processes[node]
            if num_failed >= _FAILED_LOOKS and process.poll() is None and self._is_stopped(process):
                _kill_family(process)
            if process.poll() is not None:
                has_answered, num_failed = False, 0
                self._processes[node] = self._start(node)

    def _lives(self, node: int) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._admin_ports[node]}/healthz", timeout=1) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def _is_stopped(self, process: ForkedProgram) -> bool:
        """Whether a process is stopped by a signal: a busy one may only answer late."""
        try:
            children = psutil.Process(process.pid).children(recursive=True)
            return any(child.status() == psutil.STATUS_STOPPED for child in children)
        except psutil.NoSuchProcess:
            return False


def _kill_family(process: ForkedProgram) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid)
        for member in (family, *family.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                member.send_signal(signal.SIGKILL)
    process.wait()
