"""A problem: a prompt with its answer and the verifier of its responses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from poise.orchestrator.tasks.answer import Answer

if TYPE_CHECKING:  # verifier processes do not import gRPC
    from poise_client.types import Message


class TaskError(ValueError):
    """Tasks are invalid. The message has the place, the problem and the remedy."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A prompt with a verifiable answer. Contains only JSON values, because it is sent to verifier processes."""

    domain: str
    """The domain, which selects the probe."""
    prompt: str | Sequence[Message]
    """Text, which is used unchanged, or a conversation, which is rendered with the chat template."""
    answer: Answer
    """The reference answer; for `regex` the pattern."""
    verifier: str
    """`exact`, `numeric`, `regex`, `gym`, or `package.module:function`."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Other data for the verifier or for people."""
    task: str = ""
    """Name of its task, as in evaluations."""
    file: str = ""
    """The data file that it was read from; empty for generated problems."""
    line: int = 0
    """Its line in the file, from 1."""

    @property
    def origin(self) -> str:
        """File and line, or the task that generated it; for messages."""
        return f"{self.file}:{self.line}" if self.file else f"task {self.task or self.domain}"

    @property
    def prompt_text(self) -> str:
        """The prompt as text; a conversation has one line for each message."""
        if isinstance(self.prompt, str):
            return self.prompt
        return "\n".join(f"{message['role']}: {message['content']}" for message in self.prompt)

    @property
    def key(self) -> str:
        """SHA-256 of prompt and answer, hexadecimal."""
        return _digest([self.prompt, str(self.answer)])

    @property
    def prompt_key(self) -> str:
        """SHA-256 of the prompt, hexadecimal. The held-out split uses it, so no prompt is in both parts."""
        return _digest(self.prompt)


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
