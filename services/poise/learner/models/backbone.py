"""Loads the model that training starts from, and computes its hidden states for a packed row.

Policy, reference and critic use it.

Shapes: L tokens of the row, N response tokens of it, B sequences of up to T tokens, d the model's width.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from poise.errors import Unusable
from poise.learner.config import LearnerConfig
from poise.learner.models import attention
from poise.learner.models.attention import keys_of
from poise.learner.training.packing import PackedRow
from poise.runtime.models.decoder import decoder_layers
from poise.runtime.models.generation_config import load_generation_config

logger = logging.getLogger(__name__)


def load_model(config: LearnerConfig) -> Any:
    """Load the model in float32 and evaluation mode. Raises `Unusable`."""
    attention.register()
    generation_config, repairs = load_generation_config(config.model, transformers.GenerationConfig)
    if repairs:
        logger.warning("%s", repairs)
    settings = load_config(config.model)
    try:
        model, about = transformers.AutoModelForCausalLM.from_pretrained(
            config.model,
            config=settings,
            dtype=torch.float32,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # rejected below, by name
            **({"generation_config": generation_config} if repairs else {}),
        )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # architectures raise errors of many kinds
        raise _unusable(config.model, error) from error
    named = f"model {config.model} ({type(model).__name__})"
    if missing := sorted(about["missing_keys"]):
        raise Unusable(
            f"{named} has no values for {len(missing)} of its weights, such as {missing[0]}",
            remedy="Use a complete causal language model: missing weights would start from random numbers.",
        )
    if mismatched := sorted(about["mismatched_keys"]):
        name, found, required = mismatched[0]
        raise Unusable(
            f"{named} has {len(mismatched)} weights whose shape differs from config.json, such as {name}: "
            f"{list(found)} instead of {list(required)}",
            remedy="Use the config.json that belongs to these weights.",
        )
    return model.eval()


def load_config(model: str) -> Any:
    """Load a model's config.json, without entries that change what `forward` returns or which kernels it uses.

    Raises:
        Unusable: transformers cannot load it.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(model, trust_remote_code=False)
        config._attn_implementation = None
        for part in (config, config.get_text_config()):
            part.return_dict, part.output_hidden_states, part.output_attentions = True, False, False
    except Exception as error:  # architectures raise errors of many kinds
        raise _unusable(model, error) from error
    return config


def _unusable(model: str, error: Exception) -> Unusable:
    if "trust_remote_code" in str(error):
        return Unusable(
            f"model {model} needs Python code from its own folder, which POISE never runs",
            remedy="Choose a model whose architecture is part of transformers.",
        )
    kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
    return Unusable(f"model {model} cannot be loaded: {kind}{' '.join(str(error).split())}")


def recompute_layers(model: Any) -> None:
    """Save only layer inputs; recompute activations in the backward pass.

    Raises:
        ValueError: the model has no list of layers.
    """
    for layer in decoder_layers(model):
        # The models' own switch needs training mode, which would also activate dropout.
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)


def predictor_states(decoder: Any, row: PackedRow, dtype: torch.dtype, *, packed: bool) -> torch.Tensor:
    """Return the hidden states that predict each response token of a row, [N, d], computed in `dtype`.

    Args:
        decoder: the model without its head.
        row: the row.
        dtype: element type of matrix products.
        packed: compute the row as one sequence, with the attention of `poise.learner.models.attention`; otherwise as a
            batch of padded sequences.
    """
    with torch.autocast(row.token_ids_1L.device.type, dtype, enabled=dtype != torch.float32):
        states_Ld = _packed_states(decoder, row) if packed else _padded_states(decoder, row)
    return states_Ld.index_select(0, row.predictors_N)


def _packed_states(decoder: Any, row: PackedRow) -> torch.Tensor:
    states_1Ld: torch.Tensor = decoder(
        input_ids=row.token_ids_1L,
        position_ids=row.positions_1L,
        attention_spans=row.spans,
        use_cache=False,
    ).last_hidden_state
    return states_1Ld[0]


def _padded_states(decoder: Any, row: PackedRow) -> torch.Tensor:
    """Return the states in the order of the row; a prompt's are those computed with its first sibling.

    The decoder runs once per row, because FSDP requires the same number of runs on every rank.
    """
    spans = row.spans.spans
    sequences = [row.token_ids_1L[0, keys_of(span).to(row.token_ids_1L.device)] for span in spans]
    # A causal model's states do not depend on later tokens, so padding on the right needs no mask.
    states_BTd = decoder(input_ids=pad_sequence(sequences, batch_first=True), use_cache=False).last_hidden_state
    own = [
        states_Td[span.num_shared : span.num_keys] for span, states_Td in zip(spans, states_BTd.unbind(), strict=True)
    ]
    return torch.cat(own)
