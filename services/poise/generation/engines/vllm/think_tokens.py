"""Where `</think>` ends, found among token ids, step by step and without a text.

The worker pools the tokens before the last `</think>` while the response is still being sampled, when it holds token
ids on a GPU and no text. So the search for the tag is a table: how much of it has been matched so far, and the next
token, give how much is matched now. `algorithms.features.locate_spans` finds the same ends in the texts.

Shapes: S states (characters of the tag matched so far), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from poise.algorithms.features import THINK_CLOSE

NUM_STATES = len(THINK_CLOSE)
"""Between 0 and 7 characters matched; all 8 is an end, and begins anew."""

ENDED = NUM_STATES
"""Added to a table's entry when the tag ends within the token."""


def think_close_table(token_texts: Sequence[str]) -> NDArray[np.int8]:
    """Return [S, V]: the next state, plus `ENDED` where the tag ends within the token."""
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
            # "<" occurs in the tag once, at its start: nothing shorter can go on matching.
            state = int(character == THINK_CLOSE[0])
        if state == NUM_STATES:
            state, ended = 0, ENDED
    return state + ended
