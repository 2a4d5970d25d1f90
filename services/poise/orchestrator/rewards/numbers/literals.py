"""Reads number literals: `1e-5`, `1,234.5`, `1 234`, `1_000`, `1.234,5`, `1 1/2`, `0x1F`, `5th`."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction

from poise.orchestrator.rewards.numbers.arithmetic import literal
from poise.orchestrator.rewards.numbers.operations import Unreadable
from poise.orchestrator.rewards.numbers.quantity import Number
from poise.orchestrator.rewards.numbers.units import OTHER

_RADIX = re.compile(r"0[xX][0-9a-fA-F]+(?!\w)|0[bB][01]+(?!\w)|0[oO][0-7]+(?!\w)")
_EXPONENT = r"(?P<exponent>[eE][+-]?\d+(?![\d.]*[A-Za-z]))?"
_GROUPED = re.compile(
    r"(?:(?P<comma>\d{1,3}(?:,\d{3})++(?![\d]|,\d)|\d{1,2}(?:,\d{2}(?=,))++,\d{3}(?![\d]|,\d))"
    r"|(?P<space>[1-9]\d{0,2}(?: \d{3})++(?!\d))"
    r"|(?P<quote>\d{1,3}(?:'\d{3})++(?!\d))"
    r"|(?P<python>\d++(?:_\d++)+))"
    r"(?P<part>\.\d+)?" + _EXPONENT
)
_EUROPEAN = re.compile(r"(?![1-9]\d{0,2},\d{3}(?!\d))(?:\d{1,3}(?:[. ]\d{3})++|\d++),\d++(?!\d|,\d|\.\d)")
_DOTTED = re.compile(r"\d{1,3}(?:\.\d{3}){2,}+(?![\d.]\d|\d)")
_PLAIN = re.compile(r"(?:\d++(?:\.\d*+)?|\.\d++)" + _EXPONENT)
_MIXED = re.compile(
    r"(?: +|(?= *\\frac))"
    r"(?:(\d{1,6}) */ *(\d{1,6})|\\frac *\{ *(\d{1,6}) *\} *\{ *(\d{1,6}) *\}|\\frac *(\d) *(\d))(?![\d.^!])"
)
_ORDINAL = re.compile(r"(?:st|nd|rd|th)(?![A-Za-z])")


@dataclass(frozen=True, slots=True)
class Style:
    """Interpretation of ambiguous notation."""

    comma: str = "thousands"
    """Meaning of a comma between digits: `thousands`, `decimal` or `list`."""
    log_base: int | None = None
    """Base of `log` without a base; None is the natural logarithm."""


def read_literal(text: str, position: int, style: Style, *, in_brackets: bool) -> tuple[Number, int]:
    """Read a number without a sign: decimal, scientific, grouped, mixed, hexadecimal, octal or binary.

    Raises:
        Unreadable: there is none.
    """
    if radix := _RADIX.match(text, position):
        return Number(Fraction(int(radix[0], 0))), radix.end()
    if style.comma == "decimal" and not in_brackets and (match := _EUROPEAN.match(text, position)):
        whole, _, part = match[0].replace(".", "").replace(" ", "").partition(",")
        return _decimal(f"{whole}.{part}", 0), match.end()
    if match := _DOTTED.match(text, position):
        return _decimal(match[0].replace(".", ""), 0), match.end()
    match = _GROUPED.match(text, position)
    if match and (match["comma"] is None or (style.comma == "thousands" and not match[0].startswith("0"))):
        digits = re.sub(
            r"[ ,'_]", "", match[0][: match.start("exponent") - match.start()] if match["exponent"] else match[0]
        )
        return _decimal(digits, int((match["exponent"] or "e0")[1:])), match.end()
    match = _PLAIN.match(text, position)
    if not match:
        raise Unreadable("no number")
    end = match.end()
    exponent = match["exponent"]
    digits = match[0][: -len(exponent)] if exponent else match[0]
    if digits.endswith(".") and not exponent and not text[end : end + 1].isdigit():
        digits, end = digits[:-1], end - 1  # the full stop of a sentence
    if digits.isdigit() and not exponent and (mixed := _MIXED.match(text, end)):
        numerator, denominator = (int(part) for part in mixed.groups() if part is not None)
        if 0 < numerator < denominator:
            return Number(literal(digits, 0) + Fraction(numerator, denominator)), mixed.end()
    if ordinal := _ORDINAL.match(text, end):
        return replace(_decimal(digits, 0), unit=OTHER), ordinal.end()
    return _decimal(digits, int(exponent[1:]) if exponent else 0), end


def _decimal(digits: str, exponent: int) -> Number:
    whole, _, part = digits.partition(".")
    return Number(
        literal(digits, exponent),
        digits=len((whole + part).lstrip("0")),
        decimals=len(part) - exponent,
    )
