"""Rewrites numbers and formulas into one plain notation: Unicode digits, signs and spaces to ASCII, LaTeX commands to
operators.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

SET_OPEN, SET_CLOSE = "⦃", "⦄"
DOLLAR = "＄"
"""A dollar sign that is a currency, not a LaTeX delimiter."""

_CHARACTERS = {
    **dict.fromkeys("−‐‑‒﹣－", "-"),
    **dict.fromkeys("×✕✖⨯∗·⋅∙•＊", "*"),
    **dict.fromkeys("÷∕⁄", "/"),
    **dict.fromkeys("≈≃≅≒≡", "="),
    **dict.fromkeys("‘’′ʼ＇", "'"),
    "—": ";",
    "―": ";",
    "٪": "%",
    "٫": ".",
    "٬": ",",
    "∛": "cbrt",
    "º": "°",
    "˚": "°",
    "µ": "μ",
    "＄": DOLLAR,
}
SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾]+")
_DASH_AS_RANGE = re.compile(r"(?<=\d)\s*–\s*(?=\d)")
_TIMES = re.compile(r"((?<![\d.,])0)?(?<=\d)(\s*)[xX](\s*)(?=[\d(])")
_SIGN_WORD = re.compile(r"\b(?:minus|negative)\s+(?=[\d.√π∞(\\]|sqrt|pi\b|infinity\b)", re.IGNORECASE)
_BOLD = re.compile(r"(?<![\w)\]}*])(\*\*?|__?)(?=[^\s*_])([^*_\n]{1,80})\1(?![\w(*])")

_COMMANDS = (
    (re.compile(r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits)(?![A-Za-z])\.?"), ""),
    (re.compile(r"\\!\s*|\\phantom\{[^{}]*\}|\\label\{[^{}]*\}"), ""),
    (re.compile(r"\{\s*([,'])\s*\}"), r"\1"),
    (re.compile(r"\\[{]|\\lbrace(?![A-Za-z])"), SET_OPEN),
    (re.compile(r"\\[}]|\\rbrace(?![A-Za-z])"), SET_CLOSE),
    (re.compile(r"(?:\{\})?\^\s*(?:\\circ|\{\s*\\circ\s*\})(?![A-Za-z])|\\degree(?![A-Za-z])"), "°"),
    (re.compile(r"\^\s*(?:\\prime|\{\s*\\prime\s*\})"), "'"),
    (re.compile(r"\\[,;:> ~]|~|\\q?quad(?![A-Za-z])|\\[()\[\]]|\\\\|&"), " "),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"\\\$|\\textdollar(?![A-Za-z])"), DOLLAR),
    (re.compile(r"\\_"), "_"),
    (re.compile(r"\\(?:emptyset|varnothing)(?![A-Za-z])"), "∅"),
    (re.compile(r"\\in(?![A-Za-z])"), "∈"),
    (re.compile(r"\bper cent\b"), "%"),
    (re.compile(r"(?:\bdegrees?\s+|(?<=\d)°\s+)(?:(C)(?:elsius)?|(F)(?:ahrenheit)?)\b"), r"°\1\2"),
    (re.compile(r"\\(?:cdot|times|ast)(?![A-Za-z])"), "*"),
    (re.compile(r"\\(?:div)(?![A-Za-z])"), "/"),
    (re.compile(r"\\(?:approx|simeq|cong|equiv|doteq)(?![A-Za-z])"), "="),
    (re.compile(r"\\pi(?![A-Za-z])"), "π"),
    (re.compile(r"\\infty(?![A-Za-z])"), "∞"),
    (re.compile(r"\\pm(?![A-Za-z])"), "±"),
    (re.compile(r"\\cup(?![A-Za-z])"), "∪"),
    (re.compile(r"\\(?:leq?|leqslant)(?![A-Za-z])"), "≤"),
    (re.compile(r"\\(?:geq?|geqslant)(?![A-Za-z])"), "≥"),
    (re.compile(r"\\lt(?![A-Za-z])"), "<"),
    (re.compile(r"\\gt(?![A-Za-z])"), ">"),
    (re.compile(r"\\neq?(?![A-Za-z])"), "≠"),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\lvert(?![A-Za-z])|\\rvert(?![A-Za-z])|\\[mM]id(?![A-Za-z])"), "|"),
    (
        re.compile(
            r"\\(?:text|mathrm|mathbf|textbf|textit|mathit|mbox|operatorname|rm|bf|boldsymbol)\*?\s*\{([^{}]*)\}"
        ),
        r" \1 ",
    ),
    (
        re.compile(
            r"\\(?=(?:sqrt|sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|sinh|cosh|tanh|ln|log|exp|min|max)(?![a-z]))"
        ),
        "",
    ),
)


def plain_text(text: str) -> str:
    """Return `text` in plain notation: ASCII digits and signs, LaTeX commands as operators, no markup."""
    text = _DASH_AS_RANGE.sub(" to ", text).replace("–", "-")
    text = SUPERSCRIPT.sub(lambda match: f"^({unicodedata.normalize('NFKC', match[0])})", text)
    text = "".join(character if character < "\x80" else _plain_character(character) for character in text)
    for pattern, plain in _COMMANDS:
        text = pattern.sub(plain, text)
    text = _dollars(text).replace("`", " ")
    text = _BOLD.sub(r" \2 ", text)
    text = _SIGN_WORD.sub("-", text)
    return _TIMES.sub(lambda match: match[0] if match[1] and not match[2] else f"{match[1] or ''}*", text)


@lru_cache(maxsize=4096)
def _plain_character(character: str) -> str:
    if character in _CHARACTERS:
        return _CHARACTERS[character]
    category = unicodedata.category(character)
    if category == "Nd":
        return str(unicodedata.decimal(character))
    if category == "Zs":
        return " "
    if category == "Cf":
        return ""
    if unicodedata.decomposition(character).startswith("<fraction>"):
        return " " + unicodedata.normalize("NFKC", character).replace("⁄", "/")
    simple = unicodedata.normalize("NFKC", character)
    if simple == character:
        return character
    return "".join(one if one < "\x80" else _plain_character(one) for one in simple)


def _dollars(text: str) -> str:
    """Return `text` without LaTeX delimiters. An unpaired dollar sign before a number is a currency."""
    if text.count("$") % 2 == 0:
        return text.replace("$", " ")
    return re.sub(r"\$(?=\s*[\d.-])", DOLLAR, text, count=1).replace("$", " ")
