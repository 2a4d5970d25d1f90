"""The built-in verifiers, and loading of user-defined ones. A verifier returns the reward of a response.

`reward_function` loads the verifier of a problem and imports its heavy packages, so that the time limit of a check does
not include imports.
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

from poise.orchestrator.rewards.final_answer import final_answer
from poise.orchestrator.tasks.answer import Answer, answer_text, same_decimal
from poise.orchestrator.tasks.problem import Problem

Verifier = Callable[..., SupportsFloat]
"""Called as verifier(response, answer), with problem=Problem and finish_reason=text if it has such parameters. Returns
a reward in [0, 1], or a bool."""

BUILT_IN = ("exact", "numeric", "regex")
"""Names of the built-in verifiers that tasks may use. Other verifiers are import paths."""

_TUPLE = "__tuple__"
_TRIMMED = " \t\r\n\f\v.\"'!"
_NAMES_TAG = re.compile(r"<\W*(?:think|answer)|(?:think|answer)\W*>", re.IGNORECASE)
_BOXED = re.compile(r"\$*\s*\\boxed\s*\{(?:\s*\\text\s*\{([^{}]*)\}\s*|([^{}]*))\}\s*\$*[.]?")
_GROUP_COMMA = re.compile(r"(?<=\d),(?=\d{3}(?:,\d{3})*+(?!\d))")
_DECIMAL = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")


class Score(float):
    """A reward in [0, 1] with the reason for it."""

    reason: str

    def __new__(cls, reward: float, reason: str = "") -> Score:
        """Return `reward`, with its reason."""
        score = super().__new__(cls, reward)
        score.reason = reason
        return score


def exact(response: str, answer: Answer) -> Score:
    r"""Return 1 if the final answer equals the answer, ignoring case and surrounding punctuation.

    A `\boxed{…}` around the whole final answer is removed. A numeric answer also matches other decimal notations, such
    as 5.0 for 5.
    """
    found = _trimmed(_unboxed(final_answer(response)))
    expected = _trimmed(answer_text(answer))
    is_same = found.casefold() == expected.casefold() or (
        not isinstance(answer, str) and _same_decimal(found, expected)
    )
    return Score(float(is_same), f"the final answer is {found[:80]!r}, the correct answer is {expected[:80]!r}")


def regex(response: str, answer: Answer) -> Score:
    """Return 1 if the pattern `answer` is found in the final answer.

    A pattern that contains the tags `think` or `answer` checks the format and is searched for in the whole response. A
    numeric answer is searched for literally.
    """
    pattern = answer if isinstance(answer, str) else re.escape(answer_text(answer))
    searched = response if _NAMES_TAG.search(pattern) else final_answer(response)
    found = re.search(pattern, searched)
    if found is None:
        return Score(0.0, f"the pattern is not found in {searched[-80:]!r}")
    return Score(1.0, f"the pattern is found: {found[0][:80]!r}")


def numeric(response: str, answer: Answer) -> Score:
    r"""Return 1 if the final answer has the value of the answer; see docs/reference/verifiers.md.

    The value comes from the first of these that exists: the last \boxed{…}, the text after the last `####`, the text
    after the last "answer is", the last value of the final answer.

    Raises:
        ValueError: the answer is not a mathematical expression.
    """
    from poise.orchestrator.rewards.numeric import score_numeric

    return score_numeric(response, answer_text(answer))


def check_answer(verifier: str, answer: Answer) -> None:
    """Check that a verifier can use an answer.

    Raises:
        ValueError: it cannot. The message has the problem and the remedy.
    """
    if verifier in BUILT_IN and isinstance(answer, str) and not answer.strip():
        raise ValueError("is empty; write the correct answer")
    if verifier == "regex" and isinstance(answer, str):
        try:
            re.compile(answer)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(
                f"is not a valid regular expression: {error}; verifier regex uses the answer as a pattern"
            ) from None
    if verifier == "numeric" and isinstance(answer, str):
        from poise.orchestrator.rewards.numeric import check_numeric_answer

        check_numeric_answer(answer)


def gym(response: str, problem: Problem) -> Score:
    """Return reasoning-gym's score of the final answer; 0 if there is none."""
    found = final_answer(response)
    if not found:
        return Score(0.0, "the response has no final answer")
    metadata = problem.metadata
    dataset = _gym_dataset(metadata["name"], json.dumps(metadata["options"]), metadata["size"])
    return Score(dataset.score_answer(found, decode_tuples(metadata["entry"])), f"reasoning-gym scores {found[:80]!r}")


def load_verifier(verifier: str) -> Verifier:
    """Return a verifier by its name or import path, `package.module:function`. Also search the working folder.

    Raises:
        ValueError: it does not exist, or cannot be called as a verifier.
    """
    if built_in := _BUILT_IN.get(verifier):
        return built_in
    module_name, colon, function_name = verifier.partition(":")
    if not colon:
        near = difflib.get_close_matches(verifier, _BUILT_IN, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"use {', '.join(BUILT_IN)} or package.module:function"
        raise ValueError(f"{verifier!r}: unknown; {hint}")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a script that calls sys.exit() must not end the command silently
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


def encode_tuples(value: Any) -> Any:
    """Return `value` with tuples replaced by marked lists, so that JSON preserves them."""
    if isinstance(value, tuple):
        return {_TUPLE: [encode_tuples(item) for item in value]}
    if isinstance(value, list):
        return [encode_tuples(item) for item in value]
    if isinstance(value, dict):
        return {name: encode_tuples(item) for name, item in value.items()}
    return value


def decode_tuples(value: Any) -> Any:
    """Undo `encode_tuples`."""
    if isinstance(value, list):
        return [decode_tuples(item) for item in value]
    if isinstance(value, dict):
        if set(value) == {_TUPLE}:
            return tuple(decode_tuples(item) for item in value[_TUPLE])
        return {name: decode_tuples(item) for name, item in value.items()}
    return value


def reward_function(problem: Problem) -> Callable[..., float]:
    """Return the function that scores responses to `problem`, after its slow imports.

    It takes the response and, if known, its finish reason: `stop`, `length` or `abort`.

    Raises:
        ValueError: see `load_verifier`.
    """
    verifier = problem.verifier
    if verifier == "gym":
        metadata = problem.metadata
        _gym_dataset(metadata["name"], json.dumps(metadata["options"]), metadata["size"])
        return lambda response, finish_reason=None: valid_reward(gym(_with_thought(response, problem), problem))
    if verifier == "numeric":
        _warm_numeric()
    function = _loaded(verifier)
    if verifier in BUILT_IN:
        return lambda response, finish_reason=None: valid_reward(
            function(_with_thought(response, problem), problem.answer)
        )
    return lambda response, finish_reason=None: valid_reward(
        function(response, problem.answer, **_keywords(function, problem=problem, finish_reason=finish_reason))
    )


def valid_reward(reward: SupportsFloat) -> float:
    """Return a reward as a float; a `Score` keeps its reason.

    Raises:
        ValueError: it is not a number in [0, 1].
    """
    if isinstance(reward, str) or not hasattr(reward, "__float__"):
        raise ValueError(f"returned {reward!r:.80}; must return a number in [0, 1], or a bool")
    value = float(reward)
    if not (math.isfinite(value) and 0 <= value <= 1):
        raise ValueError(f"returned {value}; must return a number in [0, 1]")
    return reward if isinstance(reward, Score) else value


_BUILT_IN: Mapping[str, Verifier] = {"exact": exact, "numeric": numeric, "regex": regex}

_loaded = lru_cache(maxsize=64)(load_verifier)


def _keywords(function: Callable[..., object], **offered: object) -> dict[str, object]:
    """Return the offered keyword arguments for which a function has parameters."""
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return offered
    return {name: value for name, value in offered.items() if name in parameters}


def _with_thought(response: str, problem: Problem) -> str:
    """Return the response, preceded by `<think>` if the prompt ends with it."""
    prompt = problem.prompt
    opens = isinstance(prompt, str) and prompt.rstrip().lower().endswith("<think>")
    return f"<think>{response}" if opens else response


def _unboxed(text: str) -> str:
    """Return the content of a text that consists of one box; return other texts unchanged."""
    box = _BOXED.fullmatch(text)
    return text if box is None else box[1] or box[2] or ""


def _trimmed(text: str) -> str:
    """Return a text in NFC without surrounding punctuation; `.5` keeps its point."""
    text = unicodedata.normalize("NFC", text).rstrip(_TRIMMED)
    bare = text.lstrip(_TRIMMED)
    start = len(text) - len(bare)
    has_point = bare[:1].isdigit() and text[max(0, start - 2) : start].endswith(".") and text[start - 2 : start] != ".."
    return f".{bare}" if has_point else bare


def _same_decimal(one: str, other: str) -> bool:
    """Return whether two texts are decimal notations of the same number."""
    decimals = [_GROUP_COMMA.sub("", text.replace("\u2212", "-")) for text in (one, other)]
    return all(map(_DECIMAL.fullmatch, decimals)) and same_decimal(*decimals)


@lru_cache(maxsize=1)
def _warm_numeric() -> None:
    numeric("\\boxed{1+x}", "x + 1")


@lru_cache(maxsize=32)
def _gym_dataset(name: str, options: str, size: int) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(name, **json.loads(options), seed=0, size=size)
