"""Pooling and entropy rules, on responses split into tokens in every way."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from poise.algorithms.features import (
    EMPTY,
    Span,
    default_feature_layer,
    entropy_stats,
    locate_spans,
    prompt_window,
    response_window,
)


@pytest.mark.parametrize(("num_layers", "layer"), [(36, 19), (30, 16), (5, 3), (1, 0)])
def test_default_layer_is_at_the_reference_depth(num_layers: int, layer: int) -> None:
    assert default_feature_layer(num_layers) == layer


def test_prompt_window_is_the_last_tokens() -> None:
    assert prompt_window(45, 10) == Span(35, 45)
    assert prompt_window(3, 10) == Span(0, 3)
    assert prompt_window(45, 3) == Span(42, 45)


def test_the_window_excludes_the_last_token() -> None:
    assert response_window(25, None, 10) == Span(14, 24)
    assert response_window(4, None, 10) == Span(0, 3)


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_an_empty_response_has_no_window(num_tokens: int) -> None:
    assert not response_window(num_tokens, None, 10)


def test_response_window_ends_with_the_closing_think_tag() -> None:
    assert response_window(100, 30, 10) == Span(20, 30)
    assert response_window(100, 30, 4) == Span(26, 30)


def test_the_window_excludes_a_last_closing_tag() -> None:
    assert response_window(30, 30, 10) == Span(19, 29)


def test_spans_of_a_reasoned_answer() -> None:
    pieces = ["<think>", "a", "b", "</think>", " so ", "<answer>", "7", "</answer>", "<end>"]
    spans = locate_spans(pieces)
    assert spans.reasoning == Span(1, 3)
    assert spans.answer == Span(6, 7)
    assert spans.think_close_end == 4


def test_the_answer_follows_the_reasoning_without_a_tag() -> None:
    assert locate_spans(["<think>", "a", "</think>", "7", "!"]).answer == Span(3, 5)


def test_unclosed_reasoning_extends_to_the_end() -> None:
    spans = locate_spans(["<think>", "a", "b"])
    assert spans.reasoning == Span(1, 3)
    assert spans.answer == EMPTY
    assert spans.think_close_end is None


def test_reasoning_may_start_in_the_prompt() -> None:
    assert locate_spans(["a", "b", "</think>", "7"]).reasoning == Span(0, 2)


def test_the_last_closing_tag_counts() -> None:
    pieces = ["<think>", "a", "</think>", "b", "</think>", "c"]
    assert locate_spans(pieces).think_close_end == 5


def test_plain_text_has_no_spans() -> None:
    spans = locate_spans(["1 ", "< ", "2"])
    assert (spans.reasoning, spans.answer, spans.think_close_end) == (EMPTY, EMPTY, None)


@given(st.lists(st.integers(1, 60), max_size=12))
def test_tags_are_found_in_every_tokenization(cuts: list[int]) -> None:
    text = "<think>reasons</think> then <answer>42</answer>."
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
    spans = locate_spans(pieces)
    assert "reasons" in "".join(pieces[spans.reasoning.start : spans.reasoning.end])
    assert "42" in "".join(pieces[spans.answer.start : spans.answer.end])
    assert spans.think_close_end is not None
    assert "".join(pieces[: spans.think_close_end]).rfind("</think>") >= 0
    assert "</think>" not in "".join(pieces[: spans.think_close_end - 1])


def test_entropy_stats_over_a_span() -> None:
    entropies_T = np.array([9, 1, 4, 1, 9], np.float32)
    assert entropy_stats(entropies_T, Span(1, 4)) == (2.0, 1.0, 4.0, 1.0)


def test_entropy_stats_of_an_empty_span_are_zero() -> None:
    assert entropy_stats(np.ones(3, np.float32), EMPTY) == (0.0, 0.0, 0.0, 0.0)
