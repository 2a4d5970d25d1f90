"""The forward pass: from a packed row to the log-probabilities of its response tokens.

Architectures support different modes; `forward_check` selects one for a model.

Shapes: N response tokens of a packed row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from poise.learner.models.attention import PACKED
from poise.learner.models.backbone import predictor_states
from poise.learner.models.lm_head import head_logprobs
from poise.learner.training.logprobs import token_logprobs
from poise.learner.training.packing import PackedRow
from poise.runtime.models.decoder import decoder_of


@dataclass(frozen=True, slots=True)
class ForwardMode:
    """How the learner computes a model's log-probabilities."""

    attention: str
    """`attn_implementation` of transformers; `PACKED` computes siblings in one row."""
    own_head: bool
    """Compute logits with the model's own code; otherwise as W·h + b, in chunks, with a closed-form gradient."""

    @property
    def packed(self) -> bool:
        """Whether a prompt is computed once for all siblings."""
        return self.attention == PACKED

    def __str__(self) -> str:
        rows = "packed rows" if self.packed else f"one sequence at a time ({self.attention} attention)"
        head = "the model's own head" if self.own_head else "a linear head"
        return f"{rows} and {head}"


class PackedForward(torch.nn.Module):
    """Decoder and head as one module, which FSDP needs to gather parameters for the whole forward pass."""

    def __init__(self, model: Any, mode: ForwardMode, dtype: torch.dtype, chunk_tokens: int) -> None:
        super().__init__()
        self.model = model
        self.mode = mode
        self.dtype = dtype
        self._chunk_tokens = chunk_tokens

    def forward(self, row: PackedRow, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log-probabilities and entropies of a row's targets, [N] each."""
        states_Nd = predictor_states(decoder_of(self.model), row, self.dtype, packed=self.mode.packed)
        if self.mode.own_head:
            return head_logprobs(self.model, states_Nd, row.targets_N, temperature, self._chunk_tokens, self.dtype)
        head = self.model.get_output_embeddings()
        return token_logprobs(states_Nd, head, row.targets_N, temperature, self._chunk_tokens, self.dtype)
