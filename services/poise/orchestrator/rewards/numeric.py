"""The verifier `numeric`: compares the value of a final answer with the answer.

`numbers` reads numbers and groups of numbers. math-verify reads formulas with variables, matrices and equations. The
verifier process enforces the time limit.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from fractions import Fraction

from poise.orchestrator.rewards.final_answer import after_hashes, final_answer, last_box
from poise.orchestrator.rewards.numbers.arithmetic import CONTEXT, inexact
from poise.orchestrator.rewards.numbers.extraction import ANCHOR, MAX_CHARS, answer_values, response_values
from poise.orchestrator.rewards.numbers.plain_text import SUPERSCRIPT
from poise.orchestrator.rewards.numbers.quantity import Group, Number, Value, same
from poise.orchestrator.rewards.verifiers import Score

_MAX_BOX = 1000
"""Maximum length of a box to read, because math-verify's time grows faster than the length."""
_MAX_BARE_FORMULA = 300
"""Maximum length of a final answer to try as a formula without delimiters."""
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
    """Return 1 if the final answer of `response` has the value of `answer`.

    Raises:
        ValueError: `answer` is not a mathematical expression.
    """
    expected = _expression(answer)
    found_answer = final_answer(response)
    box = last_box(found_answer)
    candidate = box if box is not None else found_answer if (marked := after_hashes(found_answer)) is None else marked
    if not candidate.strip():
        return Score(0.0, "the response has no final answer")
    if box is not None and len(box) > _MAX_BOX:
        return Score(0.0, f"the box has more than {_MAX_BOX} characters")
    golds = answer_values(expected)
    if golds:
        found = response_values(candidate, boxed=box is not None, lists=isinstance(golds[0], Group))
        if found:
            is_right = any(same(gold, value) for gold in golds for value in found)
            return Score(float(is_right), f"the response gives {_text(found[0])}, the answer is {_text(golds[0])}")
        if "\\" not in candidate:
            return Score(0.0, f"the response gives no number, the answer is {_text(golds[0])}")
    return _score_formula(candidate, expected, is_boxed=box is not None)


def _expression(answer: str) -> str:
    """Return the expression of an answer: after its last `####` and inside its last box, if any.

    Raises:
        ValueError: it is empty.
    """
    expression = answer.rpartition("####")[2].strip()
    box = last_box(expression)
    expression = expression if box is None else box.strip()
    if not expression.strip("$ "):
        raise ValueError(_no_expression(answer))
    return expression


def check_numeric_answer(answer: str) -> None:
    """Raise `ValueError` for an answer without a value, such as a word."""
    expression = _expression(answer)
    has_words = "\\" not in expression and _WORDS.search(_FUNCTIONS.sub("", _ROOT.sub("", expression)))
    if has_words and not answer_values(expression):
        raise ValueError(_no_expression(answer))


def _no_expression(answer: str) -> str:
    return f"the answer {answer[:80]!r} is not a mathematical expression; use another verifier, such as exact"


def _score_formula(candidate: str, expected: str, *, is_boxed: bool) -> Score:
    import math_verify

    # math-verify warns that its own time limit is off. The verifier process enforces one instead.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    expected, candidate = _ascii(expected), _ascii(candidate[-MAX_CHARS:])
    gold = math_verify.parse(f"${_latex(expected.strip('$ '))}$", parsing_timeout=None)
    if not gold:
        raise ValueError(_no_expression(expected))
    tries = [f"\\boxed{{{_latex(candidate)}}}"] if is_boxed else [candidate]
    if not is_boxed and "$" not in candidate:
        anchors = list(ANCHOR.finditer(candidate))
        bare = [candidate, *([candidate[anchors[-1].end() :].strip().partition("\n")[0]] if anchors else [])]
        short = (each.strip(" .*") for each in bare if len(each) <= _MAX_BARE_FORMULA and "\n" not in each)
        tries += [f"${_latex(each)}$" for each in short]
    for text in tries:
        found = math_verify.parse(text, parsing_timeout=None)
        if found and math_verify.verify(gold, found, timeout_seconds=None):
            return Score(1.0, f"math-verify finds {text[:80]!r} equal to {expected[:80]!r}")
    return Score(0.0, f"math-verify finds nothing equal to {expected[:80]!r} in the final answer")


def _ascii(formula: str) -> str:
    """Return a formula with Unicode signs, superscripts and full-width characters as LaTeX."""
    if formula.isascii():
        return formula
    formula = SUPERSCRIPT.sub(lambda match: f"^{{{unicodedata.normalize('NFKC', match[0])}}}", formula)
    formula = _UNICODE_ROOT.sub(lambda match: f"\\sqrt{{{match[1] or match[2]}}}", formula.translate(_UNICODE_SIGNS))
    return unicodedata.normalize("NFKC", formula).replace("\u2212", "-")


def _latex(formula: str) -> str:
    """Return a formula in Python notation as LaTeX; LaTeX is unchanged."""
    formula = _ROOT.sub(r"\\sqrt{\1}", formula)
    formula = _EXPONENT.sub(lambda match: f"^{{{match[1]}}}", formula).replace("**", "^")
    return _FUNCTIONS.sub(r"\\\1 ", formula)


def _text(value: Value) -> str:
    """Return a value as text, for messages."""
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
