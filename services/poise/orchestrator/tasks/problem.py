"""One problem: a prompt, the answer to it, and who checks.

Owns what identifies a problem. Knows neither sources nor verifiers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from poise.orchestrator.tasks.answer import Answer

if TYPE_CHECKING:  # the verifiers' processes have no use for gRPC
    from poise_client.types import Message


class TaskError(ValueError):
    """Tasks that cannot be used. The message says where, what is wrong, and what would be right."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A prompt with a verifiable answer. Holds JSON values only: it travels to the verifier's process."""

    domain: str
    """Whose probe values its rollouts."""
    prompt: str | Sequence[Message]
    """Text as it stands, or a conversation to be rendered with the chat template."""
    answer: Answer
    """What the verifier compares with; for `regex` the pattern. A JSON number stays a number."""
    verifier: str
    """`exact`, `numeric`, `regex`, `gym`, or `package.module:function`."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else the verifier, or a reader, may want to know."""
    task: str = ""
    """Which task of the mixture it is of, by the name that evaluations tell it by."""
    file: str = ""
    """The data file it was read from; empty for one that was made."""
    line: int = 0
    """Its line there, from 1."""

    @property
    def origin(self) -> str:
        """Where it comes from, for people: file and line, or the task that made it."""
        return f"{self.file}:{self.line}" if self.file else f"task {self.task or self.domain}"

    @property
    def key(self) -> str:
        """Identity: SHA-256 of prompt and answer, hex. The same in every process and on every machine."""
        return _digest([self.prompt, str(self.answer)])

    @property
    def prompt_key(self) -> str:
        """Identity of the prompt alone, hex. What is held out goes by it: no prompt is on both sides."""
        return _digest(self.prompt)


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
