"""The process that checks responses for a `VerifierPool`: requests on standard input, answers on standard output.

    → {"problem": {...}, "response": "...", "finish_reason": "stop"}
    ← {"ready": true}                             everything is imported: the time limit begins
    ← {"reward": 0.5, "reason": "..."} or {"error": "..."} or {"error": "...", "out_of_memory": true}

Run as a file, with one argument of JSON: the caller's `sys.path`, so that verifiers are found as the caller finds them,
its process id, and the memory limit in bytes. Checks in its main thread, where signals work. Dies with its caller.
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
    """Answer requests until standard input ends."""
    options = json.loads(sys.argv[1])
    _die_with(options["caller"])
    resource.setrlimit(resource.RLIMIT_DATA, (options["max_memory_bytes"], options["max_memory_bytes"]))
    sys.path[:] = options["path"]
    # Verifiers may print, and read: neither may touch the conversation.
    requests = os.fdopen(os.dup(0), "r", encoding="ascii")
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    for line in requests:
        _answer(json.loads(line), answers)


def _answer(request: dict[str, Any], answers: IO[str]) -> None:
    from poise.orchestrator.rewards.rules import bind
    from poise.orchestrator.tasks.problem import Problem

    try:
        reward_of = bind(Problem(**request["problem"]))
        _say({"ready": True}, answers)
        reward = reward_of(request["response"], request["finish_reason"])
        answer: dict[str, Any] = {"reward": float(reward), "reason": getattr(reward, "reason", "")[:2000]}
    except MemoryError:
        answer = {"error": "MemoryError", "out_of_memory": True}
    except BaseException as error:  # a verifier that calls sys.exit() fails like any other
        answer = {"error": f"{type(error).__name__}: {error}"[:2000]}
    _say(answer, answers)


def _say(answer: dict[str, Any], answers: IO[str]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def _die_with(caller: int) -> None:
    """End when the caller does, even in the middle of a check that hangs. Without Linux, only between checks."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != caller:
        os._exit(1)


if __name__ == "__main__":
    main()
