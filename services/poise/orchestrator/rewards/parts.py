"""Find the part of a response that is its answer.

Contains the rules for thoughts, answer tags, boxes and `####`. Every search is linear in the length of the response.
"""

from __future__ import annotations

import re

_THINK = re.compile(r"<(/?)think\s*>", re.IGNORECASE)
_ANSWER_OPEN = re.compile(r"<answer\s*>", re.IGNORECASE)
_ANSWER_CLOSE = re.compile(r"</answer\s*>", re.IGNORECASE)
_CUT_CLOSE = re.compile(r"</?(?:a(?:n(?:s(?:w(?:er?)?)?)?)?)?\Z", re.IGNORECASE)
"""The start of `</answer>` at the end of a response that was cut there."""
_BOX = re.compile(r"\\f?boxed\s*(?=[{\w\\.+-])")


def final_part(response: str, *, in_thought: bool = False) -> str:
    """Return the answer of a response, without its thoughts.

    Thoughts are removed first: `<think>…</think>`, everything before a `</think>` without a start, and an unfinished
    `<think>…`. The answer is then inside the last `<answer>…</answer>`, or from the last `<answer>` to the end where
    the response was cut. Without such a tag, it is what follows the last thought; empty if that thought is unfinished.

    Args:
        response: the text of the response.
        in_thought: whether the prompt ends inside a thought, as some chat templates do.
    """
    spoken = outside_thoughts(response, in_thought=in_thought)
    for index in reversed(range(len(spoken))):
        starts = list(_ANSWER_OPEN.finditer(spoken[index]))
        if starts:
            said = "\n".join([spoken[index][starts[-1].end() :], *spoken[index + 1 :]])
            end = _ANSWER_CLOSE.search(said)
            return (said[: end.start()] if end else _CUT_CLOSE.sub("", said)).strip()
    return spoken[-1].strip()


def outside_thoughts(response: str, *, in_thought: bool = False) -> list[str]:
    """Return the stretches of a response outside its thoughts; the last is empty if the last thought is unfinished."""
    spoken: list[str] = []
    start = 0
    for tag in _THINK.finditer(response):
        if tag[1]:
            in_thought = False  # without a start, the prompt opened the thought
        else:
            if not in_thought:
                spoken.append(response[start : tag.start()])
            in_thought = True
        start = tag.end()
    return [*spoken, "" if in_thought else response[start:]]


def last_box(text: str) -> str | None:
    r"""Return what the last `\boxed{…}` contains, the innermost where boxes nest; None without a box.

    A box that is cut before its closing brace contains all that follows.
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
