"""What a response earns: the rules that ship, and how to find yours.

Pure functions of a response and an answer, and `bind`, which finds the one of a problem. Heavy packages are imported
when a rule is bound, so that a time limit on checking does not count their import. Knows no processes.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import math
import re
import sys
import unicodedata
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, SupportsFloat

from poise.orchestrator.rewards.parts import final_part
from poise.orchestrator.rewards.score import Score
from poise.orchestrator.tasks.answer import Answer, answer_text, same_decimal
from poise.orchestrator.tasks.problem import Problem

Rule = Callable[..., SupportsFloat]
"""Called as rule(response, answer), with problem=Problem and finish_reason=text where it has such parameters; returns
a reward in [0, 1], or a truth."""

RULE_NAMES = ("exact", "numeric", "regex")

_TUPLE = "__tuple__"
_TRIMMED = " \t\r\n\f\v.\"'!"
_NAMES_TAG = re.compile(r"<\W*(?:think|answer)|(?:think|answer)\W*>", re.IGNORECASE)
_BOXED = re.compile(r"\$*\s*\\boxed\s*\{(?:\s*\\text\s*\{([^{}]*)\}\s*|([^{}]*))\}\s*\$*[.]?")
_GROUP_COMMA = re.compile(r"(?<=\d),(?=\d{3}(?:,\d{3})*+(?!\d))")
_DECIMAL = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")


def exact(response: str, answer: Answer) -> Score:
    r"""Return 1 where the final part is the answer, whatever its case and surrounding punctuation.

    A final part that is one `\boxed{…}` counts as what it contains. An answer that is a number is also matched by
    another decimal notation of that number, such as 5.0 for 5.
    """
    said = _trimmed(_unboxed(final_part(response)))
    wanted = _trimmed(answer_text(answer))
    is_same = said.casefold() == wanted.casefold() or (not isinstance(answer, str) and _same_decimal(said, wanted))
    return Score(float(is_same), f"the final answer is {said[:80]!r}, the right one {wanted[:80]!r}")


def regex(response: str, answer: Answer) -> Score:
    """Return 1 where the pattern `answer` is found in the final part of the response.

    A pattern that names the tags `think` or `answer` checks the format, and is searched for in the whole response. An
    answer that is a number is searched for as it is, not as a pattern.
    """
    pattern = answer if isinstance(answer, str) else re.escape(answer_text(answer))
    searched = response if _NAMES_TAG.search(pattern) else final_part(response)
    found = re.search(pattern, searched)
    if found is None:
        return Score(0.0, f"the pattern is not found in {searched[-80:]!r}")
    return Score(1.0, f"the pattern is found: {found[0][:80]!r}")


def numeric(response: str, answer: Answer) -> Score:
    r"""Return 1 where the final part comes to the value of the answer, see `docs/reference/verifiers.md`.

    Of the response counts the last \boxed{…}, else what follows the last `####`, else what follows the last "answer
    is", else the last value; of the answer, what follows its last `####`, if any.

    Raises:
        ValueError: the answer is no mathematical expression.
    """
    from poise.orchestrator.rewards.numeric import score_numeric

    return score_numeric(response, answer_text(answer))


def check_answer(verifier: str, answer: Answer) -> None:
    """Check that a verifier can use an answer; call this when data is loaded.

    Raises:
        ValueError: it cannot: what is wrong with the answer, and the remedy.
    """
    if verifier in RULE_NAMES and isinstance(answer, str) and not answer.strip():
        raise ValueError("is empty; write what a right response says")
    if verifier == "regex" and isinstance(answer, str):
        try:
            re.compile(answer)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"is no regular expression: {error}; verifier regex takes the answer as one") from None
    if verifier == "numeric" and isinstance(answer, str):
        from poise.orchestrator.rewards.numeric import check_numeric_answer

        check_numeric_answer(answer)


def gym(response: str, problem: Problem) -> Score:
    """Score the final part of the response as reasoning-gym scores it; a response without one earns nothing."""
    said = final_part(response)
    if not said:
        return Score(0.0, "the response has no final answer")
    metadata = problem.metadata
    dataset = _gym_dataset(metadata["name"], json.dumps(metadata["options"]), metadata["size"])
    return Score(dataset.score_answer(said, unpack(metadata["entry"])), f"reasoning-gym scores {said[:80]!r}")


def resolve(verifier: str) -> Rule:
    """Find a rule by name, or a callable by import path, `package.module:function`; the working folder is searched too.

    Raises:
        ValueError: there is none, or it cannot be called as a rule.
    """
    if rule := _RULES.get(verifier):
        return rule
    module_name, colon, function_name = verifier.partition(":")
    if not colon:
        near = difflib.get_close_matches(verifier, _RULES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "name a rule, or package.module:function"
        raise ValueError(f"{verifier!r}: unknown; {hint}")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a script that ends itself must not end the command in silence
        raise ValueError(f"{verifier!r}: module {module_name} cannot be imported: {error!r}") from error
    function = getattr(module, function_name, None)
    if function is None:
        near = difflib.get_close_matches(function_name, dir(module), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{verifier!r}: module {module_name} has no {function_name}{hint}")
    if not callable(function):
        raise ValueError(f"{verifier!r}: is a {type(function).__name__}; must be a function of (response, answer)")
    if inspect.iscoroutinefunction(function):
        raise ValueError(f"{verifier!r}: is asynchronous; must be a plain function of (response, answer)")
    try:
        inspect.signature(function).bind("response", "answer", **_keywords(function, problem=None, finish_reason=None))
    except TypeError as error:
        raise ValueError(f"{verifier!r}: cannot be called as function(response, answer): {error}") from error
    return function  # type: ignore[no-any-return]


def pack(value: Any) -> Any:
    """Return `value` with its tuples marked, so that JSON keeps them."""
    if isinstance(value, tuple):
        return {_TUPLE: [pack(item) for item in value]}
    if isinstance(value, list):
        return [pack(item) for item in value]
    if isinstance(value, dict):
        return {name: pack(item) for name, item in value.items()}
    return value


def unpack(value: Any) -> Any:
    """Undo `pack`."""
    if isinstance(value, list):
        return [unpack(item) for item in value]
    if isinstance(value, dict):
        if set(value) == {_TUPLE}:
            return tuple(unpack(item) for item in value[_TUPLE])
        return {name: unpack(item) for name, item in value.items()}
    return value


def bind(problem: Problem) -> Callable[..., float]:
    """Return what rewards a response to `problem`, with everything slow to import imported.

    Call it with the response and, where it is known, why the response ended: `stop`, `length` or `abort`.

    Raises:
        ValueError: see `resolve`.
    """
    verifier = problem.verifier
    if verifier == "gym":
        metadata = problem.metadata
        _gym_dataset(metadata["name"], json.dumps(metadata["options"]), metadata["size"])
        return lambda response, finish_reason=None: checked(gym(_with_thought(response, problem), problem))
    if verifier == "numeric":
        _warm_numeric()
    rule = _resolved(verifier)
    if verifier in RULE_NAMES:
        return lambda response, finish_reason=None: checked(rule(_with_thought(response, problem), problem.answer))
    return lambda response, finish_reason=None: checked(
        rule(response, problem.answer, **_keywords(rule, problem=problem, finish_reason=finish_reason))
    )


def checked(reward: SupportsFloat) -> float:
    """Return a reward as a float; a `Score` keeps its reason.

    Raises:
        ValueError: it is none, or outside [0, 1].
    """
    if isinstance(reward, str) or not hasattr(reward, "__float__"):
        raise ValueError(f"returned {reward!r:.80}; must return a number in [0, 1], or a bool")
    value = float(reward)
    if not (math.isfinite(value) and 0 <= value <= 1):
        raise ValueError(f"returned {value}; must return a number in [0, 1]")
    return reward if isinstance(reward, Score) else value


_RULES: Mapping[str, Rule] = {"exact": exact, "numeric": numeric, "regex": regex}

_resolved = lru_cache(maxsize=64)(resolve)


def _keywords(function: Callable[..., object], **offered: object) -> dict[str, object]:
    """Return those of the offered keywords that a function has parameters for."""
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return offered
    return {name: value for name, value in offered.items() if name in parameters}


def _with_thought(response: str, problem: Problem) -> str:
    """Return the response after the `<think>` that the prompt ends with, if it does."""
    prompt = problem.prompt
    opens = isinstance(prompt, str) and prompt.rstrip().lower().endswith("<think>")
    return f"<think>{response}" if opens else response


def _unboxed(said: str) -> str:
    """Return what a text that is one box contains; any other text as it is."""
    box = _BOXED.fullmatch(said)
    return said if box is None else box[1] or box[2] or ""


def _trimmed(text: str) -> str:
    """Return a text in Unicode's composed form without surrounding punctuation; `.5` keeps its point."""
    text = unicodedata.normalize("NFC", text).rstrip(_TRIMMED)
    bare = text.lstrip(_TRIMMED)
    start = len(text) - len(bare)
    has_point = bare[:1].isdigit() and text[max(0, start - 2) : start].endswith(".") and text[start - 2 : start] != ".."
    return f".{bare}" if has_point else bare


def _same_decimal(said: str, wanted: str) -> bool:
    """Whether two texts are decimal notations of one number."""
    decimals = [_GROUP_COMMA.sub("", text.replace("\u2212", "-")) for text in (said, wanted)]
    return all(map(_DECIMAL.fullmatch, decimals)) and same_decimal(*decimals)


@lru_cache(maxsize=1)
def _warm_numeric() -> None:
    numeric("\\boxed{1+x}", "x + 1")


@lru_cache(maxsize=32)
def _gym_dataset(name: str, options: str, size: int) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(name, **json.loads(options), seed=0, size=size)
