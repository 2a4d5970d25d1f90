"""Checking responses in processes of their own, so that no verifier can stop the run.

Owns the processes, their limits of time and memory, and what a failure costs: the reward of its own rollout, with a
warning and a count. Knows no rules. A process checks one response at a time, so whatever ends it is that response's
doing.
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
"""Starting Python and importing what a rule needs, on a busy machine."""

_WORKER = Path(__file__).with_name("worker.py")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a response earned."""

    reward: float
    """In [0, 1]; 0 where it could not be checked."""
    error: str | None
    """Why it could not be checked; None where it was."""
    seconds: float
    """Spent checking, without waiting for a process."""
    reason: str = ""
    """Why it earned that, where the verifier says so: those that ship do."""


class _Failure(Exception):
    """A check that came to nothing: `cause` for counting, the text for people."""

    def __init__(self, cause: str, text: str) -> None:
        super().__init__(text)
        self.cause = cause


class _OutOfMemory(_Failure):
    """The check needed more memory than a process may have."""


class _EndedEarly(_Failure):
    """The process ended before the check began."""


class VerifierPool:
    """Checks responses in `config.num_workers` processes. Use as an async context manager, or `start` and `stop`."""

    def __init__(self, config: VerifierConfig) -> None:
        self._config = config
        self._workers = [_Worker(config) for _ in range(config.num_workers)]
        self._idle: asyncio.LifoQueue[_Worker] | None = None
        self.num_failures: Counter[str] = Counter()
        """Checks that came to nothing, by cause: timeout, memory, crash, raised, too_long."""

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Get ready. Processes start when they are first needed."""
        self._idle = asyncio.LifoQueue()
        for worker in self._workers:
            self._idle.put_nowait(worker)

    async def stop(self) -> None:
        """End all processes; checks under way fail."""
        self._idle = None
        await asyncio.gather(*(worker.stop() for worker in self._workers))

    async def verify(self, problem: Problem, response: str, finish_reason: FinishReason | None = None) -> Verdict:
        """Return what `response` earned. A verifier that fails in any way earns it 0 and a warning, never an exception.

        `finish_reason` is why the response ended, for verifiers that have such a parameter.

        Raises:
            RuntimeError: the pool is not started.
        """
        idle = self._idle
        if idle is None:
            raise RuntimeError("the verifier pool is not started, or was stopped")
        if len(response) > self._config.max_response_chars:
            limit = self._config.max_response_chars
            text = f"the response has {len(response)} characters; verifier.max_response_chars is {limit}"
            return self._failed(problem, _Failure("too_long", text), 0.0)
        asked = {"problem": asdict(problem), "response": response, "finish_reason": finish_reason}
        request = json.dumps(asked).encode() + b"\n"
        worker = await idle.get()
        started = time.monotonic()
        try:
            if self._idle is not idle:
                raise _Failure("stopped", "the verifiers were stopped")
            answer = await worker.check(request)
        except _Failure as failure:
            return self._failed(problem, failure, time.monotonic() - started)
        finally:
            idle.put_nowait(worker)
        return Verdict(float(answer["reward"]), None, time.monotonic() - started, answer["reason"])

    async def verify_all(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Verdict]:
        """Return what each response to the problem beside it earned."""
        pairs = zip(problems, responses, strict=True)
        return list(await asyncio.gather(*(self.verify(problem, response) for problem, response in pairs)))

    def _failed(self, problem: Problem, failure: _Failure, seconds: float) -> Verdict:
        self.num_failures[failure.cause] += 1
        logger.warning("verifier %s failed on problem %s: %s; reward 0", problem.verifier, problem.key[:16], failure)
        return Verdict(0.0, str(failure), seconds)


class _Worker:
    """One process, started when needed and replaced when it fails."""

    def __init__(self, config: VerifierConfig) -> None:
        self._config = config
        self._process: Process | None = None

    async def check(self, request: bytes) -> dict[str, Any]:
        """Return the reward and its reason. Any failure, cancellation included, ends the process.

        A process that another check left without memory, or that is gone, is replaced first: that is no fault of
        this response.
        """
        try:
            used_before = self._process is not None
            try:
                answer = await self._ask(request)
            except (_EndedEarly, _OutOfMemory):
                if not used_before:
                    raise
                await self.stop()
                answer = await self._ask(request)
        except BaseException:
            await self.stop()
            raise
        if "error" in answer:
            raise _Failure("raised", answer["error"])
        return answer

    async def stop(self) -> None:
        """End the process, if there is one, and whatever it started."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await asyncio.shield(process.wait())

    async def _ask(self, request: bytes) -> dict[str, Any]:
        if self._process is None:
            self._process = await _launch(self._config.max_memory_bytes)
        process = self._process
        with contextlib.suppress(ConnectionError):  # a process that is gone says so when it is read from
            stdin = cast(asyncio.StreamWriter, process.stdin)
            stdin.write(request)
            await stdin.drain()
        ready = await _read(process, _READY_TIMEOUT_S, "was not ready to check", _EndedEarly)
        answer = ready
        if "ready" in ready:
            answer = await _read(process, self._config.timeout_s, "did not finish", _Failure)
        if "out_of_memory" in answer:
            limit = self._config.max_memory_bytes
            raise _OutOfMemory("memory", f"needed more memory than verifier.max_memory_bytes = {limit}, and was ended")
        return answer


async def _launch(max_memory_bytes: int) -> Process:
    options = json.dumps({"path": sys.path, "caller": os.getpid(), "max_memory_bytes": max_memory_bytes})
    try:
        return await asyncio.create_subprocess_exec(
            sys.executable, "-P", str(_WORKER), options, stdin=PIPE, stdout=PIPE, start_new_session=True
        )
    except OSError as error:
        raise _Failure("crash", f"no process can be started: {error}") from error


async def _read(process: Process, timeout_s: float, late: str, gone: type[_Failure]) -> dict[str, Any]:
    try:
        async with asyncio.timeout(timeout_s):
            line = await cast(asyncio.StreamReader, process.stdout).readline()
    except TimeoutError:
        raise _Failure("timeout", f"{late} within {timeout_s:g} s, and was killed") from None
    if not line.endswith(b"\n"):
        raise gone("crash", f"its process {_ending(await process.wait())}")
    answer: dict[str, Any] = json.loads(line)
    return answer


def _ending(status: int) -> str:
    if status >= 0:
        return f"exited with status {status}"
    return f"was ended by {signal.Signals(-status).name}"
