"""Finds the possible values of a reference answer, and of a response's final answer."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator

from poise.orchestrator.rewards.numbers.arithmetic import FUNCTIONS
from poise.orchestrator.rewards.numbers.literals import Style
from poise.orchestrator.rewards.numbers.operations import Unreadable
from poise.orchestrator.rewards.numbers.plain_text import DOLLAR, SET_OPEN, plain_text
from poise.orchestrator.rewards.numbers.quantity import Group, Number, Value, is_numeric
from poise.orchestrator.rewards.numbers.reader import Reader
from poise.orchestrator.rewards.numbers.units import OTHER

MAX_CHARS = 4000
"""Maximum length of a text to read as a value. In longer texts, only the end is searched."""

_COMMAS = ("thousands", "list", "decimal")
"""Meanings of a comma between digits, the most likely first."""
ANCHOR = re.compile(
    r"(?:answer|result|solution)s?\b[^.\n]{0,60}?(?:\bis\b|\bare\b|\bequals\b|:|=)(?!\s*not\b)", re.IGNORECASE
)
_LABEL = re.compile(
    r"\s*(?:(?:the\s+)?(?:final\s+)?(?:answer|result)s?\s*(?:is|are|:|=)+|it\s+is|it's)\s*", re.IGNORECASE
)
_UNIT_WORDS = re.compile(
    r"(?!(?:or|and|to|plus|minus|times|if|when|mod|than|x)\b)[A-Za-z][A-Za-z'/ -]*[A-Za-z]|\([A-Za-z ]*\)"
)
_BULLET = re.compile(r"^[ \t]*(?:[-+*][ \t]+|\d{1,2}[.)][ \t]+(?=\S))(?=\S)", re.MULTILINE)
_START = re.compile(rf"[\d.+\-(\[{{\\√π∞∅|±{SET_OPEN}{DOLLAR}€£¥₹A-Za-z]")
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*")
_WORD = re.compile(r"[A-Za-z]+")
_OPERATOR_AFTER = re.compile(r"\s*(?:[=^*/+<>≤≥]|-(?=\s|\d))|\(")
_DIGITS = re.compile(r"[\d.:]*\d")
_EXCLAMATION = re.compile(r"(?<=\d)!++(?=\s|$)")
_COMMAND = re.compile(r"\\(?!frac)[A-Za-z]")
_SIGNS = re.compile(r"[-+±]+")
_CONTINUED = re.compile(r"[:.]\d|\d")
_VALUE_WORDS = FUNCTIONS | {
    "pi",
    "inf",
    "infinity",
    "Infinity",
    "oo",
    "math",
    "np",
    "numpy",
    "arcsin",
    "arccos",
    "arctan",
}


def answer_values(answer: str) -> list[Value]:
    """Return the possible values of a reference answer; empty if it is not one number or group of numbers."""
    text = plain_text(answer[: MAX_CHARS + 1]).strip()
    if not text or len(text) > MAX_CHARS:
        return []
    return _distinct(_whole(text, style) for style in _styles(text, _COMMAS))


def response_values(text: str, *, boxed: bool, lists: bool) -> list[Value]:
    """Return the possible values of a final answer.

    The value is the whole text if it is one value, else the value after the last "answer is", else the last value.

    Args:
        text: the final answer, or the content of its box.
        boxed: whether the text is from a box. A formula in a box is read as a whole or not at all.
        lists: whether to search prose for lists such as `1, 2 and 3`.
    """
    text = plain_text(text[-MAX_CHARS:])
    bare = text.strip()
    if boxed and _COMMAND.search(text):
        return _distinct(_whole(bare, style) for style in _styles(text, _COMMAS))
    # In a sentence, "42!" is either a factorial or an exclamation.
    prose = [text] if boxed else list(dict.fromkeys((text, _EXCLAMATION.sub(".", text))))
    found: list[Value | None] = []
    for style in _styles(text, _COMMAS):
        whole = _whole(bare, style)
        if whole and not _LABEL.match(bare):
            found.append(whole)
        else:
            found += [_whole(each.strip(), style) or _in_prose(each, style, lists) for each in prose]
    return _distinct(found)


def _distinct(values: Iterable[Value | None]) -> list[Value]:
    distinct: list[Value] = []
    for value in values:
        if value is not None and value not in distinct:
            distinct.append(value)
    return distinct


def _styles(text: str, commas: tuple[str, ...]) -> Iterator[Style]:
    commas = commas if re.search(r"\d,\d", text) else commas[:1]
    bases = (None, 10) if "log" in text else (None,)
    return (Style(comma, base) for comma, base in itertools.product(commas, bases))


def _whole(text: str, style: Style) -> Value | None:
    """Read a text that consists of one value, possibly with words for its unit."""
    if text == "{}":
        return Group("set", ())
    label = _LABEL.match(text)
    try:
        value, end = Reader(text, style).value(label.end() if label else 0, lists=True)
    except Unreadable:
        return None
    rest = text[end:].strip(" \t\r\n.!;")
    if not is_numeric(value):
        return None
    if not rest:
        return value
    if isinstance(value, Number) and _UNIT_WORDS.fullmatch(rest):
        return Number(value.value, value.unit or OTHER, value.digits, value.decimals)
    return None


def _in_prose(text: str, style: Style, lists: bool) -> Value | None:
    """Return the value after the last "answer is", else the last value."""
    text = _BULLET.sub(lambda match: " " * len(match[0]), text) if "\n" in text else text
    if anchors := list(ANCHOR.finditer(text)):
        after = next(_search(text, anchors[-1].end(), style, lists), None)
        if after is not None and is_numeric(after):
            return after
    last = None
    for value in _search(text, 0, style, lists):
        last = value
    return last if last is not None and is_numeric(last) else None


def _search(text: str, position: int, style: Style, lists: bool) -> Iterator[Value]:
    """Yield the values in prose, including formulas with variables."""
    reader = Reader(text, style)
    while start := _START.search(text, position):
        position = start.start()
        word = _IDENTIFIER.match(text, position)
        if word and not _begins_value(text, position):
            position = word.end()
            continue
        try:
            value, end = reader.value(position, lists=lists)
        except Unreadable:
            skipped = _DIGITS.match(text, position) or word or _SIGNS.match(text, position)
            position = skipped.end() if skipped else position + 1
            continue
        position = max(end, position + 1)
        if _CONTINUED.match(text, end):  # a time of day, a version
            digits = _DIGITS.match(text, end)
            position = digits.end() if digits else position
            continue
        yield value


def _begins_value(text: str, position: int) -> bool:
    """Return whether the word at a position is a constant, a function or a variable in a formula."""
    word = _WORD.match(text, position)
    if not word:
        return False
    if word[0] in _VALUE_WORDS:
        return True
    return len(word[0]) == 1 and bool(_OPERATOR_AFTER.match(text, word.end()))
