"""Problems from a file of JSON lines.

Owns reading and judging: what is wrong is told of up to 20 lines at once, by line and field, before anything is used.
"""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from poise.orchestrator.tasks.answer import Answer, LiteralFloat, kind_name, read_answer
from poise.orchestrator.tasks.config import JsonlTask, domain_problem
from poise.orchestrator.tasks.problem import Problem, TaskError
from poise.orchestrator.verifiers.rules import check_answer
from poise_client.types import Message

MAX_LINE_BYTES = 1024 * 1024
MAX_REPORTED = 20

_FIELDS = ("prompt", "answer", "domain", "metadata")
_ROLES = ("system", "user", "assistant")

logger = logging.getLogger(__name__)


class _Wrong(ValueError):
    """What is wrong with a line: `field: what is wrong; what would be right`."""


def read_problems(task: JsonlTask, path: Path, limit: int | None = None) -> list[Problem]:
    """Read the problems of a file, without those that repeat a prompt and its answer; `limit` stops early.

    Raises:
        TaskError: the file, or any line that was read, cannot be used.
    """
    problems: dict[str, Problem] = {}
    wrong: list[str] = []
    num_read = 0
    for number, line in _lines(path):
        try:
            problem = _problem(task, line)
        except _Wrong as error:
            wrong.append(f"{path}:{number}: {error}")
            if len(wrong) == MAX_REPORTED:
                wrong.append(f"{path}: more lines may be wrong; the first {MAX_REPORTED} are told")
                break
        else:
            problems.setdefault(problem.key, problem)
            num_read += 1
            if num_read == limit:
                break
    if wrong:
        raise TaskError("\n".join(wrong))
    if not problems:
        raise TaskError(f'{path}: holds no problem; put one on each line, as {{"prompt": "2+2=", "answer": "4"}}')
    if num_read > len(problems):
        logger.warning("%s: %d lines repeat a problem and are left out", path, num_read - len(problems))
    return list(problems.values())


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (number, line) for every line that is not blank."""
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise TaskError(
                        f"{path}:{number}: line is longer than {MAX_LINE_BYTES} bytes; put one JSON object on each line"
                    )
                if line.strip():
                    yield number, line
    except OSError as error:
        raise TaskError(f"{path}: cannot be read: {error.strerror}; name a file of JSON lines") from error


def _problem(task: JsonlTask, line: bytes) -> Problem:
    fields = _parse(line)
    wrong = [_unknown(name, fields) for name in fields if name not in _FIELDS]
    wrong += [f"{name}: missing; every line needs prompt and answer" for name in _FIELDS[:2] if name not in fields]
    if wrong:
        raise _Wrong("; ".join(wrong))
    domain = fields.get("domain", task.domain)
    if not isinstance(domain, str):
        raise _Wrong(f"domain: is {kind_name(domain)}; must be text")
    if problem := domain_problem(domain):
        raise _Wrong(f"domain: is {domain[:40]!r}; {problem}")
    metadata = fields.get("metadata", {})
    if not isinstance(metadata, dict):
        raise _Wrong(f"metadata: is {kind_name(metadata)}; must be an object")
    prompt = _prompt(fields["prompt"], task.system)
    return Problem(domain, prompt, _answer(fields["answer"], task.verifier), task.verifier, metadata)


def _parse(line: bytes) -> dict[str, Any]:
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _Wrong(f"line: byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None
    try:
        fields = json.loads(
            text, parse_float=LiteralFloat, parse_constant=_refuse_constant, object_pairs_hook=_no_repeats
        )
    except json.JSONDecodeError as error:
        cut_off = not line.endswith(b"\n") and error.pos >= len(text.rstrip()) - 1
        hint = "the file was cut off here" if cut_off or "Unterminated" in error.msg else "put one object on each line"
        raise _Wrong(f"line: is not JSON at column {error.colno} ({error.msg}); {hint}") from None
    except RecursionError:
        raise _Wrong("line: is nested too deep; put one flat object on each line") from None
    except _Wrong:
        raise
    except ValueError:
        raise _Wrong("line: holds a number of thousands of digits; write it as text") from None
    if not isinstance(fields, dict):
        raise _Wrong(f'line: is {kind_name(fields)}; must be an object, {{"prompt": ..., "answer": ...}}')
    if "\\u" in text:
        try:
            json.dumps(fields, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise _Wrong("line: holds half of a surrogate pair (\\ud800 to \\udfff); write the character") from None
    return fields


def _refuse_constant(name: str) -> None:
    raise _Wrong(f"line: {name} is not JSON; write a number, or text")


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in fields if names.count(name) > 1)
        raise _Wrong(f"{repeated}: given twice; keep one")
    return fields


def _unknown(name: str, fields: Mapping[str, Any]) -> str:
    free = [known for known in _FIELDS if known not in fields]
    near = difflib.get_close_matches(name, free, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(_FIELDS)}"
    return f"{name[:40]}: unknown; {hint}"


def _prompt(prompt: object, system: str | None) -> str | list[Message]:
    if isinstance(prompt, str):
        if not prompt:
            raise _Wrong("prompt: is empty; write what the model shall answer")
        if system is None:
            return prompt
        return [Message(role="system", content=system), Message(role="user", content=prompt)]
    if not isinstance(prompt, list):
        raise _Wrong(f'prompt: is {kind_name(prompt)}; must be text, or a list of {{"role", "content"}}')
    messages = [_message(index, message) for index, message in enumerate(prompt)]
    if not messages or messages[-1]["role"] != "user":
        raise _Wrong("prompt: must end with a message of the user, for the model to answer")
    if system is not None and messages[0]["role"] != "system":
        messages.insert(0, Message(role="system", content=system))
    return messages


def _message(index: int, message: object) -> Message:
    where = f"prompt[{index}]"
    if not isinstance(message, dict) or set(message) != {"role", "content"}:
        raise _Wrong(f"{where}: must be an object of role and content, and nothing else")
    if message["role"] not in _ROLES:
        raise _Wrong(f"{where}.role: is {message['role']!r:.40}; must be one of {', '.join(_ROLES)}")
    if not isinstance(message["content"], str):
        raise _Wrong(f"{where}.content: is {kind_name(message['content'])}; must be text")
    return Message(role=message["role"], content=message["content"])


def _answer(value: object, verifier: str) -> Answer:
    try:
        answer = read_answer(value)
        check_answer(verifier, answer)
    except ValueError as error:
        raise _Wrong(f"answer: {error}") from None
    return answer
