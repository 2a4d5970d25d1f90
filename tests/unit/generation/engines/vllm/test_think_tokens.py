from __future__ import annotations

import random

import pytest

from poise.algorithms.features import locate_spans
from poise.generation.engines.vllm.think_tokens import ENDED, NUM_STATES, think_close_table

PIECES = ["<", "/", "t", "h", "i", "n", "k", ">", "</", "</thi", "nk>", "think", ">\n", "</think>", "x</think>y<"]
PIECES += ["<think>", "</think></think>", "</thi</think>", "", " ", "th", "nk", "answer", "�", "/think", "</think>."]


def ends(table, tokens: list[int]) -> list[int]:
    """Return one past each token in which the tag ends, as the worker finds them."""
    state, found = 0, []
    for index, token in enumerate(tokens):
        moved = int(table[state, token])
        state = moved % NUM_STATES
        if moved >= ENDED:
            found.append(index + 1)
    return found


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["a", "</think>", "b"], [2]),
        (["</", "think", ">", "b"], [3]),
        (["</thi", "</thi", "nk>"], [3]),
        (["</thi", "x", "nk>"], []),
        (["</think></think>"], [1]),
        (["</think></", "think>"], [1, 2]),
        (["<<", "/think>"], [2]),
        (["</think"], []),
        ([], []),
    ],
)
def test_end_of_the_tag_is_found_for_any_tokenization(texts: list[str], expected: list[int]) -> None:
    assert ends(think_close_table(texts), list(range(len(texts)))) == expected


def test_last_end_is_that_of_the_texts() -> None:
    table = think_close_table(PIECES)
    rng = random.Random(0)
    num_with_tag = 0
    for _ in range(3000):
        tokens = rng.choices(range(len(PIECES)), k=rng.randint(0, 12))
        expected = locate_spans([PIECES[token] for token in tokens]).think_close_end
        found = ends(table, tokens)
        assert (found[-1] if found else None) == expected
        num_with_tag += expected is not None
    assert num_with_tag > 500
