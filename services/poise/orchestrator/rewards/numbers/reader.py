"""Parses a value in plain notation: numbers, arithmetic, functions, units, and groups of them."""

from __future__ import annotations

import re
from dataclasses import replace
from fractions import Fraction

from poise.orchestrator.rewards.numbers import arithmetic
from poise.orchestrator.rewards.numbers.arithmetic import CONTEXT, FUNCTIONS, ArithmeticLimit
from poise.orchestrator.rewards.numbers.literals import Style, read_literal
from poise.orchestrator.rewards.numbers.operations import (
    Unreadable,
    apply,
    combine,
    is_symbolic,
    negated,
    plain,
    plus_minus,
)
from poise.orchestrator.rewards.numbers.plain_text import SET_CLOSE, SET_OPEN
from poise.orchestrator.rewards.numbers.quantity import Group, Number, Value
from poise.orchestrator.rewards.numbers.units import CURRENCIES, OTHER, UNITS, read_unit

_MAX_DEPTH = 60
_MAX_SIGNS = 3
"""Maximum number of consecutive signs, as in `2--3`."""
_MAX_STEPS = 10_000
"""Maximum number of values per text. It limits the time to about a second."""

_SCALES = {"dozen": 12, "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SCALE = re.compile(rf" *({'|'.join(_SCALES)})s?(?![A-Za-z])")
_WORD = re.compile(r"[A-Za-z]+|[α-ωΑ-Ω]")
_MODULE = re.compile(r"(?:math|np|numpy|cmath|sympy)\.(?=[A-Za-z])")
_FUNCTION_NAMES = {
    "arcsin": "asin",
    "arccos": "acos",
    "arctan": "atan",
    "ceiling": "ceil",
    "log_2": "log2",
    "log_10": "log10",
}
_INFINITIES = ("inf", "infinity", "Infinity", "INF", "oo", "Inf")
_SPACE = re.compile(r"\s*")
_RELATION = re.compile(r"\s*(?:<=|>=|!=|==?|≤|≥|≠|<|>|∈)")
_AND_PART = re.compile(r"\s+(?:and\s+)?(?=\d)")
_LIST_SEPARATOR = re.compile(r"\s*(?:[,;]\s*(?:and|or)?|and|or)(?=[\s\d(+.\\-])", re.IGNORECASE)
_MULTIPLIED = re.compile(r"//|/|\*(?!\*)")
_RAISED = re.compile(r"\s*(?:\*\*|\^)\s*")
_LOG_DIGITS = re.compile(r"(?:10|2)(?=\s*\()")
_FUNCTION_CALL = re.compile(r"\s*(?:min|sec)\s*\(")
_FUNCTION_POWER = re.compile(r"\s*\^\s*(?:\{\s*(-?\d{1,3})\s*\}|\(\s*(-?\d{1,3})\s*\)|(-?\d{1,3}))")
_BARE_FACTOR = re.compile(r"(?=π|\\frac|pi(?![A-Za-z]))|\s*/\s*(?=\d)")
_SUBSCRIPT = re.compile(r"_(?:\{[^{}]{0,40}\}|\w)|'+")
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_GREEK = frozenset(
    {"alpha", "beta", "gamma", "delta", "epsilon", "varepsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda"}
    | {"mu", "nu", "xi", "rho", "sigma", "tau", "phi", "varphi", "chi", "psi", "omega", "ell"}
    | {"Gamma", "Delta", "Theta", "Lambda", "Sigma", "Phi", "Psi", "Omega"}
)
_CLOSERS = {"(": ")]", "[": ")]", SET_OPEN: SET_CLOSE, "{": "}"}
_IMPLICIT = re.compile(r"\s*(?=\\sqrt|\\frac|π|√|∞|(?:sqrt|pi|sin|cos|tan|ln|log|exp)(?![A-Za-z]))|(?=[({A-Za-zα-ω\\])")


class Reader:
    """A recursive-descent parser. Methods take a position and return a value and its end."""

    def __init__(self, text: str, style: Style) -> None:
        self._text = text
        self._style = style
        self._depth = 0
        self._num_steps = 0
        self._num_brackets = 0
        """Number of open brackets."""

    def value(self, position: int, *, lists: bool) -> tuple[Value, int]:
        """Read the longest value at a position, with its unit; with `lists`, also lists with commas, `and` or `or`.

        Raises:
            Unreadable: there is none.
        """
        try:
            value, end = self._relation(position)
            items = [value]
            while lists and (separator := _LIST_SEPARATOR.match(self._text, end)):
                try:
                    item, end = self._relation(self._skip(separator.end()))
                except Unreadable:
                    break
                items.append(item)
        except (ArithmeticLimit, RecursionError, OverflowError) as error:
            raise Unreadable(str(error)) from error
        return (value if len(items) == 1 else Group("list", tuple(items))), end

    # Relations, sums, products

    def _relation(self, position: int) -> tuple[Value, int]:
        value, end = self._union(position)
        while True:
            sign = _RELATION.match(self._text, end)
            if not sign:
                return value, end
            is_equation = not sign[0].strip().strip("=∈")
            try:
                right, end = self._union(self._skip(sign.end()))
            except Unreadable:
                return (value, end) if is_equation else (Number(None), sign.end())
            if not is_equation:
                value = Number(None)
            elif not is_symbolic(right) or is_symbolic(value):
                value = right

    def _union(self, position: int) -> tuple[Value, int]:
        value, end = self._sum(position)
        parts = [value]
        while self._text.startswith("∪", self._skip(end)):
            part, end = self._sum(self._skip(self._skip(end) + 1))
            parts.append(part)
        return (value if len(parts) == 1 else Group("union", tuple(parts))), end

    def _sum(self, position: int) -> tuple[Value, int]:
        if self._text.startswith("±", position):
            value, end = self._product(self._skip(position + 1))
            return plus_minus(Number(Fraction(0)), value), end
        value, end = self._with_parts(*self._product(position))
        while (sign := self._text[(at := self._skip(end)) : at + 1]) and sign in "+-±":
            try:
                term, after = self._product(self._skip(at + 1))
            except Unreadable:
                break
            end = after
            value = plus_minus(value, term) if sign == "±" else combine(value, term, sign)
        return value, end

    def _with_parts(self, value: Value, end: int) -> tuple[Value, int]:
        """Add the smaller units after a quantity, as in `1 hour 30 minutes`."""
        while isinstance(value, Number) and value.unit is not None and (part := _AND_PART.match(self._text, end)):
            try:
                smaller, after = self._postfixed(part.end())
            except Unreadable:
                break
            if not isinstance(smaller, Number) or smaller.unit is None or not smaller.unit.is_part_of(value.unit):
                break
            value, end = combine(value, smaller, "+"), after
        return value, end

    def _product(self, position: int) -> tuple[Value, int]:
        value, end = self._signed(position)
        while True:
            at = self._skip(end)
            operator = _MULTIPLIED.match(self._text, at)
            implicit = None if operator else _IMPLICIT.match(self._text, end)
            try:
                if operator:
                    factor, after = self._signed(self._skip(operator.end()))
                elif implicit:
                    factor, after = self._power(implicit.end())
                else:
                    return value, end
            except Unreadable:
                return self._attached_word(value, end)
            value, end = combine(value, factor, operator[0] if operator else "*"), after

    def _attached_word(self, value: Value, end: int) -> tuple[Value, int]:
        """Read letters directly after a number: variables, as in `2xy`, or a unit of at least four letters."""
        word = _WORD.match(self._text, end)
        if not word or isinstance(value, Group) or value.value is None:
            return value, end
        return (replace(value, unit=OTHER) if len(word[0]) > 3 else Number(None)), word.end()

    def _signed(self, position: int) -> tuple[Value, int]:
        negative = False
        for _ in range(_MAX_SIGNS):
            if self._text[position : position + 1] not in ("+", "-"):
                break
            negative ^= self._text[position] == "-"
            position = self._skip(position + 1)
        value, end = self._power(position)
        return (negated(value) if negative else value), end

    def _power(self, position: int) -> tuple[Value, int]:
        self._depth += 1
        try:
            if self._depth > _MAX_DEPTH:
                raise Unreadable("nested too deeply")
            return self._raised(position)
        finally:
            self._depth -= 1

    def _raised(self, position: int) -> tuple[Value, int]:
        value, end = self._postfixed(position)
        sign = _RAISED.match(self._text, end)
        if not sign:
            return value, end
        exponent, end = self._signed(sign.end())
        value = apply(lambda base, to: arithmetic.power(base, to), plain(value), plain(exponent))
        return self._with_unit(value, end)

    def _postfixed(self, position: int) -> tuple[Value, int]:
        value, end = self._atom(position)
        while self._text.startswith("!", end) and not self._text.startswith("!=", end):
            value, end = apply(arithmetic.factorial, plain(value)), end + 1
        return self._with_unit(value, end)

    def _with_unit(self, value: Value, end: int) -> tuple[Value, int]:
        if isinstance(value, Group) or value.value is None or value.unit is not None:
            return value, end
        if scale := _SCALE.match(self._text, end):
            scaled = arithmetic.multiply(value.value, Fraction(_SCALES[scale[1]]))
            value, end = Number(scaled), scale.end()
        if _FUNCTION_CALL.match(self._text, end):
            return value, end
        found = read_unit(self._text[end : end + 60])
        if found is None:
            return value, end
        unit, length = found
        return replace(value, unit=unit), end + length

    # Atoms

    def _atom(self, position: int) -> tuple[Value, int]:
        self._num_steps += 1
        if self._num_steps > _MAX_STEPS:
            raise Unreadable("the text has too many values")
        text = self._text
        character = text[position : position + 1]
        if character in CURRENCIES and character:
            value, end = self._signed(self._skip(position + 1))
            if isinstance(value, Group) or value.value is None:
                raise Unreadable("no amount of money")
            return replace(value, unit=value.unit or UNITS[character]), end
        if character.isdigit() or (character == "." and text[position + 1 : position + 2].isdigit()):
            return self._literal(position)
        if character in ("(", "[", SET_OPEN, "{"):
            return self._bracketed(position)
        if character == "|":
            value, end = self._sum(self._skip(position + 1))
            end = self._expect("|", end)
            return apply(arithmetic.magnitude, plain(value)), end
        if character == "√":
            value, end = self._power(self._skip(position + 1))
            return apply(lambda of: arithmetic.power(of, Fraction(1, 2)), plain(value)), end
        if character in ("π", "∞"):
            return Number(+CONTEXT.pi if character == "π" else CONTEXT.inf), position + 1
        if character == "∅":
            return Group("set", ()), position + 1
        if character == "\\":
            return self._command(position)
        return self._word(position)

    def _literal(self, position: int) -> tuple[Value, int]:
        return read_literal(self._text, position, self._style, in_brackets=bool(self._num_brackets))

    def _bracketed(self, position: int) -> tuple[Value, int]:
        self._num_brackets += 1
        try:
            return self._items(position)
        finally:
            self._num_brackets -= 1

    def _items(self, position: int) -> tuple[Value, int]:
        opener = self._text[position]
        items: list[Value] = []
        end = self._skip(position + 1)
        if opener == SET_OPEN and self._text.startswith(SET_CLOSE, end):
            return Group("set", ()), end + 1
        while True:
            item, end = self._relation(end)
            items.append(item)
            end = self._skip(end)
            closer = self._text[end : end + 1]
            if closer in (",", ";") and closer:
                end = self._skip(end + 1)
                continue
            break
        if not closer or closer not in _CLOSERS[opener]:
            raise Unreadable("a bracket is not closed")
        end += 1
        if opener in (SET_OPEN, "{"):
            is_set = opener == SET_OPEN or len(items) > 1
            return (Group("set", tuple(items)) if is_set else items[0]), end
        if len(items) == 1 and opener + closer in ("()", "[]"):
            return items[0], end
        return Group(opener + closer, tuple(items)), end

    def _command(self, position: int) -> tuple[Value, int]:
        text = self._text
        if text.startswith("\\frac", position):
            top, end = self._argument(position + 5)
            bottom, end = self._argument(end)
            return combine(top, bottom, "/"), end
        if text.startswith(("\\lfloor", "\\lceil"), position):
            name = "floor" if text.startswith("\\lfloor", position) else "ceil"
            value, end = self._sum(self._skip(position + len(f"\\l{name}")))
            end = self._expect(f"\\r{name}", end)
            return apply(lambda of: arithmetic.apply(name, [of]), plain(value)), end
        command = _COMMAND.match(text, position)
        if command and command[1] in ("binom", "dbinom", "tbinom"):
            n, end = self._argument(command.end())
            k, end = self._argument(end)
            return apply(arithmetic.choose, plain(n), plain(k)), end
        if command and command[1] in _GREEK:
            return Number(None), self._subscript(command.end())
        raise Unreadable("an unknown command")

    def _argument(self, position: int) -> tuple[Value, int]:
        """Read the argument of a LaTeX command: a group in braces, or one digit."""
        at = self._skip(position)
        if self._text[at : at + 1].isdigit():
            return Number(Fraction(int(self._text[at]))), at + 1
        return self._atom(at)

    def _word(self, position: int) -> tuple[Value, int]:
        if module := _MODULE.match(self._text, position):
            position = module.end()
        match = _WORD.match(self._text, position)
        if not match:
            raise Unreadable("no value")
        word, end = match[0], match.end()
        name = _FUNCTION_NAMES.get(word, word)
        if name in FUNCTIONS:
            return self._function(name, end)
        if word in ("pi", "Pi", "PI"):
            return Number(+CONTEXT.pi), end
        if word in _INFINITIES:
            return Number(CONTEXT.inf), end
        if word == "e":
            return Number(+CONTEXT.e), end
        if word in ("i", "j"):
            return Number(CONTEXT.mpc(0, 1)), end
        if len(word) == 1:
            return Number(None), self._subscript(end)
        raise Unreadable("a word")

    def _function(self, name: str, end: int) -> tuple[Value, int]:
        text = self._text
        log_base: Value | None = None
        inverse = False
        digits = _LOG_DIGITS.match(text, end)
        if name == "log" and digits:
            name, end = f"log{digits[0]}", digits.end()
        if name == "log" and text.startswith("_", end):
            log_base, end = self._argument(end + 1) if text[end + 1 : end + 2] == "{" else self._literal(end + 1)
        if name == "sqrt" and text.startswith("[", end):
            degree, end = self._sum(self._skip(end + 1))
            end = self._expect("]", end)
            value, end = self._argument(end)
            return apply(arithmetic.root, plain(value), plain(degree)), end
        power = _FUNCTION_POWER.match(text, end)
        to = 1
        if power:
            to = int(next(part for part in power.groups() if part))
            end, inverse = power.end(), to == -1
        if inverse:
            if name not in ("sin", "cos", "tan"):
                raise Unreadable("an unknown inverse")
            name, to = f"a{name}", 1
        arguments, end = self._arguments(name, end)
        if any(isinstance(argument, Group) for argument in arguments):
            raise Unreadable("a function of a group")
        if log_base is not None:
            arguments.append(log_base)
        value = apply(lambda *of: arithmetic.apply(name, list(of), self._style.log_base), *map(plain, arguments))
        return (value if to == 1 else apply(arithmetic.power, value, Number(Fraction(to)))), end

    def _arguments(self, name: str, end: int) -> tuple[list[Value], int]:
        text = self._text
        at = self._skip(end)
        if text.startswith("(", at):
            arguments: list[Value] = []
            at = self._skip(at + 1)
            while True:
                argument, at = self._sum(at)
                arguments.append(argument)
                at = self._skip(at)
                if not text.startswith(",", at):
                    return arguments, self._expect(")", at)
                at = self._skip(at + 1)
        if text.startswith("{", at) or (name == "sqrt" and text[at : at + 1].isdigit()):
            argument, at = self._argument(at) if text.startswith("{", at) else self._literal(at)
            return [argument], at
        if at == end and text[at : at + 1].isalpha():
            raise Unreadable("a word")
        argument, at = self._bare_argument(at)
        return [argument], at

    def _bare_argument(self, position: int) -> tuple[Value, int]:
        """Read the argument of a function without brackets, such as `sin 30°` or `ln 2`."""
        value, end = self._signed(position)
        while implicit := _BARE_FACTOR.match(self._text, end):
            factor, after = self._power(implicit.end())
            value, end = combine(value, factor, "/" if "/" in implicit[0] else "*"), after
        return value, end

    # Helpers

    def _subscript(self, end: int) -> int:
        match = _SUBSCRIPT.match(self._text, end)
        return match.end() if match else end

    def _skip(self, position: int) -> int:
        match = _SPACE.match(self._text, position)
        return match.end() if match else position

    def _expect(self, what: str, position: int) -> int:
        at = self._skip(position)
        if not self._text.startswith(what, at):
            raise Unreadable(f"{what} is missing")
        return at + len(what)
