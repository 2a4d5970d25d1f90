"""A pool of verifier processes with time and memory limits, so that no verifier can stop the run.

A process checks one response at a time. If it fails, only that rollout gets reward 0, with a warning and a count.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, cast

from poise.orchestrator.rewards.config import VerifierConfig
from poise.orchestrator.tasks.problem import Problem
from poise_client.types import FinishReason

logger = logging.getLogger(__name__)

_READY_TIMEOUT_S = 120.0
"""Time to start Python and import the verifier's packages, on a busy machine."""

_WORKER = Path(__file__).with_name("worker.py")


@dataclass(frozen=True, slots=True)
class VerifierResult:
    """The reward of a response."""

    reward: float
    """In [0, 1]; 0 if the verifier failed."""
    error: str | None
    """Why the verifier failed; None if it did not."""
    seconds: float
    """Duration of the check, excluding the wait for a process."""
    reason: str = ""
    """The verifier's reason for the reward; built-in verifiers give one."""


class _Failure(Exception):
    """A failed check: a message, and a `cause` for counting."""

    def __init__(self, cause: str, text: str) -> None:
        super().__init__(text)
        self.cause = cause


class _OutOfMemory(_Failure):
    """The check exceeded the memory limit."""


class _ExitedEarly(_Failure):
    """The process exited before the check began."""


class VerifierPool:
    """Verifies responses in `config.num_workers` processes. Use as an async context manager, or `start` and `stop`."""

    def __init__(self, config: VerifierConfig) -> None:
        self._config = config
        self._workers = [_Worker(config) for _ in range(config.num_workers)]
        self._idle: asyncio.LifoQueue[_Worker] | None = None
        self.num_failures: Counter[str] = Counter()
        """Failed checks by cause: timeout, memory, crash, raised, too_long, stopped."""

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Open the pool. Processes start on first use."""
        self._idle = asyncio.LifoQueue()
        for worker in self._workers:
            self._idle.put_nowait(worker)

    async def stop(self) -> None:
        """Kill all processes. Running checks fail."""
        self._idle = None
        await asyncio.gather(*(worker.stop() for worker in self._workers))

    async def verify(
        self, problem: Problem, response: str, finish_reason: FinishReason | None = None
    ) -> VerifierResult:
        """Return the reward of `response`. If the verifier fails, log a warning and return reward 0.

        `finish_reason` is passed to verifiers that have such a parameter.

        Raises:
            RuntimeError: the pool is not started.
        """
        idle = self._idle
        if idle is None:
            raise RuntimeError("the verifier pool is not running; call start() first")
        if len(response) > self._config.max_response_chars:
            limit = self._config.max_response_chars
            text = f"the response has {len(response)} characters; verifier.max_response_chars is {limit}"
            return self._failed(problem, _Failure("too_long", text), 0.0)
        content = {"problem": asdict(problem), "response": response, "finish_reason": finish_reason}
        request = json.dumps(content).encode() + b"\n"
        worker = await idle.get()
        started = time.monotonic()
        try:
            if self._idle is not idle:
                raise _Failure("stopped", "the verifier pool was stopped")
            answer = await worker.check(request)
        except _Failure as failure:
            return self._failed(problem, failure, time.monotonic() - started)
        finally:
            idle.put_nowait(worker)
        return VerifierResult(float(answer["reward"]), None, time.monotonic() - started, answer["reason"])

    async def verify_all(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[VerifierResult]:
        """Return the reward of each response to the problem at the same index."""
        pairs = zip(problems, responses, strict=True)
        return list(await asyncio.gather(*(self.verify(problem, response) for problem, response in pairs)))

    def _failed(self, problem: Problem, failure: _Failure, seconds: float) -> VerifierResult:
        self.num_failures[failure.cause] += 1
        logger.warning("verifier %s failed on problem %s: %s; reward 0", problem.verifier, problem.key[:16], failure)
        return VerifierResult(0.0, str(failure), seconds)


class _Worker:
    """A verifier process, started on first use and replaced after a failure."""

    def __init__(self, config: VerifierConfig) -> None:
        self._config = config
        self._process: Process | None = None

    async def check(self, request: bytes) -> dict[str, Any]:
        """Return the reward and its reason. Any failure, including cancellation, kills the process.

        If a reused process exits early or runs out of memory, the check is repeated in a new one: an earlier check may
        have caused it.
        """
        try:
            used_before = self._process is not None
            try:
                answer = await self._request(request)
            except (_ExitedEarly, _OutOfMemory):
                if not used_before:
                    raise
                await self.stop()
                answer = await self._request(request)
        except BaseException:
            await self.stop()
            raise
        if "error" in answer:
            raise _Failure("raised", answer["error"])
        return answer

    async def stop(self) -> None:
        """Kill the process and its children, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await asyncio.shield(process.wait())

    async def _request(self, request: bytes) -> dict[str, Any]:
        if self._process is None:
            self._process = await _launch(self._config.max_memory_bytes)
        process = self._process
        with contextlib.suppress(ConnectionError):  # if the process has exited, reading raises
            stdin = cast(asyncio.StreamWriter, process.stdin)
            stdin.write(request)
            await stdin.drain()
        ready = await _read(process, _READY_TIMEOUT_S, "did not start", _ExitedEarly)
        answer = ready
        if "ready" in ready:
            answer = await _read(process, self._config.timeout_s, "did not finish", _Failure)
        if "out_of_memory" in answer:
            limit = self._config.max_memory_bytes
            raise _OutOfMemory("memory", f"exceeded verifier.max_memory_bytes = {limit} and was killed")
        return answer


async def _launch(max_memory_bytes: int) -> Process:
    options = json.dumps({"path": sys.path, "parent": os.getpid(), "max_memory_bytes": max_memory_bytes})
    try:
        return await asyncio.create_subprocess_exec(
            sys.executable, "-P", str(_WORKER), options, stdin=PIPE, stdout=PIPE, start_new_session=True
        )
    except OSError as error:
        raise _Failure("crash", f"starting a process failed: {error}") from error


async def _read(process: Process, timeout_s: float, timeout_text: str, exit_error: type[_Failure]) -> dict[str, Any]:
    try:
        async with asyncio.timeout(timeout_s):
            line = await cast(asyncio.StreamReader, process.stdout).readline()
    except TimeoutError:
        raise _Failure("timeout", f"{timeout_text} within {timeout_s:g} s and was killed") from None
    if not line.endswith(b"\n"):
        raise exit_error("crash", f"its process {_describe_exit(await process.wait())}")
    answer: dict[str, Any] = json.loads(line)
    return answer


def _describe_exit(status: int) -> str:
    if status >= 0:
        return f"exited with status {status}"
    return f"was killed by {signal.Signals(-status).name}"
