"""A state machine that finds the ends of `</think>` in a stream of token ids.

During sampling, the worker pools the tokens before the last `</think>`. It then has token ids on a GPU, but no text. So
a table maps (characters matched so far, next token) to the characters matched afterwards.
`algorithms.features.locate_spans` finds the same ends in text.

Shapes: S states (characters of the tag matched so far), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from poise.algorithms.features import THINK_CLOSE

NUM_STATES = len(THINK_CLOSE)
"""0 to 7 matched characters. Matching all 8 ends the tag and returns to state 0."""

ENDED = NUM_STATES
"""Added to an entry if the tag ends within the token."""


def think_close_table(token_texts: Sequence[str]) -> NDArray[np.int8]:
    """Return the table, [S, V]: the next state, plus `ENDED` if the tag ends within the token."""
    table = np.zeros((NUM_STATES, len(token_texts)), np.int8)
    for token, text in enumerate(token_texts):
        for state in range(NUM_STATES):
            rest = THINK_CLOSE[state:]
            if "<" in text or (state and (rest.startswith(text) or text.startswith(rest))):
                table[state, token] = _advance(state, text)
    return table


def _advance(state: int, text: str) -> int:
    ended = 0
    for character in text:
        if character == THINK_CLOSE[state]:
            state += 1
        else:
            # "<" occurs only at the start of the tag, so no shorter match can continue.
            state = int(character == THINK_CLOSE[0])
        if state == NUM_STATES:
            state, ended = 0, ENDED
    return state + ended
