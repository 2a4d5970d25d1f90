"""Answers of problems, with their JSON types."""

from __future__ import annotations

import math
from decimal import Decimal

Answer = str | int | float
"""Text or a JSON number."""


class LiteralFloat(float):
    """A JSON number that keeps its original text. Use as `parse_float` of `json.loads`."""

    literal: str

    def __new__(cls, literal: str) -> LiteralFloat:
        """Return the double nearest to `literal`."""
        number = super().__new__(cls, literal)
        number.literal = literal
        return number


def read_answer(value: object) -> Answer:
    """Return a JSON value as an answer. A number that a double cannot represent becomes its original text.

    Raises:
        ValueError: the value is neither text nor a finite number.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"is {kind_name(value)}; must be text or a number")
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        raise ValueError("is too large for a double; write it as text")
    if isinstance(value, LiteralFloat) and not same_decimal(value.literal, float.__repr__(value)):
        return value.literal
    return float(value)


def same_decimal(one: str, other: str) -> bool:
    """Return whether two decimal literals are the same number; False if an exponent is out of range."""
    try:
        return Decimal(one) == Decimal(other)
    except ArithmeticError:
        return False


def answer_text(answer: Answer) -> str:
    """Return an answer as text; numbers without an exponent."""
    if isinstance(answer, str):
        return answer
    return str(answer) if isinstance(answer, int) else format(Decimal(repr(answer)), "f")


def kind_name(value: object) -> str:
    """Return the JSON type of a value, for messages."""
    if value is None:
        return "null"
    kinds = {bool: "true or false", int: "a number", str: "text", list: "a list", dict: "an object"}
    return kinds.get(type(value), "a number")
