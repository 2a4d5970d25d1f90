"""A verifier process of a `VerifierPool`. Reads requests on standard input and writes answers to standard output:

    → {"problem": {...}, "response": "...", "finish_reason": "stop"}
    ← {"ready": true}                             imports are done; the time limit starts
    ← {"reward": 0.5, "reason": "..."} or {"error": "..."} or {"error": "...", "out_of_memory": true}

The file is run with one JSON argument: the parent's `sys.path`, to find the same verifiers, its process id, and the
memory limit in bytes. Verifiers run in the main thread, so they may use signals. The process exits with its parent.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from typing import IO, Any

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Answer requests until standard input closes."""
    options = json.loads(sys.argv[1])
    _exit_with_parent(options["parent"])
    resource.setrlimit(resource.RLIMIT_DATA, (options["max_memory_bytes"], options["max_memory_bytes"]))
    sys.path[:] = options["path"]
    # Verifiers may print and read without disturbing the requests and answers.
    requests = os.fdopen(os.dup(0), "r", encoding="ascii")
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    for line in requests:
        _answer(json.loads(line), answers)


def _answer(request: dict[str, Any], answers: IO[str]) -> None:
    from poise.orchestrator.rewards.verifiers import reward_function
    from poise.orchestrator.tasks.problem import Problem

    try:
        reward_of = reward_function(Problem(**request["problem"]))
        _write({"ready": True}, answers)
        reward = reward_of(request["response"], request["finish_reason"])
        answer: dict[str, Any] = {"reward": float(reward), "reason": getattr(reward, "reason", "")[:2000]}
    except MemoryError:
        answer = {"error": "MemoryError", "out_of_memory": True}
    except BaseException as error:  # a verifier that calls sys.exit() fails like any other
        answer = {"error": f"{type(error).__name__}: {error}"[:2000]}
    _write(answer, answers)


def _write(answer: dict[str, Any], answers: IO[str]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def _exit_with_parent(parent: int) -> None:
    """Exit when the parent exits, on Linux even during a check that hangs; elsewhere only between checks."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    main()
