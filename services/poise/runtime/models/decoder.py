"""Find the decoder, layers and length limit of any transformers causal language model. Imports no torch."""

from __future__ import annotations

from typing import Any

_POSITION_LIMITS = ("max_position_embeddings", "max_seq_len", "seq_length", "keep_window_size")
"""Fields with a length limit. The last is of Doge; beyond it, attention selects keys of the whole sequence."""
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


def decoder_of(model: Any) -> Any:
    """Return the module that turns token ids into the hidden states for the head."""
    decoder = model.get_decoder()
    # Some models return themselves, or their head, which they call `decoder`.
    return model.model if decoder is model or decoder is model.get_output_embeddings() else decoder


def decoder_layers(model: Any) -> Any:
    """Return the decoder's layers, in order: a `torch.nn.ModuleList`.

    Raises:
        ValueError: the decoder has no list of layers.
    """
    lists = [child for child in decoder_of(model).children() if hasattr(child, "__len__")]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of decoder layers")
    return max(lists, key=len)


def position_limit(config: Any) -> int | None:
    """Return the maximum length of prompt and response that a model's config allows; None if it sets no limit.

    For rotary embeddings that change with the sequence length, it is the length at which they begin to change: beyond
    it, a token's log-probability would depend on later tokens.
    """
    text = config.get_text_config()
    limits = [getattr(text, name, None) for name in _POSITION_LIMITS]
    rope = getattr(text, "rope_parameters", None) or {}
    limits += [
        parameters.get("original_max_position_embeddings")
        for parameters in (
            rope,
            *(value for value in rope.values() if isinstance(value, dict)),
        )  # one for all layers, or one for each type
        if parameters.get("rope_type") in _LENGTH_DEPENDENT_ROPE
    ]
    return min((limit for limit in limits if isinstance(limit, int)), default=None)
