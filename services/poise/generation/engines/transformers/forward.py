"""The forward pass of the `torch` engine: the logits of the next token, from a cache where the model allows one.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
import transformers

logger = logging.getLogger(__name__)

_NUM_PREFILLED, _NUM_TRIED = 8, 20
"""Tokens of the sequence with which a cache is tested: in its first pass, and in all."""
_ALLOWED_NATS = {torch.float32: 2e-3}
_ALLOWED_NATS_HALF = 0.5


class TorchForward:
    """A model's logits of the next token."""

    def __init__(self, model: Any, name: str) -> None:
        self._model = model
        # Most models can leave out the logits of all tokens but the last.
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        self._caches = True
        if problem := self._cache_problem():
            self._caches = False
            logger.warning(
                "model %s (%s) runs without a cache of keys and values, which makes sampling slow: %s",
                name,
                type(model).__name__,
                problem,
            )

    def new_cache(self) -> transformers.Cache | None:
        """Return an empty cache of keys and values; None if the model runs without one."""
        return transformers.DynamicCache(config=self._model.config) if self._caches else None

    @torch.inference_mode()
    def __call__(self, tokens_1T: torch.Tensor, cache: transformers.Cache | None) -> torch.Tensor:
        """Return the logits after the last token, [V]; the tokens before these are in the cache, if there is one."""
        inputs = {"use_cache": False} if cache is None else {"past_key_values": cache, "use_cache": True}
        logits_V: torch.Tensor = self._model(tokens_1T, **inputs, **self._options).logits[0, -1]
        return logits_V

    def _cache_problem(self) -> str:
        """Return why logits from a cache cannot be used; empty if they equal those of whole sequences."""
        num_ids = self._model.config.get_text_config().vocab_size
        tokens_1T = torch.arange(_NUM_TRIED, device=self._model.device)[None] * 7 % num_ids
        try:
            cache = self.new_cache()
            for end in range(_NUM_PREFILLED, _NUM_TRIED + 1):
                start = 0 if end == _NUM_PREFILLED else end - 1
                cached_V, whole_V = self(tokens_1T[:, start:end], cache), self(tokens_1T[:, :end], None)
                difference = float((cached_V.float().log_softmax(-1) - whole_V.float().log_softmax(-1)).abs().max())
                if not difference <= _ALLOWED_NATS.get(cached_V.dtype, _ALLOWED_NATS_HALF):
                    return f"from a cache its log-probabilities differ by {difference:.2g} nats"
        except Exception as error:  # architectures fail in ways of their own
            return f"with a cache it fails: {type(error).__name__}: {error}"
        return ""
