"""Arithmetic on exact fractions if possible, else on mpmath numbers of 60 digits.

Every operation is bounded. Results with too many digits become inexact, and operations that would take too long raise
`ArithmeticLimit`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import mpmath

CONTEXT = mpmath.MPContext()
"""Context of inexact values, independent of mpmath's global precision."""
CONTEXT.dps = 60

Scalar = Any
"""A Fraction, or a real or complex mpmath number of `CONTEXT`."""

_NOISE = CONTEXT.mpf(10) ** -45
"""Relative size below which a difference is rounding noise."""
_MAX_BITS = 40_000
"""Maximum size of an exact numerator or denominator, in bits."""
_MAX_POWER = 10**15
_MAX_ARGUMENT = 10**30
"""Maximum argument of a function: reducing an angle needs as many digits as the angle has."""
_FUNCTIONS_WITH_ZEROS = frozenset({"sin", "cos", "tan", "cot", "ln"})
_MIN_ZERO_ARGUMENT = CONTEXT.mpf(10) ** -3
"""For arguments above this size, function values near zero count as exact zeros."""
_MAX_FACTORIAL = 2_000
_MAX_LITERAL = 4_000
"""Maximum number of digits, because Python's conversion takes quadratic time."""


class ArithmeticLimit(ValueError):
    """The value is undefined or too large to compute."""


def inexact(value: Scalar) -> Scalar:
    """Return a value as an mpmath number."""
    return CONTEXT.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


def literal(digits: str, exponent: int) -> Scalar:
    """Return the decimal `digits`·10^`exponent`. Digits may contain one point."""
    whole, _, part = digits.partition(".")
    if len(digits) > _MAX_LITERAL:
        raise ArithmeticLimit("the number has too many digits")
    mantissa, exponent = Fraction(int((whole + part) or "0")), exponent - len(part)
    return mantissa if not mantissa else multiply(mantissa, power(Fraction(10), Fraction(exponent)))


def equal(one: Scalar, other: Scalar) -> bool:
    """Return whether two values are equal; inexact values up to rounding noise."""
    if isinstance(one, Fraction) and isinstance(other, Fraction):
        return one == other
    left, right = inexact(one), inexact(other)
    if left == right:
        return True
    if CONTEXT.isinf(left) or CONTEXT.isinf(right):
        return False
    return bool(abs(left - right) <= _NOISE * max(abs(left), abs(right)))


def add(one: Scalar, other: Scalar) -> Scalar:
    """Return the sum. If inexact values cancel to rounding noise, the sum is an exact 0."""
    if isinstance(one, Fraction) and isinstance(other, Fraction):
        return _bounded(one + other)
    left, right = inexact(one), inexact(other)
    total = left + right
    if CONTEXT.isnan(total):
        raise ArithmeticLimit("the sum is undefined")
    is_noise = not CONTEXT.isinf(total) and abs(total) <= _NOISE * max(abs(left), abs(right))
    return Fraction(0) if is_noise else total


def multiply(one: Scalar, other: Scalar) -> Scalar:
    """Return the product."""
    if isinstance(one, Fraction) and isinstance(other, Fraction):
        return _bounded(one * other)
    product = inexact(one) * inexact(other)
    if CONTEXT.isnan(product):
        raise ArithmeticLimit("the product is undefined")
    return product


def divide(one: Scalar, other: Scalar) -> Scalar:
    """Return the quotient."""
    if not other:
        raise ArithmeticLimit("division by zero")
    if isinstance(one, Fraction) and isinstance(other, Fraction):
        return _bounded(one / other)
    return multiply(inexact(one), 1 / inexact(other))


def power(base: Scalar, exponent: Scalar) -> Scalar:
    """Return the principal power; exact if base and exponent allow it."""
    if abs(exponent) > _MAX_POWER:
        raise ArithmeticLimit("the exponent is too large")
    if not base and (not exponent or abs(exponent) != exponent):
        if not exponent:
            return Fraction(1)
        raise ArithmeticLimit("zero to a negative power")
    if isinstance(base, Fraction) and isinstance(exponent, Fraction):
        if exponent.denominator == 1:
            bits = max(abs(base.numerator).bit_length(), base.denominator.bit_length())
            if (bits - 1) * abs(exponent.numerator) <= _MAX_BITS:
                return _bounded(base**exponent.numerator)
        elif base >= 0 and exponent.denominator <= 100:
            root = _exact_root(base, exponent.denominator)
            if root is not None:
                return power(root, Fraction(exponent.numerator))
    return _checked(inexact(base) ** inexact(exponent))


def root(value: Scalar, degree: Scalar) -> Scalar:
    """Return the root; real for odd roots of negative numbers."""
    is_odd = isinstance(degree, Fraction) and degree.denominator == 1 and degree.numerator % 2 == 1
    if is_odd and isinstance(value, Fraction) and value < 0:
        return -power(-value, 1 / degree)
    return power(value, divide(Fraction(1), degree))


def factorial(value: Scalar) -> Scalar:
    """Return the factorial of a whole number."""
    if not isinstance(value, Fraction) or value.denominator != 1 or not 0 <= value <= _MAX_FACTORIAL:
        raise ArithmeticLimit("the factorial is undefined or too large")
    return Fraction(math.factorial(value.numerator))


def choose(n: Scalar, k: Scalar) -> Scalar:
    """Return the binomial coefficient "n choose k" of whole numbers."""
    limit = Fraction(_MAX_FACTORIAL)
    if any(not isinstance(one, Fraction) or one.denominator != 1 or not 0 <= one <= limit for one in (n, k)):
        raise ArithmeticLimit("the binomial coefficient is undefined or too large")
    return Fraction(math.comb(n.numerator, k.numerator))


def magnitude(value: Scalar) -> Scalar:
    """Return the absolute value."""
    return abs(value)


def apply(name: str, arguments: list[Scalar], log_base: int | None = None) -> Scalar:
    """Return the value of a function. `log` without a base uses `log_base`; None is the natural logarithm."""
    first = arguments[0]
    if name in _EXACT:
        return _EXACT[name](first)
    if name in ("min", "max", "gcd", "lcm"):
        return _of_many(name, arguments)
    if name in ("log", "lg"):
        base = arguments[1] if len(arguments) > 1 else Fraction(10) if name == "lg" else log_base
        value = _function("ln", first)
        return value if base is None else _whole(divide(value, _function("ln", Fraction(base))))
    if name == "log2":
        return _whole(divide(_function("ln", first), _function("ln", Fraction(2))))
    if name == "log10":
        return _whole(divide(_function("ln", first), _function("ln", Fraction(10))))
    if len(arguments) > 1:
        raise ArithmeticLimit(f"{name} takes one argument")
    return _function(name, first)


def _function(name: str, argument: Scalar) -> Scalar:
    value = inexact(argument)
    if not CONTEXT.isinf(value) and abs(value) > _MAX_ARGUMENT and name != "ln":
        raise ArithmeticLimit("the argument is too large")
    try:
        result = _checked(getattr(CONTEXT, name)(value))
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise ArithmeticLimit(f"{name} is undefined there") from error
    if name in _FUNCTIONS_WITH_ZEROS and abs(value) > _MIN_ZERO_ARGUMENT and abs(result) <= _NOISE:
        return Fraction(0)
    return _whole(result)


def _of_many(name: str, arguments: list[Scalar]) -> Scalar:
    if not all(isinstance(argument, Fraction) for argument in arguments):
        raise ArithmeticLimit(f"{name} takes exact numbers")
    if name in ("min", "max"):
        return min(arguments) if name == "min" else max(arguments)
    if any(argument.denominator != 1 for argument in arguments):
        raise ArithmeticLimit(f"{name} takes whole numbers")
    whole = [argument.numerator for argument in arguments]
    return Fraction(math.gcd(*whole) if name == "gcd" else math.lcm(*whole))


def _rounded(how: Callable[[Any], int]) -> Callable[[Scalar], Scalar]:
    def apply_to(value: Scalar) -> Scalar:
        if isinstance(value, Fraction):
            return Fraction(how(value))
        if not CONTEXT.isfinite(value) or not isinstance(value, CONTEXT.mpf) or abs(value) > _MAX_ARGUMENT:
            raise ArithmeticLimit("only real numbers can be rounded")
        return Fraction(int(CONTEXT.floor(value) if how is math.floor else CONTEXT.ceil(value)))

    return apply_to


_EXACT: dict[str, Callable[[Scalar], Scalar]] = {
    "sqrt": lambda value: power(value, Fraction(1, 2)),
    "cbrt": lambda value: root(value, Fraction(3)),
    "abs": magnitude,
    "factorial": factorial,
    "floor": _rounded(math.floor),
    "ceil": _rounded(math.ceil),
}
FUNCTIONS = frozenset(
    {"sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "sinh", "cosh", "tanh", "exp", "ln"}
    | {"log", "lg", "log2", "log10", "min", "max", "gcd", "lcm"}
    | set(_EXACT)
)
"""Functions that `apply` supports."""


def _whole(value: Scalar) -> Scalar:
    """Return an inexact whole number, such as log(100)/log(10), as an exact one."""
    if not isinstance(value, CONTEXT.mpf) or not CONTEXT.isfinite(value) or not 0.5 < abs(value) < _MAX_ARGUMENT:
        return value
    whole = Fraction(int(CONTEXT.nint(value)))
    return whole if equal(value, whole) else value


def _exact_root(value: Fraction, degree: int) -> Fraction | None:
    numerator, denominator = (_whole_root(part, degree) for part in (value.numerator, value.denominator))
    return None if numerator is None or denominator is None else Fraction(numerator, denominator)


def _whole_root(value: int, degree: int) -> int | None:
    if value.bit_length() > 4_000:
        return None
    if degree == 2:
        near = math.isqrt(value)
    else:
        with mpmath.workprec(value.bit_length() + 64):
            near = int(mpmath.nint(mpmath.mpf(value) ** (mpmath.mpf(1) / degree)))
    return near if near**degree == value else None


def _bounded(value: Fraction) -> Scalar:
    is_long = max(abs(value.numerator).bit_length(), value.denominator.bit_length()) > _MAX_BITS
    return inexact(value) if is_long else value


def _checked(value: Scalar) -> Scalar:
    if CONTEXT.isnan(value):
        raise ArithmeticLimit("the value is undefined")
    return value
