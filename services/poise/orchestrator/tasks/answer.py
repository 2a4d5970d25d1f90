"""The answer to a problem, with the type that it has in its JSON file."""

from __future__ import annotations

import math
from decimal import Decimal

Answer = str | int | float
"""Text, or a number as JSON has it."""


class LiteralFloat(float):
    """A JSON number with the text that it was written as. Use as `parse_float` of `json.loads`."""

    literal: str

    def __new__(cls, literal: str) -> LiteralFloat:
        """Return the double nearest to `literal`."""
        number = super().__new__(cls, literal)
        number.literal = literal
        return number


def read_answer(value: object) -> Answer:
    """Return a JSON value as an answer. A number that no double holds becomes the text that it was written as.

    Raises:
        ValueError: it is neither text nor a finite number.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"is {kind_name(value)}; must be text or a number")
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        raise ValueError("is too large a number; write it as text")
    if isinstance(value, LiteralFloat) and not same_decimal(value.literal, float.__repr__(value)):
        return value.literal
    return float(value)


def same_decimal(one: str, other: str) -> bool:
    """Whether two decimal literals are the same number; False for exponents beyond all bounds."""
    try:
        return Decimal(one) == Decimal(other)
    except ArithmeticError:
        return False


def answer_text(answer: Answer) -> str:
    """Return an answer as text; a number without an exponent."""
    if isinstance(answer, str):
        return answer
    return str(answer) if isinstance(answer, int) else format(Decimal(repr(answer)), "f")


def kind_name(value: object) -> str:
    """Return what JSON calls a value, for messages."""
    if value is None:
        return "null"
    kinds = {bool: "true or false", int: "a number", str: "text", list: "a list", dict: "an object"}
    return kinds.get(type(value), "a number")
