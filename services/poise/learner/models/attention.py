"""Attention for packed rollouts: a response attends to its prompt and to itself, and to nothing else in the row.

The row is split into spans of queries. A prompt and its first response attend causally; each further sibling's response
attends to that prompt and, causally, to itself. On GPUs, in half precision, one variable-length kernel computes all
spans; elsewhere torch's own attention computes one at a time. No mask or score spans the whole row. Sliding windows,
soft caps and attention sinks are applied as the model defines them. Neither kernel supports soft caps or sinks, so
these use plain matrix products span by span. Attention dropout is not applied.

Shapes: L tokens of the row, K keys of all spans one after the other, S spans, H heads of D.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import pad, scaled_dot_product_attention

PACKED = "poise_packed"
"""The `attn_implementation` name of this attention, after `register`."""


@dataclass(frozen=True, slots=True)
class Span:
    """Queries [start, end) attend to the keys [shared_start, shared_end), if any, and causally to their own."""

    start: int
    end: int
    shared_start: int = 0
    shared_end: int = 0

    @property
    def num_shared(self) -> int:
        """Number of shared keys."""
        return self.shared_end - self.shared_start

    @property
    def num_keys(self) -> int:
        """Number of keys, its own included."""
        return self.num_shared + self.end - self.start

    @property
    def num_attended(self) -> int:
        """Number of pairs of a query and a key it attends to."""
        num_queries = self.end - self.start
        return num_queries * (self.num_keys - num_queries) + num_queries * (num_queries + 1) // 2


@dataclass(frozen=True, slots=True)
class SpanMasks:
    """Spans for attention one span at a time."""

    spans: tuple[Span, ...]
    masks: tuple[torch.Tensor | None, ...]
    """[queries, keys], True where attention is allowed; None for a plain causal mask."""


@dataclass(frozen=True, slots=True)
class SpanIndex:
    """Spans for the variable-length kernel."""

    spans: tuple[Span, ...]
    keys_K: torch.Tensor
    """Positions of the keys in the row."""
    query_ends: torch.Tensor
    """Cumulative query counts, int32 [S + 1], from 0."""
    key_ends: torch.Tensor
    """Cumulative key counts, int32 [S + 1], from 0."""
    max_queries: int
    max_keys: int


Spans = SpanMasks | SpanIndex


def register() -> None:
    """Register `PACKED` with transformers. Decoders of models loaded with it take an `attention_spans` argument."""
    transformers.AttentionInterface.register(PACKED, packed_attention)


def build_spans(spans: Sequence[Span], device: torch.device, dtype: torch.dtype) -> Spans:
    """Prepare a row's spans, in order and without gaps, for models that compute in `dtype` on `device`."""
    if device.type == "cuda" and dtype != torch.float32:
        return build_index(spans, device)
    return SpanMasks(tuple(spans), tuple(_mask(span, device) for span in spans))


def build_index(spans: Sequence[Span], device: torch.device) -> SpanIndex:
    """Prepare spans for the variable-length kernel."""
    return SpanIndex(
        spans=tuple(spans),
        keys_K=torch.cat([keys_of(span) for span in spans]).to(device),
        query_ends=_ends([span.end - span.start for span in spans]).to(device),
        key_ends=_ends([span.num_keys for span in spans]).to(device),
        max_queries=max(span.end - span.start for span in spans),
        max_keys=max(span.num_keys for span in spans),
    )


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    attention_spans: Spans,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within spans: heads [1, H, L, D] in, [1, L, H, D] out, as transformers calls it.

    Args:
        module: the attention layer; unused.
        query: heads of the queries.
        key: heads of the keys; fewer with grouped-query attention.
        value: heads of the values.
        attention_mask: unused; the spans replace it.
        attention_spans: the row's spans.
        scaling: factor of the scores; None is 1 / √D.
        sliding_window: number of last tokens attended to, including the query's own; None for all.
        softcap: c of c·tanh(score / c).
        s_aux: scores of the attention sinks, [H].
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    is_plain = softcap is None and s_aux is None
    if is_plain and isinstance(attention_spans, SpanIndex):
        return _attend_varlen(query, key, value, scaling, sliding_window, attention_spans), None
    attend = (
        partial(scaled_dot_product_attention, scale=scaling, enable_gqa=True)
        if is_plain
        else partial(_attend_plainly, scaling=scaling, softcap=softcap, sinks_H=s_aux)
    )
    return _attend_by_span(query, key, value, sliding_window, attention_spans, attend), None


def _attend_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    sliding_window: int | None,
    spans: SpanIndex,
) -> torch.Tensor:
    # Autocast does not cover this kernel, and query and key norms return float32.
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    query_LHD, key_LHD, value_LHD = (tensor[0].transpose(0, 1).to(dtype) for tensor in (query, key, value))
    states_LHD = varlen_attn(
        query_LHD,
        key_LHD[spans.keys_K],
        value_LHD[spans.keys_K],
        spans.query_ends,
        spans.key_ends,
        spans.max_queries,
        spans.max_keys,
        scale=scaling,
        # Causal, aligned at the ends: shared keys come before the first query.
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=True,
    )
    assert isinstance(states_LHD, torch.Tensor)  # noqa: S101 (no auxiliary output is requested)
    return states_LHD[None]


def _attend_by_span(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sliding_window: int | None,
    spans: Spans,
    attend: Callable[..., torch.Tensor],
) -> torch.Tensor:
    parts = []
    for span, mask in zip(spans.spans, _masks(spans, sliding_window, query.device), strict=True):
        own, shared = slice(span.start, span.end), slice(span.shared_start, span.shared_end)
        keys, values = key[:, :, own], value[:, :, own]
        if span.num_shared:
            keys, values = torch.cat((key[:, :, shared], keys), 2), torch.cat((value[:, :, shared], values), 2)
        parts.append(attend(query[:, :, own], keys, values, attn_mask=mask, is_causal=mask is None))
    return torch.cat(parts, 2).transpose(1, 2).contiguous()  # some models take a view of it


def _attend_plainly(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    scaling: float,
    softcap: float | None,
    sinks_H: torch.Tensor | None,
) -> torch.Tensor:
    repeats = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(repeats, 1) for tensor in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attn_mask is None:
        attn_mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device)
    if is_causal:
        attn_mask = attn_mask.tril()
    scores = scores.masked_fill(~attn_mask, -torch.inf)
    if sinks_H is not None:
        scores = torch.cat((scores, sinks_H.to(scores.dtype).view(1, -1, 1, 1).expand(-1, -1, scores.shape[2], 1)), 3)
    weights = scores.softmax(-1, torch.float32).to(value.dtype)
    return weights[..., : key.shape[2]] @ value


def keys_of(span: Span) -> torch.Tensor:
    """Return the row positions of a span's keys, in order."""
    return torch.cat((torch.arange(span.shared_start, span.shared_end), torch.arange(span.start, span.end)))


def _masks(spans: Spans, sliding_window: int | None, device: torch.device) -> tuple[torch.Tensor | None, ...]:
    """Return each span's mask; without a sliding window, the row's prepared ones."""
    if sliding_window is None and isinstance(spans, SpanMasks):
        return spans.masks
    return tuple(_mask(span, device, sliding_window) for span in spans.spans)


def _mask(span: Span, device: torch.device, sliding_window: int | None = None) -> torch.Tensor | None:
    is_cut = sliding_window is not None and sliding_window < span.num_keys
    if not span.num_shared and not is_cut:
        return None
    mask = torch.ones(span.end - span.start, span.num_keys, dtype=torch.bool, device=device).tril(span.num_shared)
    return mask.triu(span.num_shared - sliding_window + 1) if is_cut and sliding_window is not None else mask


def _ends(lengths: Sequence[int]) -> torch.Tensor:
    return pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32)
