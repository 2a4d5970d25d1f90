"""The forward pass of the `torch` engine: logits of the next token, with a KV cache if the model's cache is correct.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
import transformers

logger = logging.getLogger(__name__)

_NUM_PREFILLED, _NUM_TOKENS = 8, 20
"""Length of the sequence that tests the cache: tokens in its first forward pass, and in total."""
_MAX_NATS = {torch.float32: 2e-3}
_MAX_NATS_HALF = 0.5
"""Largest difference between log-probabilities with and without a cache, in float32 and in half precision."""


class TorchForward:
    """Computes the next token's logits. Tests the model's KV cache once, and runs without it if it is wrong."""

    def __init__(self, model: Any, name: str) -> None:
        self._model = model
        # Most models can compute the logits of the last token only.
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        self._uses_cache = True
        if problem := self._cache_problem():
            self._uses_cache = False
            logger.warning(
                "model %s (%s) runs without a KV cache, so sampling is slow: %s",
                name,
                type(model).__name__,
                problem,
            )

    def new_cache(self) -> transformers.Cache | None:
        """Return an empty KV cache; None if the model runs without one."""
        return transformers.DynamicCache(config=self._model.config) if self._uses_cache else None

    @torch.inference_mode()
    def __call__(self, tokens_1T: torch.Tensor, cache: transformers.Cache | None) -> torch.Tensor:
        """Return the logits after the last token, [V]. With a cache, earlier tokens come from it."""
        inputs = {"use_cache": False} if cache is None else {"past_key_values": cache, "use_cache": True}
        logits_V: torch.Tensor = self._model(tokens_1T, **inputs, **self._options).logits[0, -1]
        return logits_V

    def _cache_problem(self) -> str:
        """Return why the cache cannot be used; empty if it gives the logits of a full forward pass."""
        num_ids = self._model.config.get_text_config().vocab_size
        tokens_1T = torch.arange(_NUM_TOKENS, device=self._model.device)[None] * 7 % num_ids
        try:
            cache = self.new_cache()
            for end in range(_NUM_PREFILLED, _NUM_TOKENS + 1):
                start = 0 if end == _NUM_PREFILLED else end - 1
                cached_V, whole_V = self(tokens_1T[:, start:end], cache), self(tokens_1T[:, :end], None)
                difference = float((cached_V.float().log_softmax(-1) - whole_V.float().log_softmax(-1)).abs().max())
                allowed = _MAX_NATS.get(cached_V.dtype, _MAX_NATS_HALF)
                if not difference <= allowed:
                    return f"the cache changes log-probabilities by {difference:.2g} nats; allowed: {allowed:g}"
        except Exception as error:  # architectures raise many types
            return f"a forward pass with the cache fails: {type(error).__name__}: {error}"
        return ""
