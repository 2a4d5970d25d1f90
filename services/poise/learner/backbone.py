"""The model that training starts from, and its states of a packed row: common to policy, reference and critic.

Shapes: L tokens of the row, N response tokens of it, B sequences of up to T tokens, d the model's width.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from poise.errors import Unusable
from poise.learner import attention
from poise.learner.attention import Span, keys_of
from poise.learner.config import LearnerConfig
from poise.learner.packing import PackedRow
from poise.runtime.decoder import decoder_layers
from poise.runtime.generation_config import load_generation_config

logger = logging.getLogger(__name__)

_MAX_PADDING = 0.25
"""Share of padding among the tokens of sequences that are computed together."""


def load_model(config: LearnerConfig) -> Any:
    """Load the model that training starts from, in float32 and in evaluation mode. Raises `Unusable`."""
    attention.register()
    generation_config, repairs = load_generation_config(config.model, transformers.GenerationConfig)
    if repairs:
        logger.warning("%s", repairs)
    try:
        model, about = transformers.AutoModelForCausalLM.from_pretrained(
            config.model,
            dtype=torch.float32,
            output_loading_info=True,
            **({"generation_config": generation_config} if repairs else {}),
        )
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise Unusable(f"model {config.model} cannot be loaded: {error}") from error
    if missing := sorted(about["missing_keys"]):
        raise Unusable(
            f"model {config.model} ({type(model).__name__}) lacks {len(missing)} of its weights, such as {missing[0]}: "
            "they would start from random numbers",
            remedy="Take a complete causal language model.",
        )
    return model.eval()


def recompute_layers(model: Any) -> None:
    """Save only the inputs of the decoder's layers for the backward pass, which recomputes the rest.

    Raises:
        ValueError: the model has no list of layers.
    """
    for layer in decoder_layers(model):
        # The models' own switch works in training mode only, where dropout would be active too.
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)


def predictor_states(decoder: Any, row: PackedRow, dtype: torch.dtype, *, packed: bool) -> torch.Tensor:
    """Return the states before each response token of a row, [N, d]: those that predict it. Computed in `dtype`.

    Args:
        decoder: the model without its head.
        row: the row.
        dtype: element type of matrix products.
        packed: compute the row at once, which needs the attention of `poise.learner.attention`; else each sequence of
            it as a model computes it by itself.
    """
    with torch.autocast(row.token_ids_1L.device.type, dtype, enabled=dtype != torch.float32):
        states_Ld = _states_at_once(decoder, row) if packed else _states_by_sequence(decoder, row)
    return states_Ld.index_select(0, row.predictors_N)


def _states_at_once(decoder: Any, row: PackedRow) -> torch.Tensor:
    states_1Ld: torch.Tensor = decoder(
        input_ids=row.token_ids_1L,
        position_ids=row.positions_1L,
        attention_spans=row.spans,
        use_cache=False,
    ).last_hidden_state
    return states_1Ld[0]


def _states_by_sequence(decoder: Any, row: PackedRow) -> torch.Tensor:
    """Return the states in the order of the row: of what siblings share, those of the first of them."""
    spans = row.spans.spans
    parts: list[torch.Tensor | None] = [None] * len(spans)
    for indices in _of_similar_length(spans):
        sequences = [row.token_ids_1L[0, keys_of(spans[i]).to(row.token_ids_1L.device)] for i in indices]
        # A causal model's states do not depend on what follows, so padding on the right needs no mask.
        states_BTd = decoder(input_ids=pad_sequence(sequences, batch_first=True), use_cache=False).last_hidden_state
        for i, states_Td in zip(indices, states_BTd, strict=True):
            parts[i] = states_Td[spans[i].num_shared : spans[i].num_keys]
    return torch.cat([part for part in parts if part is not None])


def _of_similar_length(spans: Sequence[Span]) -> Iterator[list[int]]:
    """Yield indices of spans to compute together, so that little of it is padding."""
    batch: list[int] = []
    num_tokens = 0
    for index in sorted(range(len(spans)), key=lambda i: -spans[i].num_keys):
        longest = spans[batch[0]].num_keys if batch else 0
        num_tokens += spans[index].num_keys
        if batch and num_tokens < (1 - _MAX_PADDING) * longest * (len(batch) + 1):
            yield batch
            batch, num_tokens = [], spans[index].num_keys
        batch.append(index)
    if batch:
        yield batch
