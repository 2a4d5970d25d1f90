"""Renders chat templates in a process of its own.

A chat template is a program that came with the model. It may loop, multiply text until memory is full, or compute for
hours in one operation that no other thread can interrupt. A process can be limited and killed.
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
"""Most memory of the process: ten times what it needs itself."""

_READY_S = 120.0
"""Starting Python and importing transformers, on a busy machine."""
_MAX_CPU_S = 60
"""After so much work on one conversation the process ends, even where the service that waited was killed."""
_POLL_S = 0.05
"""How soon a caller that is cancelled leaves."""


class TemplateRejected(Exception):
    """The template rejects the conversation, or cannot be rendered; the text says why."""


class _Ended(Exception):
    """The process is gone."""


class ChatTemplates:
    """One process, started when first needed and replaced when it was killed. Renders one conversation at a time."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize[Any, Any] | None = None

    def render(self, template: str, messages: Sequence[Message], variables: Mapping[str, Any], limit: TimeLimit) -> str:
        """Return the text of a conversation with its generation prompt.

        Raises:
            TemplateRejected: the template raised, or made more text than `limit.max_chars`.
            LimitReached: it took too long or too much memory, or `limit` was cancelled.
        """
        facts = {"template": template, "messages": list(messages), "variables": dict(variables)}
        request = json.dumps(facts | {"max_chars": limit.max_chars}, default=str).encode() + b"\n"
        with limit.paused():
            while not self._turn.acquire(timeout=_POLL_S):
                limit.check()
        try:
            answer = self._answer(request, limit)
        except BaseException:
            self._stop()
            raise
        finally:
            self._turn.release()
        if "error" in answer:
            raise TemplateRejected(answer["error"])
        text: str = answer["text"]
        return text

    def _answer(self, request: bytes, limit: TimeLimit) -> dict[str, Any]:
        was_used = self._process is not None
        try:
            answer = self._ask(request, limit)
        except _Ended:
            if not was_used:  # a process that ended between two requests is no fault of this one
                raise LimitReached("the process that renders it ended") from None
            self._stop()
            try:
                answer = self._ask(request, limit)
            except _Ended:
                raise LimitReached("the process that renders it ended") from None
        if "out_of_memory" in answer:
            raise LimitReached(f"it takes more than {MAX_MEMORY_BYTES >> 20} MiB of memory")
        return answer

    def _ask(self, request: bytes, limit: TimeLimit) -> dict[str, Any]:
        process = self._process
        if process is None:
            with limit.paused():
                process = self._start()
                self._read(process, limit, _READY_S, "the process that renders it does not start")
        assert process.stdin is not None  # noqa: S101 (a pipe)
        try:
            process.stdin.write(request)
            process.stdin.flush()
        except OSError:
            raise _Ended from None
        return self._read(process, limit, limit.each_s, f"it takes more than {limit.each_s:g} s")

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-P", "-m", "poise.generation.prompts.template_worker", str(MAX_MEMORY_BYTES)]
        process = subprocess.Popen(  # noqa: S603 (this Python, our module)
            [*command, str(_MAX_CPU_S)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        self._process, self._end = process, weakref.finalize(self, _kill, process)
        return process

    def _stop(self) -> None:
        self._process = None
        if self._end is not None:
            self._end()

    def _read(self, process: subprocess.Popen[bytes], limit: TimeLimit, at_most_s: float, late: str) -> dict[str, Any]:
        """Return the next line of the process."""
        assert process.stdout is not None  # noqa: S101 (a pipe)
        end_s = time.monotonic() + at_most_s
        poll = select.poll()
        poll.register(process.stdout, select.POLLIN)
        parts: list[bytes] = []
        while not parts or not parts[-1].endswith(b"\n"):
            limit.check()
            if time.monotonic() > end_s:
                raise LimitReached(late)
            if poll.poll(_POLL_S * 1000):
                part = process.stdout.raw.read(1 << 20)  # type: ignore[attr-defined]  # of a BufferedReader
                if not part:
                    raise _Ended
                parts.append(part)
        answer: dict[str, Any] = json.loads(b"".join(parts))
        return answer


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    with process, contextlib.suppress(OSError):
        assert process.stdin is not None  # noqa: S101 (a pipe)
        process.stdin.close()
