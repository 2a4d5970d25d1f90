"""Log-probabilities from a decoder's states by the model's own head, including scaled, capped or masked logits.

`logprobs.token_logprobs` is faster for models whose logits are W·h + b. This module runs the model's own `forward` with
the decoder replaced by one that returns given states, which works for all other models.

Shapes: N tokens, d the model's width, V its vocabulary; C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from poise.runtime.models.decoder import decoder_of


def head_logprobs(
    model: Any,
    states_Nd: torch.Tensor,
    targets_N: torch.Tensor,
    temperature: float,
    chunk_tokens: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each target's log-probability (with a gradient) and its distribution's entropy (without), float32.

    Computes the logits of `chunk_tokens` tokens at a time, and again in the backward pass.
    """

    def of_chunk(states_Cd: torch.Tensor, targets_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with (
            torch.autocast(states_Cd.device.type, dtype, enabled=dtype != torch.float32),
            _decoder_returning(model, states_Cd[None]),
        ):
            logits_CV = model(input_ids=targets_C[None], use_cache=False).logits[0]
        logprobs_CV = (logits_CV.float() / temperature).log_softmax(-1)
        with torch.no_grad():
            entropies_C = torch.special.entr(logprobs_CV.exp()).sum(-1)
        return logprobs_CV.gather(-1, targets_C[:, None])[:, 0], entropies_C

    slices = [slice(start, start + chunk_tokens) for start in range(0, len(states_Nd), chunk_tokens)]
    chunks = [checkpoint(of_chunk, states_Nd[chunk], targets_N[chunk], use_reentrant=False) for chunk in slices]
    logprobs, entropies = zip(*chunks, strict=True)
    return torch.cat(logprobs), torch.cat(entropies).detach()


class _Output(tuple[torch.Tensor]):
    """A decoder's output, as heads read it: the states first, and None for any other attribute."""

    __slots__ = ()

    @property
    def last_hidden_state(self) -> torch.Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@contextmanager
def _decoder_returning(model: Any, states_1Cd: torch.Tensor) -> Iterator[None]:
    """Make the model's decoder return these states for any input."""
    decoder = decoder_of(model)
    decoder.forward = lambda *_, **__: _Output((states_1Cd,))
    try:
        yield
    finally:
        del decoder.forward
