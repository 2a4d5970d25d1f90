"""Selects the tokens of a rollout to pool, and summarizes token entropies (POISE paper, section 3).

Both engines use these rules. A response is passed as its token texts, so this module needs no tokenizer.

Shapes: T response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

POOL_TOKENS = 10
"""Default pooling window, in tokens, for prompts and responses."""

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"

REFERENCE_DEPTH = 0.53
"""Depth of the feature layer as a fraction of all layers. The reference implementation uses layer 19 of 36."""


def default_feature_layer(num_layers: int) -> int:
    """Return the 0-based decoder layer whose output is pooled by default."""
    return min(round(REFERENCE_DEPTH * num_layers), num_layers - 1)


@dataclass(frozen=True, slots=True)
class Span:
    """Response tokens [start, end); empty when start == end."""

    start: int
    end: int

    def __bool__(self) -> bool:
        return self.end > self.start


EMPTY = Span(0, 0)


@dataclass(frozen=True, slots=True)
class ResponseSpans:
    """The parts of a response with separate entropy statistics."""

    reasoning: Span
    """Inside <think>...</think>, without the tags; an unclosed tag extends to the end of the response."""
    answer: Span
    """Inside <answer>...</answer>, without the tags; without such tags, after the last </think>; else empty."""
    think_close_end: int | None
    """One past the token in which the last </think> ends; None if there is none."""


def locate_spans(token_texts: Sequence[str]) -> ResponseSpans:
    """Find the reasoning and answer spans of a response.

    Tags may be split over tokens, and a token may contain more than a tag. A token belongs to a span if any of its
    characters does.
    """
    text = "".join(token_texts)
    if "<" not in text:
        return ResponseSpans(EMPTY, EMPTY, None)
    ends = np.cumsum([len(piece) for piece in token_texts])

    def token_of(char: int) -> int:
        return int(np.searchsorted(ends, char, side="right"))

    def tokens(start_char: int, end_char: int) -> Span:
        if end_char <= start_char:
            return EMPTY
        return Span(token_of(start_char), token_of(end_char - 1) + 1)

    close = text.rfind(THINK_CLOSE)
    think_close_end = token_of(close + len(THINK_CLOSE) - 1) + 1 if close >= 0 else None

    reasoning = EMPTY
    opened = text.find(THINK_OPEN)
    if opened >= 0:
        reasoning = tokens(opened + len(THINK_OPEN), close if close > opened else len(text))
    elif close >= 0:
        reasoning = tokens(0, close)  # the chat template opened the tag in the prompt

    answer = EMPTY
    answer_open = text.rfind(ANSWER_OPEN)
    if answer_open >= 0:
        start = answer_open + len(ANSWER_OPEN)
        answer_close = text.find(ANSWER_CLOSE, start)
        answer = tokens(start, answer_close if answer_close >= 0 else len(text))
    elif close >= 0:
        answer = tokens(close + len(THINK_CLOSE), len(text))
    return ResponseSpans(reasoning, answer, think_close_end)


def prompt_window(num_prompt_tokens: int, pool_tokens: int) -> Span:
    """Return the prompt tokens averaged for `prompt_hidden`: the last `pool_tokens`."""
    return Span(max(0, num_prompt_tokens - pool_tokens), num_prompt_tokens)


def response_window(num_response_tokens: int, think_close_end: int | None, pool_tokens: int) -> Span:
    """Return the response tokens averaged for `response_hidden`: at most `pool_tokens`.

    The last sampled token never goes through the model, so only the first T − 1 of T tokens can be pooled. This is the
    only difference from a separate forward pass over the whole response.
    """
    end = max(0, num_response_tokens - 1)
    if think_close_end is not None:
        end = min(end, think_close_end)
    return Span(max(0, end - pool_tokens), end)


def entropy_stats(entropies_T: NDArray[np.float32], span: Span) -> tuple[float, float, float, float]:
    """Return (mean, last, max, min) in nats over `span`; zeros for an empty span."""
    entropies = entropies_T[span.start : span.end]
    if entropies.size == 0:
        return 0.0, 0.0, 0.0, 0.0
    return (
        float(entropies.mean(dtype=np.float64)),
        float(entropies[-1]),
        float(entropies.max()),
        float(entropies.min()),
    )
