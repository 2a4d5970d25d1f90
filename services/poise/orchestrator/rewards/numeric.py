"""The `numeric` rule: does a response give the value of the answer?

Reads numbers and groups of numbers itself; formulas with variables, matrices and equations go to math-verify. Time is
bounded by the process that runs the rule.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from fractions import Fraction

from poise.orchestrator.rewards.numbers.arithmetic import CONTEXT, inexact
from poise.orchestrator.rewards.numbers.extraction import ANCHOR, MAX_CHARS, answer_values, response_values
from poise.orchestrator.rewards.numbers.plain_text import SUPERSCRIPT
from poise.orchestrator.rewards.numbers.quantity import Group, Number, Value, same
from poise.orchestrator.rewards.parts import after_hashes, final_part, last_box
from poise.orchestrator.rewards.score import Score

_MAX_BOX = 1000
"""Longest content of a box that is read: no answer is longer, and what math-verify needs grows faster than length."""
_MAX_BARE_FORMULA = 300
"""Longest response that is tried as one formula, though no delimiters mark it."""
_SHOWN_ITEMS = 8
_SHOWN_EXACTLY = 10**18
_FUNCTIONS = re.compile(r"(?<![\\A-Za-z])(sin|cos|tan|cot|sec|csc|sinh|cosh|tanh|ln|log|exp|pi)(?![A-Za-z])")
_ROOT = re.compile(r"(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)")
_EXPONENT = re.compile(r"(?:\*\*|\^)\s*(-?\w{2,}|-\w|\([^()]*\))")
_UNICODE_SIGNS = str.maketrans(
    dict.fromkeys("−–﹣－", "-")
    | dict.fromkeys("×✕", r"\times ")
    | dict.fromkeys("·⋅∙", r"\cdot ")
    | {"÷": "/", "⁄": "/", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "±": r"\pm ", "θ": r"\theta "}
)
_UNICODE_ROOT = re.compile(r"√\s*\(([^()]*)\)|√\s*(\w+)")
_WORDS = re.compile(r"[A-Za-z]{3,}")


def score_numeric(response: str, answer: str) -> Score:
    """Return 1 where the final part of `response` gives the value of `answer`.

    Raises:
        ValueError: `answer` is no mathematical expression.
    """
    wanted = _wanted(answer)
    said = final_part(response)
    box = last_box(said)
    given = box if box is not None else said if (marked := after_hashes(said)) is None else marked
    if not given.strip():
        return Score(0.0, "the response has no final answer")
    if box is not None and len(box) > _MAX_BOX:
        return Score(0.0, f"the box has more than {_MAX_BOX} characters")
    golds = answer_values(wanted)
    if golds:
        found = response_values(given, boxed=box is not None, lists=isinstance(golds[0], Group))
        if found:
            is_right = any(same(gold, value) for gold in golds for value in found)
            return Score(float(is_right), f"the response gives {_text(found[0])}, the answer is {_text(golds[0])}")
        if "\\" not in given:
            return Score(0.0, f"the response gives no number, the answer is {_text(golds[0])}")
    return _score_formula(given, wanted, is_boxed=box is not None)


def _wanted(answer: str) -> str:
    """Return the value in an answer: what follows its last `####`, if any.

    Raises:
        ValueError: there is none.
    """
    wanted = answer.rpartition("####")[2].strip()
    box = last_box(wanted)
    wanted = wanted if box is None else box.strip()
    if not wanted.strip("$ "):
        raise ValueError(_no_expression(answer))
    return wanted


def check_numeric_answer(answer: str) -> None:
    """Raise `ValueError` for an answer that has no value, such as a word."""
    wanted = _wanted(answer)
    if "\\" not in wanted and _WORDS.search(_FUNCTIONS.sub("", _ROOT.sub("", wanted))) and not answer_values(wanted):
        raise ValueError(_no_expression(answer))


def _no_expression(answer: str) -> str:
    return f"the answer {answer[:80]!r} is no mathematical expression; use another verifier, such as exact"


def _score_formula(given: str, wanted: str, *, is_boxed: bool) -> Score:
    import math_verify

    # It warns that its own time limits are off: the process has one that no signal handler can miss.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    wanted, given = _ascii(wanted), _ascii(given[-MAX_CHARS:])
    gold = math_verify.parse(f"${_latex(wanted.strip('$ '))}$", parsing_timeout=None)
    if not gold:
        raise ValueError(_no_expression(wanted))
    tries = [f"\\boxed{{{_latex(given)}}}"] if is_boxed else [given]
    if not is_boxed and "$" not in given:
        anchors = list(ANCHOR.finditer(given))
        bare = [given, *([given[anchors[-1].end() :].strip().partition("\n")[0]] if anchors else [])]
        short = (each.strip(" .*") for each in bare if len(each) <= _MAX_BARE_FORMULA and "\n" not in each)
        tries += [f"${_latex(each)}$" for each in short]
    for text in tries:
        found = math_verify.parse(text, parsing_timeout=None)
        if found and math_verify.verify(gold, found, timeout_seconds=None):
            return Score(1.0, f"math-verify finds {text[:80]!r} equal to {wanted[:80]!r}")
    return Score(0.0, f"math-verify finds nothing equal to {wanted[:80]!r} in the final answer")


def _ascii(formula: str) -> str:
    """Return a formula with LaTeX for Unicode's signs, superscripts and full-width characters."""
    if formula.isascii():
        return formula
    formula = SUPERSCRIPT.sub(lambda match: f"^{{{unicodedata.normalize('NFKC', match[0])}}}", formula)
    formula = _UNICODE_ROOT.sub(lambda match: f"\\sqrt{{{match[1] or match[2]}}}", formula.translate(_UNICODE_SIGNS))
    return unicodedata.normalize("NFKC", formula).replace("\u2212", "-")


def _latex(formula: str) -> str:
    """Return a formula in Python's notation as LaTeX; LaTeX stays as it is."""
    formula = _ROOT.sub(r"\\sqrt{\1}", formula)
    formula = _EXPONENT.sub(lambda match: f"^{{{match[1]}}}", formula).replace("**", "^")
    return _FUNCTIONS.sub(r"\\\1 ", formula)


def _text(value: Value) -> str:
    """Return a value for people."""
    if isinstance(value, Number):
        unit = value.unit
        if unit is None:
            return _digits(value.value)
        quantity = " ".join(name if power == 1 else f"{name}^{power}" for name, power in unit.dimension)
        return f"{_digits(value.value)} ({quantity or 'with a unit'})"
    brackets = value.kind if len(value.kind) == 2 else "{}"
    return brackets[0] + ", ".join(map(_text, value.items[:_SHOWN_ITEMS])) + brackets[1]


def _digits(value: object) -> str:
    if isinstance(value, Fraction) and max(abs(value.numerator), value.denominator) < _SHOWN_EXACTLY:
        return str(value)
    return str(CONTEXT.nstr(inexact(value), 12))
