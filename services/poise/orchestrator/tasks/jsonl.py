"""Reads problems from a JSON Lines file. Every invalid row is reported by line and field."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from poise.orchestrator.rewards.verifiers import check_answer
from poise.orchestrator.tasks.answer import Answer, LiteralFloat, kind_name, read_answer
from poise.orchestrator.tasks.config import JsonlTask, domain_problem
from poise.orchestrator.tasks.formats import HEAD_BYTES, foreign_format
from poise.orchestrator.tasks.problem import Problem, TaskError
from poise.orchestrator.tasks.rows import BadRows, DataFile, OnBadRow
from poise_client.types import Message

MAX_LINE_BYTES = 1024 * 1024

_FIELDS = ("prompt", "answer", "domain", "metadata")
_ROLES = ("system", "user", "assistant")


class _InvalidRow(ValueError):
    """An invalid row. The message is `field: problem; remedy`."""


def read_file(task: JsonlTask, path: Path, on_bad_row: OnBadRow = "stop", limit: int | None = None) -> DataFile:
    """Read the rows of a file, at most `limit` valid ones.

    Raises:
        TaskError: the file is not readable, has another format or no valid row, or has invalid rows and `on_bad_row`
            is `stop`.
    """
    problems: dict[str, Problem] = {}
    bad = BadRows()
    repeats: list[int] = []
    digest = hashlib.sha256()
    num_rows = num_good = 0
    for number, line in _lines(path):
        digest.update(line)
        num_rows += 1
        try:
            problem = replace(_problem(task, line), file=str(path), line=number)
        except _InvalidRow as error:
            bad.add(number, str(error))
            continue
        if problems.setdefault(problem.key, problem) is not problem:
            repeats.append(number)
        num_good += 1
        if num_good == limit:
            break
    found = DataFile(path, on_bad_row, digest.hexdigest(), num_rows, list(problems.values()), bad, repeats)
    found.raise_if_bad()
    if not problems:
        shown = "".join(f"\n{path}:{line}: {what}" for line, what in bad.shown)
        raise TaskError(
            f'{path}: contains no problem; put one on each line, as {{"prompt": "2+2=", "answer": "4"}}{shown}'
        )
    return found


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (number, line) for every non-blank line; a line that is too long is cut."""
    if "\0" in str(path):
        raise TaskError(f"{str(path)!r}: contains the character NUL; name a JSON Lines file")
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise TaskError(f"{path}: is not a regular file; name a JSON Lines file, not a device or a pipe")
        with path.open("rb") as file:
            if format_ := foreign_format(file.read(HEAD_BYTES), str(path)):
                raise TaskError(f"{path}: {format_}")
            file.seek(0)
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                rest = line
                while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
                    rest = file.readline(MAX_LINE_BYTES + 1)
                if line.strip():
                    yield number, line
    except OSError as error:
        raise TaskError(f"{path}: is not readable: {error.strerror}; name a JSON Lines file") from error


def _problem(task: JsonlTask, line: bytes) -> Problem:
    fields = _parse(line)
    wrong = [_unknown(name, fields) for name in fields if name not in _FIELDS]
    wrong += [f"{name}: missing; every line needs prompt and answer" for name in _FIELDS[:2] if name not in fields]
    if wrong:
        raise _InvalidRow("; ".join(wrong))
    domain = fields.get("domain", task.domain)
    if not isinstance(domain, str):
        raise _InvalidRow(f"domain: is {kind_name(domain)}; must be text")
    if problem := domain_problem(domain):
        raise _InvalidRow(f"domain: is {domain[:40]!r}; {problem}")
    metadata = fields.get("metadata", {})
    if not isinstance(metadata, dict):
        raise _InvalidRow(f"metadata: is {kind_name(metadata)}; must be an object")
    prompt = _prompt(fields["prompt"], task.system)
    return Problem(domain, prompt, _answer(fields["answer"], task.verifier), task.verifier, metadata)


def _parse(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_LINE_BYTES:
        raise _InvalidRow(f"line: is longer than {MAX_LINE_BYTES} bytes; put one JSON object on each line")
    if b"\0" in line:
        raise _InvalidRow("line: contains NUL bytes: the file is damaged or incomplete; copy it again")
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _InvalidRow(f"line: byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None
    try:
        fields = json.loads(
            text, parse_float=LiteralFloat, parse_constant=_reject_constant, object_pairs_hook=_unique_keys
        )
    except json.JSONDecodeError as error:
        if "control character" in error.msg:
            raise _InvalidRow(
                f"line: contains an unescaped control character at column {error.colno}; escape it, as \\t"
            ) from None
        cut_off = not line.endswith(b"\n") and error.pos >= len(text.rstrip()) - 1
        hint = "the file was cut off here" if cut_off or "Unterminated" in error.msg else "put one object on each line"
        raise _InvalidRow(f"line: is not JSON at column {error.colno} ({error.msg}); {hint}") from None
    except RecursionError:
        raise _InvalidRow("line: is nested too deeply; put one flat object on each line") from None
    except _InvalidRow:
        raise
    except ValueError:
        raise _InvalidRow("line: contains a number with thousands of digits; write it as text") from None
    if not isinstance(fields, dict):
        raise _InvalidRow(f'line: is {kind_name(fields)}; must be an object, {{"prompt": ..., "answer": ...}}')
    if "\\u" in text:
        _check_characters(json.dumps(fields, ensure_ascii=False))
    return fields


def _check_characters(text: str) -> None:
    """Reject characters that no tokenizer accepts."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _InvalidRow("line: contains half of a surrogate pair (\\ud800 to \\udfff); write the character") from None
    if "\\u0000" in text.replace("\\\\", ""):  # the character itself, not an escaped backslash before u0000
        raise _InvalidRow("line: contains the character NUL (\\u0000); remove it")


def _reject_constant(name: str) -> None:
    raise _InvalidRow(f"line: {name} is not JSON; write a number, or text")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in fields if names.count(name) > 1)
        raise _InvalidRow(f"{repeated}: appears twice; keep one")
    return fields


def _unknown(name: str, fields: Mapping[str, Any]) -> str:
    free = [known for known in _FIELDS if known not in fields]
    near = difflib.get_close_matches(name, free, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(_FIELDS)}"
    return f"{name[:40]}: unknown; {hint}"


def _prompt(prompt: object, system: str | None) -> str | list[Message]:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise _InvalidRow("prompt: is empty; write the question")
        if system is None:
            return prompt
        return [Message(role="system", content=system), Message(role="user", content=prompt)]
    if not isinstance(prompt, list):
        raise _InvalidRow(f'prompt: is {kind_name(prompt)}; must be text, or a list of {{"role", "content"}}')
    messages = [_message(index, message) for index, message in enumerate(prompt)]
    if not messages or messages[-1]["role"] != "user":
        raise _InvalidRow("prompt: the last message must have the role user")
    if not messages[-1]["content"].strip():
        raise _InvalidRow(f"prompt[{len(messages) - 1}].content: is empty; write the question")
    if system is not None and messages[0]["role"] != "system":
        messages.insert(0, Message(role="system", content=system))
    return messages


def _message(index: int, message: object) -> Message:
    where = f"prompt[{index}]"
    if not isinstance(message, dict) or set(message) != {"role", "content"}:
        raise _InvalidRow(f"{where}: must be an object with exactly role and content")
    if message["role"] not in _ROLES:
        raise _InvalidRow(f"{where}.role: is {message['role']!r:.40}; must be one of {', '.join(_ROLES)}")
    if not isinstance(message["content"], str):
        raise _InvalidRow(f"{where}.content: is {kind_name(message['content'])}; must be text")
    return Message(role=message["role"], content=message["content"])


def _answer(value: object, verifier: str) -> Answer:
    try:
        answer = read_answer(value)
        check_answer(verifier, answer)
    except ValueError as error:
        raise _InvalidRow(f"answer: {error}") from None
    return answer
