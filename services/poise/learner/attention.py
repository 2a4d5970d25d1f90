"""Attention of packed rollouts: each sees its prompt and itself, and nothing else of the row.

The row is cut into spans of queries. A prompt and its first response attend causally; each further sibling's response
attends to that prompt and, causally, to itself. On GPUs, in half precision, all spans go through one kernel for
variable lengths; elsewhere each goes through torch's own attention. Nothing of the size of the row squared is made, and
no time is spent between strangers. Dropout of attention, which not every kernel has, is left out.

Shapes: L tokens of the row, K keys of all spans one after the other, S spans, H heads of D.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import pad, scaled_dot_product_attention

PACKED = "poise_packed"
"""Its name as `attn_implementation`, once registered."""


@dataclass(frozen=True, slots=True)
class Span:
    """Queries [start, end) look at keys [shared_start, shared_end), if any, and then, causally, at their own."""

    start: int
    end: int
    shared_start: int = 0
    shared_end: int = 0

    @property
    def num_keys(self) -> int:
        """Those looked at, its own included."""
        return self.shared_end - self.shared_start + self.end - self.start

    @property
    def num_attended(self) -> int:
        """Pairs of a query and a key that it sees."""
        num_queries = self.end - self.start
        return num_queries * (self.num_keys - num_queries) + num_queries * (num_queries + 1) // 2


@dataclass(frozen=True, slots=True)
class SpanMasks:
    """Spans one by one."""

    spans: tuple[Span, ...]
    masks: tuple[torch.Tensor | None, ...]
    """[queries, keys], True where one may be seen; None where that is plainly causal."""


@dataclass(frozen=True, slots=True)
class SpanIndex:
    """Spans as the kernel for variable lengths takes them."""

    keys_K: torch.Tensor
    """Where in the row the keys lie."""
    query_ends: torch.Tensor
    """int32 [S + 1], from 0."""
    key_ends: torch.Tensor
    """int32 [S + 1], from 0."""
    most_queries: int
    most_keys: int


Spans = SpanMasks | SpanIndex


def register() -> None:
    """Let transformers load models with `attn_implementation=PACKED`: their decoders then take `attention_spans`."""
    transformers.AttentionInterface.register(PACKED, packed_attention)


def build_spans(spans: Sequence[Span], device: torch.device, dtype: torch.dtype) -> Spans:
    """Prepare the spans of a row, in order and without gaps, for models that compute in `dtype` on `device`."""
    if device.type == "cuda" and dtype != torch.float32:
        return build_index(spans, device)
    return SpanMasks(tuple(spans), tuple(_mask(span, device) for span in spans))


def build_index(spans: Sequence[Span], device: torch.device) -> SpanIndex:
    """Tell the kernel for variable lengths which keys each span looks at."""
    return SpanIndex(
        keys_K=torch.cat([_keys(span) for span in spans]).to(device),
        query_ends=_ends([span.end - span.start for span in spans]).to(device),
        key_ends=_ends([span.num_keys for span in spans]).to(device),
        most_queries=max(span.end - span.start for span in spans),
        most_keys=max(span.num_keys for span in spans),
    )


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    attention_spans: Spans,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within spans: heads [1, H, L, D] in, [1, L, H, D] out, as transformers calls it."""
    if isinstance(attention_spans, SpanIndex):
        return _attend_at_once(query, key, value, scaling, attention_spans), None
    return _attend_by_span(query, key, value, scaling, attention_spans), None


def _attend_at_once(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, spans: SpanIndex
) -> torch.Tensor:
    # Autocast does not know this kernel, and norms of queries and keys give float32.
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    query_LHD, key_LHD, value_LHD = (tensor[0].transpose(0, 1).to(dtype) for tensor in (query, key, value))
    states_LHD = varlen_attn(
        query_LHD,
        key_LHD[spans.keys_K],
        value_LHD[spans.keys_K],
        spans.query_ends,
        spans.key_ends,
        spans.most_queries,
        spans.most_keys,
        scale=scaling,
        window_size=(-1, 0),  # causal and aligned at the ends: what is shared comes before the first query
        enable_gqa=True,
    )
    assert isinstance(states_LHD, torch.Tensor)  # noqa: S101 (no auxiliary output was asked for)
    return states_LHD[None]


def _attend_by_span(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, spans: SpanMasks
) -> torch.Tensor:
    parts = []
    for span, mask in zip(spans.spans, spans.masks, strict=True):
        own, shared = slice(span.start, span.end), slice(span.shared_start, span.shared_end)
        keys, values = key[:, :, own], value[:, :, own]
        if mask is not None:
            keys, values = torch.cat((key[:, :, shared], keys), 2), torch.cat((value[:, :, shared], values), 2)
        parts.append(
            scaled_dot_product_attention(
                query[:, :, own],
                keys,
                values,
                attn_mask=mask,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=True,
            )
        )
    return torch.cat(parts, 2).transpose(1, 2)


def _keys(span: Span) -> torch.Tensor:
    return torch.cat((torch.arange(span.shared_start, span.shared_end), torch.arange(span.start, span.end)))


def _mask(span: Span, device: torch.device) -> torch.Tensor | None:
    num_queries = span.end - span.start
    num_shared = span.num_keys - num_queries
    if not num_shared:
        return None
    return torch.ones(num_queries, span.num_keys, dtype=torch.bool, device=device).tril(num_shared)


def _ends(lengths: Sequence[int]) -> torch.Tensor:
    return pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32)
