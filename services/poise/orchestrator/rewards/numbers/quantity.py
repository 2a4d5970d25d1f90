"""Numbers with units, groups of them, and their equality."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from poise.orchestrator.rewards.numbers.arithmetic import CONTEXT, add, equal, inexact, multiply
from poise.orchestrator.rewards.numbers.units import OTHER, PERCENT, PERMILLE, UNITS, Unit

_ROUNDED_DIGITS = 6
"""Minimum significant digits of a rounded decimal that equals the exact value."""
_LONG_DIGITS = 12
"""A decimal with at least this many significant digits may be a rounded value itself."""
_POUNDS = {UNITS["pounds"], UNITS["£"]}
"""Units with the same name: mass and currency."""
_DOUBLE_DIGITS = range(15, 18)
"""Significant digits of decimals that may be rounded doubles."""
_DOUBLE_ROUNDING = CONTEXT.mpf(10) ** -14


@dataclass(frozen=True, slots=True)
class Number:
    """A value as it was written."""

    value: Any
    """A Fraction or an mpmath number; None for a formula with variables."""
    unit: Unit | None = None
    digits: int = 0
    """Significant digits, if it was written as one decimal; else 0."""
    decimals: int = 0
    """Digits after the decimal point."""


@dataclass(frozen=True, slots=True)
class Group:
    """Several values: a list, set, tuple, interval or union."""

    kind: str
    """`list`, `set`, `union`, or the two brackets of a tuple or an interval."""
    items: tuple[Number | Group, ...]


Value = Number | Group


def is_numeric(value: Value) -> bool:
    """Return whether no part of a value is a formula with variables."""
    if isinstance(value, Group):
        return all(map(is_numeric, value.items))
    return value.value is not None


def same(left: Value, right: Value) -> bool:
    """Return whether two values are equal. Units are compared only if both have one."""
    if isinstance(left, Group) and isinstance(right, Group):
        return _same_groups(left, right)
    if isinstance(left, Number) and isinstance(right, Number):
        return is_numeric(left) and is_numeric(right) and _same_numbers(left, right)
    if isinstance(right, Group):
        left, right = right, left
    return (
        isinstance(left, Group) and len(left.items) == 1 and left.kind in ("list", "set") and same(left.items[0], right)
    )


def _same_groups(left: Group, right: Group) -> bool:
    if len(left.items) != len(right.items):
        return False
    kinds = {left.kind, right.kind}
    if kinds <= {"list", "set"} or kinds == {"union"}:
        rest = list(right.items)
        for item in left.items:
            match = next((index for index, other in enumerate(rest) if same(item, other)), None)
            if match is None:
                return False
            del rest[match]
        return True
    if len(kinds) > 1 and "list" not in kinds:
        return False
    return all(same(one, other) for one, other in zip(left.items, right.items, strict=True))


def _same_numbers(left: Number, right: Number) -> bool:
    if left.unit == right.unit:
        return _close(left, right)
    if left.unit is None or right.unit is None or OTHER in (left.unit, right.unit):
        if _close(left, right):
            return not _is_share_of_one(left, right)
        return OTHER not in (left.unit, right.unit) and _close(_without_factor(left), _without_factor(right))
    if {left.unit, right.unit} == _POUNDS:
        return _close(left, right)
    return left.unit.is_like(right.unit) and _close(_in_base(left, left.unit), _in_base(right, right.unit))


def _is_share_of_one(left: Number, right: Number) -> bool:
    """Return whether one is a percentage or per mille of at most 1. 0.5% does not equal 0.5, but 50% may equal 50."""
    share = next((number for number in (left, right) if number.unit in (PERCENT, PERMILLE)), None)
    return share is not None and bool(0 < abs(share.value) <= 1)


def _in_base(number: Number, unit: Unit) -> Number:
    shift = {PERCENT: 2, PERMILLE: 3}.get(unit)
    value = multiply(number.value, unit.factor)
    return Number(value) if shift is None else Number(value, None, number.digits, number.decimals + shift)


def _without_factor(number: Number) -> Number:
    return _in_base(number, number.unit) if number.unit is not None and number.unit.is_factor else number


def _close(left: Number, right: Number) -> bool:
    return equal(left.value, right.value) or _rounds(left, right) or _rounds(right, left)


def _rounds(short: Number, long: Number) -> bool:
    """Return whether `short` is `long` truncated or rounded to six digits or more, or to double precision."""
    if short.decimals < 1 or short.digits < _ROUNDED_DIGITS or CONTEXT.isinf(inexact(long.value)):
        return False
    difference = abs(inexact(add(short.value, -long.value)))
    if short.digits in _DOUBLE_DIGITS and difference <= _DOUBLE_ROUNDING * abs(inexact(short.value)):
        return True
    is_unending = long.digits >= _LONG_DIGITS or not _is_decimal(long.value)
    return is_unending and long.digits != short.digits and bool(difference < CONTEXT.mpf(10) ** -short.decimals)


def _is_decimal(value: Any) -> bool:
    """Return whether a value has a finite decimal representation."""
    if not isinstance(value, Fraction):
        return False
    rest = value.denominator
    rest >>= (rest & -rest).bit_length() - 1
    while rest % 5 == 0:
        rest //= 5
    return rest == 1
