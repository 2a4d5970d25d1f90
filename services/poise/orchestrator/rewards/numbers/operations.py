"""Operations on values: numbers with units, formulas with variables, and the lists that ± creates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from poise.orchestrator.rewards.numbers import arithmetic
from poise.orchestrator.rewards.numbers.quantity import Group, Number, Value
from poise.orchestrator.rewards.numbers.units import OTHER, PERCENT, Unit


class Unreadable(ValueError):
    """There is no value at this position."""


def is_symbolic(value: Value) -> bool:
    """Return whether a value is a formula with variables."""
    return isinstance(value, Number) and value.value is None


def negated(value: Value) -> Value:
    """Return the negated number."""
    if isinstance(value, Group):
        raise Unreadable("a group has no sign")
    return value if value.value is None else replace(value, value=-value.value)


def plain(value: Value) -> Value:
    """Return a number without its unit. Percent and degrees become factors."""
    if isinstance(value, Group) or value.value is None or value.unit is None:
        return value
    return Number(arithmetic.multiply(value.value, value.unit.factor) if value.unit.is_factor else value.value)


def apply(function: Callable[..., arithmetic.Scalar], *values: Value) -> Number:
    """Apply a function to numbers. Return a formula if any of them is a formula."""
    scalars = []
    for value in values:
        if isinstance(value, Group):
            raise Unreadable("a group is not a number")
        scalars.append(value.value)
    return Number(None) if None in scalars else Number(function(*scalars))


def plus_minus(value: Value, term: Value) -> Group:
    """Return the list of `value + term` and `value - term`."""
    return Group("list", (_as_number(combine(value, term, "+")), _as_number(combine(value, term, "-"))))


def _as_number(value: Value) -> Number:
    if isinstance(value, Group):
        raise Unreadable("a group is not a number")
    return value


def combine(left: Value, right: Value, sign: str) -> Value:
    """Return `left sign right`. Lists, which ± creates, are combined item by item."""
    if isinstance(left, Group) and left.kind == "list" and isinstance(right, Number):
        return Group("list", tuple(combine(item, right, sign) for item in left.items))
    if isinstance(right, Group) and right.kind == "list" and isinstance(left, Number):
        return Group("list", tuple(combine(left, item, sign) for item in right.items))
    one, other = _as_number(left), _as_number(right)
    if one.value is None or other.value is None:
        return Number(None)
    if sign in "+-" and one.unit != other.unit and one.unit and other.unit and one.unit.is_like(other.unit):
        factor = arithmetic.divide(other.unit.factor, one.unit.factor)
        other = Number(arithmetic.multiply(other.value, factor), one.unit)
    unit = _common_unit(one.unit, other.unit, sign)
    if unit is None:
        one, other = _as_number(plain(one)), _as_number(plain(other))
    return Number(_OPERATIONS[sign](one.value, other.value), unit)


def _common_unit(left: Unit | None, right: Unit | None, sign: str) -> Unit | None:
    """Return the unit of `left sign right`; None if both are treated as plain numbers."""
    if left == right:
        return left if sign in "+-" else None
    known = left or right
    if left is not None and right is not None:
        if left.is_factor and right.is_factor:
            return None
        if sign in "+-":
            raise Unreadable("different units")
        return OTHER
    if known == PERCENT or (sign in "+-" and known is not None and known.is_factor):
        return known if sign == "/" and right is not None else None
    return known


def _floor_divide(left: arithmetic.Scalar, right: arithmetic.Scalar) -> arithmetic.Scalar:
    return arithmetic.apply("floor", [arithmetic.divide(left, right)])


_OPERATIONS: dict[str, Callable[[arithmetic.Scalar, arithmetic.Scalar], arithmetic.Scalar]] = {
    "+": arithmetic.add,
    "-": lambda left, right: arithmetic.add(left, -right),
    "*": arithmetic.multiply,
    "/": arithmetic.divide,
    "//": _floor_divide,
}
