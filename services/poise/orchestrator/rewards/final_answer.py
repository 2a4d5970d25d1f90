"""Finds the final answer of a response: removes thoughts, and reads answer tags, boxes and `####`.

Every search is linear in the length of the response.
"""

from __future__ import annotations

import re

_THINK = re.compile(r"<(/?)think\s*>", re.IGNORECASE)
_ANSWER_OPEN = re.compile(r"<answer\s*>", re.IGNORECASE)
_ANSWER_CLOSE = re.compile(r"</answer\s*>", re.IGNORECASE)
_CUT_CLOSE = re.compile(r"</?(?:a(?:n(?:s(?:w(?:er?)?)?)?)?)?\Z", re.IGNORECASE)
"""The start of `</answer>` at the end of a truncated response."""
_BOX = re.compile(r"\\f?boxed\s*(?=[{\w\\.+-])")


def final_answer(response: str, *, in_thought: bool = False) -> str:
    """Return the final answer of a response.

    Thoughts are removed first: `<think>…</think>`, everything before an unopened `</think>`, and an unclosed
    `<think>…`. The final answer is then inside the last `<answer>…</answer>`; an unclosed tag extends to the end.
    Without a tag, it is the text after the last thought, or empty if that thought is unclosed.

    Args:
        response: the text of the response.
        in_thought: whether the prompt ends inside a thought, as with some chat templates.
    """
    parts = outside_thoughts(response, in_thought=in_thought)
    for index in reversed(range(len(parts))):
        starts = list(_ANSWER_OPEN.finditer(parts[index]))
        if starts:
            answer = "\n".join([parts[index][starts[-1].end() :], *parts[index + 1 :]])
            end = _ANSWER_CLOSE.search(answer)
            return (answer[: end.start()] if end else _CUT_CLOSE.sub("", answer)).strip()
    return parts[-1].strip()


def outside_thoughts(response: str, *, in_thought: bool = False) -> list[str]:
    """Return the parts of a response outside its thoughts; the last one is empty if the last thought is unclosed."""
    parts: list[str] = []
    start = 0
    for tag in _THINK.finditer(response):
        if tag[1]:
            in_thought = False  # without a start tag, the thought began in the prompt
        else:
            if not in_thought:
                parts.append(response[start : tag.start()])
            in_thought = True
        start = tag.end()
    return [*parts, "" if in_thought else response[start:]]


def last_box(text: str) -> str | None:
    r"""Return the content of the last `\boxed{…}`, the innermost of nested boxes; None without a box.

    An unclosed box extends to the end of the text.
    """
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    start = boxes[-1].end()
    if not text.startswith("{", start):
        word = re.compile(r"\\?[+-]?[\w.]+").match(text, start)
        return word[0] if word else ""
    depth = 0
    for brace in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start + 1 : brace.start()]
    return text[start + 1 :]


def after_hashes(text: str) -> str | None:
    """Return the rest of the line after the last `####`; None without one."""
    _, mark, rest = text.rpartition("####")
    return rest.strip().partition("\n")[0].strip() if mark else None
