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
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, SupportsFloat

from poise.orchestrator.tasks.problem import Problem

Rule = Callable[..., SupportsFloat]
"""Called as rule(response, answer) and, where it takes it, problem=Problem; returns a reward in [0, 1], or a truth."""

_TUPLE = "__tuple__"
_TRIMMED = " \t\r\n\f\v.\"'!"
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def final_part(response: str) -> str:
    """Return what a response says in the end: inside the last <answer>…</answer>, else after the last </think>."""
    if answers := _ANSWER.findall(response):
        return str(answers[-1]).strip()
    return response.rpartition("</think>")[2].strip()


def exact(response: str, answer: str) -> float:
    """1 where the final part is the answer, whatever its case, surrounding spaces, quotes, full stops and bangs."""
    return float(final_part(response).strip(_TRIMMED).casefold() == answer.strip(_TRIMMED).casefold())


def regex(response: str, answer: str) -> float:
    """1 where the pattern `answer` is found in the response."""
    return float(re.search(answer, response) is not None)


def numeric(response: str, answer: str) -> float:
    r"""1 where the final part comes to the answer, by math-verify.

    Of the response counts the last \boxed{…}, else what follows the last `####`, else the last expression; of the
    answer, what follows its last `####`, if any.

    Raises:
        ValueError: the answer is no mathematical expression.
    """
    import math_verify

    wanted = answer.rpartition("####")[2].strip().strip("$")
    gold = math_verify.parse(f"${wanted}$", parsing_timeout=None)
    if not gold:
        raise ValueError(f"the answer {answer[:80]!r} is no mathematical expression; use another verifier")
    said = final_part(response)
    if "\\boxed" in said:
        said = said[said.rindex("\\boxed") :]
    elif "####" in said:
        said = said.rpartition("####")[2].strip().partition("\n")[0]
    return float(math_verify.verify(gold, math_verify.parse(said, parsing_timeout=None), timeout_seconds=None))


def gym(response: str, problem: Problem) -> float:
    """Score the final part of the response as reasoning-gym scores it."""
    metadata = problem.metadata
    dataset = _gym_dataset(metadata["name"], json.dumps(metadata["options"]), metadata["size"])
    return float(dataset.score_answer(final_part(response), unpack(metadata["entry"])))


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
        inspect.signature(function).bind("response", "answer", **_problem_keyword(function, None))
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


def bind(problem: Problem) -> Callable[[str], float]:
    """Return what rewards a response to `problem`, with everything slow to import imported.

    Raises:
        ValueError: see `resolve`.
    """
    verifier = problem.verifier
    if verifier == "gym":
        metadata = problem.metadata
        _gym_dataset(metadata["name"], json.dumps(metadata["options"]), metadata["size"])
        return lambda response: checked(gym(response, problem))
    if verifier == "numeric":
        _warm_numeric()
    rule = _resolved(verifier)
    keyword = {} if verifier in _RULES else _problem_keyword(rule, problem)
    return lambda response: checked(rule(response, problem.answer, **keyword))


def checked(reward: SupportsFloat) -> float:
    """Return a reward as a float.

    Raises:
        ValueError: it is none, or outside [0, 1].
    """
    if isinstance(reward, str) or not hasattr(reward, "__float__"):
        raise ValueError(f"returned {reward!r:.80}; must return a number in [0, 1], or a bool")
    value = float(reward)
    if not (math.isfinite(value) and 0 <= value <= 1):
        raise ValueError(f"returned {value}; must return a number in [0, 1]")
    return value


_RULES: Mapping[str, Rule] = {"exact": exact, "numeric": numeric, "regex": regex}

_resolved = lru_cache(maxsize=64)(resolve)


def _problem_keyword(function: Callable[..., object], problem: Problem | None) -> dict[str, Problem | None]:
    parameters = inspect.signature(function).parameters.values()
    takes_it = any(p.name == "problem" or p.kind is p.VAR_KEYWORD for p in parameters)
    return {"problem": problem} if takes_it else {}


@lru_cache(maxsize=1)
def _warm_numeric() -> None:
    import logging

    # It warns that its own time limits are off: the worker's is the only one, and it ends what no signal can.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    numeric("\\boxed{1}", "\\frac{1}{1}")


@lru_cache(maxsize=32)
def _gym_dataset(name: str, options: str, size: int) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(name, **json.loads(options), seed=0, size=size)
