"""Renders chat templates in a separate process, with limits on time, memory and output.

A chat template is a program that comes with the model. It can loop, exhaust memory, or run a single operation for
hours. No other thread can interrupt such an operation, but a process can be limited and killed.
"""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from poise.generation.prompts.time_limit import LimitReached, TimeLimit
from poise_client.types import Message

MAX_MEMORY_BYTES = 1 << 29
"""Memory limit of the process: ten times what it needs without a template."""

_READY_S = 120.0
"""Time to start Python and import transformers on a busy machine."""
_MAX_CPU_S = 60
"""Limit on the CPU time of one conversation. It ends the process even if the service was killed."""
_POLL_S = 0.05
"""How often a waiting caller checks its limit."""


class TemplateRejected(Exception):
    """The template rejects the conversation or cannot be rendered; the text says why."""


class _ProcessExited(Exception):
    """The rendering process exited."""


class ChatTemplates:
    """One process, started on first use and replaced after it was killed. Renders one conversation at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._kill_process: weakref.finalize[Any, Any] | None = None

    def render(self, template: str, messages: Sequence[Message], variables: Mapping[str, Any], limit: TimeLimit) -> str:
        """Return the text of a conversation with its generation prompt.

        Raises:
            TemplateRejected: the template raised, or produced more text than `limit.max_chars`.
            LimitReached: it used too much time or memory, or `limit` was cancelled.
        """
        fields = {"template": template, "messages": list(messages), "variables": dict(variables)}
        request = json.dumps(fields | {"max_chars": limit.max_chars}, default=str).encode() + b"\n"
        with limit.paused():
            while not self._lock.acquire(timeout=_POLL_S):
                limit.check()
        try:
            response = self._request(request, limit)
        except BaseException:
            self._stop()
            raise
        finally:
            self._lock.release()
        if "error" in response:
            raise TemplateRejected(response["error"])
        text: str = response["text"]
        return text

    def _request(self, request: bytes, limit: TimeLimit) -> dict[str, Any]:
        was_running = self._process is not None
        try:
            try:
                response = self._send(request, limit)
            except _ProcessExited:
                if not was_running:
                    raise
                # The process may have exited before this request: try a new one.
                self._stop()
                response = self._send(request, limit)
        except _ProcessExited:
            raise LimitReached("the process that renders the chat template exited") from None
        if "out_of_memory" in response:
            raise LimitReached(f"the chat template takes more than {MAX_MEMORY_BYTES >> 20} MiB of memory")
        return response

    def _send(self, request: bytes, limit: TimeLimit) -> dict[str, Any]:
        process = self._process
        if process is None:
            with limit.paused():
                process = self._start()
                self._read(process, limit, _READY_S, "the process that renders the chat template does not start")
        assert process.stdin is not None  # noqa: S101 (a pipe)
        try:
            process.stdin.write(request)
            process.stdin.flush()
        except OSError:
            raise _ProcessExited from None
        return self._read(process, limit, limit.each_s, f"the chat template takes more than {limit.each_s:g} s")

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-P", "-m", "poise.generation.prompts.template_worker", str(MAX_MEMORY_BYTES)]
        process = subprocess.Popen(  # noqa: S603 (this Python and module)
            [*command, str(_MAX_CPU_S)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        self._process, self._kill_process = process, weakref.finalize(self, _kill, process)
        return process

    def _stop(self) -> None:
        self._process = None
        if self._kill_process is not None:
            self._kill_process()

    def _read(
        self, process: subprocess.Popen[bytes], limit: TimeLimit, timeout_s: float, timeout_text: str
    ) -> dict[str, Any]:
        """Return the next line that the process writes."""
        assert process.stdout is not None  # noqa: S101 (a pipe)
        end_s = time.monotonic() + timeout_s
        poll = select.poll()
        poll.register(process.stdout, select.POLLIN)
        parts: list[bytes] = []
        while not parts or not parts[-1].endswith(b"\n"):
            limit.check()
            if time.monotonic() > end_s:
                raise LimitReached(timeout_text)
            if poll.poll(_POLL_S * 1000):
                part = process.stdout.raw.read(1 << 20)  # type: ignore[attr-defined]  # of a BufferedReader
                if not part:
                    raise _ProcessExited
                parts.append(part)
        response: dict[str, Any] = json.loads(b"".join(parts))
        return response


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    with process, contextlib.suppress(OSError):
        assert process.stdin is not None  # noqa: S101 (a pipe)
        process.stdin.close()
