"""Start Python programs as forks of a process that has already imported the heavy packages.

Importing torch and transformers takes a service four seconds of CPU. A fork starts at once, and is otherwise a process
like any other: its own id, signals, session, environment and log.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path

import pytest

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "pytest",
        "poise.generation.engines.transformers.engine",
        "poise.generation.app",
        "poise.learner.app",
        "poise.value.app",
        "poise.runtime.cli.service_main",
        "torch.distributed.elastic.multiprocessing",
        "transformers.models.llama.modeling_llama",
    ]
)


class ForkedProgram:
    """A running program, with the part of `subprocess.Popen` that tests use."""

    def __init__(
        self,
        program: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        folder: Path = Path(),
    ) -> None:
        """Run a module or a .py file in `folder`, as `python` does, in its own session; append its output to `log`."""
        log.touch()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("GRPC_VERBOSITY", "NONE")  # which gRPC reads as soon as it is imported
            forkserver.ensure_running()
        paths = str(log.resolve()), str(folder.resolve())
        self._process = _CONTEXT.Process(target=_run, args=(program, list(arguments), dict(environment), *paths))
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """Return the exit status, or None while the program runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit and return its status."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(str(self._process), timeout or 0.0)
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        """Return what `poll` returns."""
        return self.poll()

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the program has exited."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End the program at once."""
        self._process.kill()


def _run(program: str, arguments: list[str], environment: dict[str, str], log: str, folder: str) -> None:
    os.setsid()
    os.chdir(folder)
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[1:] = arguments
    if program.endswith(".py"):
        sys.argv[0] = program
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
