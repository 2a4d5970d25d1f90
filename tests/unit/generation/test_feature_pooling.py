"""Features from hidden states and entropies."""

import numpy as np
import pytest

from poise.algorithms.features import POOL_TOKENS, Span
from poise.generation.feature_pooling import build_features, mean_or_zeros, pooled_response
from poise_client.types import EntropyStats


def test_last_tokens_that_went_through_the_model_are_pooled() -> None:
    window, spans = pooled_response(["a"] * 30, POOL_TOKENS)
    assert window == Span(29 - POOL_TOKENS, 29)  # the last sampled token never goes through the model
    assert not spans.reasoning


def test_window_ends_with_the_reasoning() -> None:
    texts = ["<think>", *["a"] * 15, "</th", "ink>", *["b"] * 30]
    window, spans = pooled_response(texts, POOL_TOKENS)
    assert window == Span(18 - POOL_TOKENS, 18)
    assert spans.reasoning == Span(1, 16)
    assert spans.answer == Span(18, 48)


def test_window_of_a_single_token_is_empty() -> None:
    window, _ = pooled_response(["a"], POOL_TOKENS)
    assert not window


def test_mean_is_over_the_window_only() -> None:
    states = np.arange(12, dtype=np.float32).reshape(4, 3)
    pooled = mean_or_zeros(states, Span(1, 3))
    assert pooled.dtype == np.float32
    np.testing.assert_array_equal(pooled, [4.5, 5.5, 6.5])


def test_mean_over_nothing_is_zeros() -> None:
    np.testing.assert_array_equal(mean_or_zeros(np.ones((4, 3), np.float32), Span(2, 2)), np.zeros(3))
    np.testing.assert_array_equal(mean_or_zeros(np.zeros((0, 3), np.float32), Span(0, 0)), np.zeros(3))


def test_mean_of_many_states_does_not_lose_precision() -> None:
    states = np.array([[2.0**24], [1.0], [1.0], [1.0]], np.float32)
    assert mean_or_zeros(states, Span(0, 4))[0] == np.float32((2**24 + 3) / 4)


def test_features_summarize_the_entropies_of_each_span() -> None:
    _, spans = pooled_response(["<think>", "a", "b", "</think>", "c", "d"], POOL_TOKENS)
    entropies = np.array([9.0, 1.0, 2.0, 9.0, 3.0, 0.5], np.float32)
    features = build_features(np.ones(2, np.float32), np.zeros(2, np.float32), entropies, spans)
    assert features.output_entropy == EntropyStats(pytest.approx(24.5 / 6), 0.5, 9.0, 0.5)
    assert features.reasoning_entropy == EntropyStats(1.5, 2.0, 2.0, 1.0)
    assert features.answer_entropy == EntropyStats(1.75, 0.5, 3.0, 0.5)
    np.testing.assert_array_equal(features.prompt_hidden, [1, 1])
    np.testing.assert_array_equal(features.response_hidden, [0, 0])


def test_empty_spans_are_zero() -> None:
    _, spans = pooled_response(["a", "b"], POOL_TOKENS)
    features = build_features(np.ones(2, np.float32), np.ones(2, np.float32), np.ones(2, np.float32), spans)
    assert features.reasoning_entropy == features.answer_entropy == EntropyStats()
