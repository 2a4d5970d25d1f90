"""Computes the features of one rollout from hidden states and token entropies, as `algorithms.features` defines them.

Shapes: T response tokens, d the model's width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from poise.algorithms.features import ResponseSpans, Span, entropy_stats, locate_spans, response_window
from poise_client.types import EntropyStats, Features, Floats


def pooled_response(token_texts: Sequence[str], pool_tokens: int) -> tuple[Span, ResponseSpans]:
    """Return the response tokens that `response_hidden` averages, and the spans whose entropies are summarized."""
    spans = locate_spans(token_texts)
    return response_window(len(token_texts), spans.think_close_end, pool_tokens), spans


def build_features(
    prompt_hidden_d: Floats, response_hidden_d: Floats, entropies_T: Floats, spans: ResponseSpans
) -> Features:
    """Return the features from the two pooled states and the token entropies."""
    whole = Span(0, entropies_T.size)
    output, reasoning, answer = (
        EntropyStats(*entropy_stats(entropies_T, span)) for span in (whole, spans.reasoning, spans.answer)
    )
    return Features(prompt_hidden_d, response_hidden_d, output, reasoning, answer)


def mean_or_zeros(states_Td: Floats, window: Span) -> Floats:
    """Return the mean state over a window, [d]; zeros for an empty window."""
    if not window:
        return np.zeros(states_Td.shape[1], np.float32)
    pooled: Floats = states_Td[window.start : window.end].mean(axis=0, dtype=np.float64).astype(np.float32)
    return pooled
