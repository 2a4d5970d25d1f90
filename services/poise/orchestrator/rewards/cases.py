"""Test cases for verifiers: responses with expected rewards, single or from a JSON Lines file."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from poise.orchestrator.rewards.config import VerifierConfig
from poise.orchestrator.rewards.pool import VerifierPool
from poise.orchestrator.rewards.verifiers import BUILT_IN, check_answer, load_verifier
from poise.orchestrator.tasks.answer import Answer, LiteralFloat, kind_name, read_answer
from poise.orchestrator.tasks.problem import Problem
from poise_client.types import FinishReason

_FIELDS = ("verifier", "answer", "response", "reward", "finish_reason")
_REWARD_ROUNDING = 1e-6
_MAX_REPORTED = 5


class CaseError(ValueError):
    """Cases are invalid. The message has a line for each: place, problem and remedy."""


@dataclass(frozen=True, slots=True)
class Case:
    """A response to verify."""

    verifier: str
    answer: Answer
    response: str
    finish_reason: FinishReason | None = None
    expected: float | None = None
    """The expected reward; None accepts any."""

    def __post_init__(self) -> None:
        """Check the case without running a verifier.

        Raises:
            ValueError: the verifier is unknown, or cannot use the answer.
        """
        if ":" not in self.verifier and self.verifier not in BUILT_IN:
            try:
                load_verifier(self.verifier)
            except ValueError as error:
                raise ValueError(f"verifier: {error}") from None
        try:
            check_answer(self.verifier, self.answer)
        except ValueError as error:
            raise ValueError(f"answer: {error}") from None


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a case."""

    reward: float
    reason: str
    failed: bool
    """Whether the verifier failed; the reward is then 0."""
    as_expected: bool


def run_cases(cases: Sequence[Case], config: VerifierConfig) -> list[Outcome]:
    """Verify all cases in verifier processes with the limits of `config`."""

    async def verify_all() -> list[Outcome]:
        async with VerifierPool(config) as pool:
            return list(await asyncio.gather(*(_run(case, pool) for case in cases)))

    return asyncio.run(verify_all())


async def _run(case: Case, pool: VerifierPool) -> Outcome:
    problem = Problem("default", "", case.answer, case.verifier)
    verdict = await pool.verify(problem, case.response, case.finish_reason)
    as_expected = case.expected is None or abs(verdict.reward - case.expected) <= _REWARD_ROUNDING
    return Outcome(verdict.reward, verdict.error or verdict.reason, verdict.error is not None, as_expected)


def read_cases(path: Path) -> dict[int, Case]:
    """Read a JSON Lines file; return the cases by line number.

    Raises:
        CaseError: the file is not readable, or lines are invalid.
    """
    cases: dict[int, Case] = {}
    wrong: list[str] = []
    for number, line in _lines(path):
        try:
            cases[number] = _case(line)
        except ValueError as error:
            wrong.append(f"{path}:{number}: {error}")
    if len(wrong) > _MAX_REPORTED:
        wrong = [*wrong[:_MAX_REPORTED], f"{path}: {len(wrong) - _MAX_REPORTED} more lines are invalid"]
    if wrong:
        raise CaseError("\n".join(wrong))
    if not cases:
        raise CaseError(
            f'{path}: contains no case. Put one on each line: {{"verifier": ..., "answer": ..., "response": ...}}'
        )
    return cases


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise CaseError(f"{path}: is not readable: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CaseError(f"{path}: is not UTF-8 at byte {error.start + 1}; use a JSON Lines file") from error
    return ((number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())


def _case(line: str) -> Case:
    try:
        fields = json.loads(line, parse_float=LiteralFloat)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error}); put one object on each line") from None
    if not isinstance(fields, dict):
        raise ValueError(f"is {kind_name(fields)}; must be an object")
    for name in fields:
        if name not in _FIELDS:
            raise ValueError(f"{name[:40]}: unknown; known: {', '.join(_FIELDS)}")
    for name in _FIELDS[:3]:
        if name not in fields:
            raise ValueError(f"{name}: missing")
    for name in ("verifier", "response"):
        if not isinstance(fields[name], str):
            raise ValueError(f"{name}: is {kind_name(fields[name])}; must be text")
    try:
        answer = read_answer(fields["answer"])
    except ValueError as error:
        raise ValueError(f"answer: {error}") from None
    return Case(
        fields["verifier"], answer, fields["response"], _finish_reason(fields.get("finish_reason")), _reward(fields)
    )


def _finish_reason(value: object) -> FinishReason | None:
    if value is not None and value not in get_args(FinishReason):
        raise ValueError(f"finish_reason: is {value!r:.40}; must be one of {', '.join(get_args(FinishReason))}")
    return cast(FinishReason | None, value)


def _reward(fields: dict[str, Any]) -> float | None:
    reward = fields.get("reward")
    if reward is None:
        return None
    if isinstance(reward, bool) or not isinstance(reward, int | float) or not 0 <= reward <= 1:
        raise ValueError(f"reward: is {reward!r:.40}; must be a number from 0 to 1")
    return float(reward)
