"""Parts of a transformers causal language model, whatever its architecture calls them. Imports no torch."""

from __future__ import annotations

from typing import Any

_POSITION_LIMITS = ("max_position_embeddings", "max_seq_len", "seq_length", "keep_window_size")
"""The last is Doge's: beyond it, a token sees the keys that rank highest among those of the whole sequence."""
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


def decoder_of(model: Any) -> Any:
    """Return the module that turns token ids into the states that the head reads."""
    decoder = model.get_decoder()
    # Some models return themselves, or a head that they call `decoder`.
    return model.model if decoder is model or decoder is model.get_output_embeddings() else decoder


def decoder_layers(model: Any) -> Any:
    """Return the decoder's layers, in order: a `torch.nn.ModuleList`.

    Raises:
        ValueError: it has none.
    """
    lists = [child for child in decoder_of(model).children() if hasattr(child, "__len__")]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of decoder layers")
    return max(lists, key=len)


def position_limit(config: Any) -> int | None:
    """Return the most tokens of prompt and response together that a model's config allows; None where it sets no limit.

    Rotary embeddings that change with the length of a sequence end where they begin to change: beyond, a token's
    log-probability would depend on the tokens after it.
    """
    text = config.get_text_config()
    limits = [getattr(text, name, None) for name in _POSITION_LIMITS]
    rope = getattr(text, "rope_parameters", None) or {}
    limits += [
        parameters.get("original_max_position_embeddings")
        for parameters in (rope, *(value for value in rope.values() if isinstance(value, dict)))  # one, or one a kind
        if parameters.get("rope_type") in _LENGTH_DEPENDENT_ROPE
    ]
    return min((limit for limit in limits if isinstance(limit, int)), default=None)
