"""Log-probabilities of tokens from hidden states, without materializing the logits of all tokens.

Shapes: N tokens, d the model's width, V its vocabulary; C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear


def token_logprobs(
    states_Nd: torch.Tensor,
    head: torch.nn.Linear,
    targets_N: torch.Tensor,
    temperature: float,
    chunk_tokens: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each target's log-probability (with a gradient) and its distribution's entropy (without), float32.

    Computes the logits of `chunk_tokens` tokens at a time, and again in the backward pass. Matrix products use `dtype`,
    everything else float32.
    """
    logprobs_N, entropies_N = _TokenLogprobs.apply(
        states_Nd, head.weight, head.bias, targets_N, temperature, chunk_tokens, dtype
    )  # type: ignore[no-untyped-call]
    return logprobs_N, entropies_N


class _TokenLogprobs(torch.autograd.Function):
    """With p = softmax(z), z = (W h + b) / τ: ∂ log p_y / ∂(W h + b) = (1[y] − p) / τ."""

    @staticmethod
    def forward(
        ctx: Any,
        states_Nd: torch.Tensor,
        weight_Vd: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_N: torch.Tensor,
        temperature: float,
        chunk_tokens: int,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `token_logprobs`."""
        # Separate tensors: views of one would lose FSDP's hooks at the first in-place change.
        logprobs_N, entropies_N, normalizers_N = (
            states_Nd.new_empty(len(targets_N), dtype=torch.float32) for _ in range(3)
        )
        with torch.autocast(states_Nd.device.type, enabled=False):
            for chunk, logits_CV in _logits(states_Nd, weight_Vd, bias_V, temperature, chunk_tokens, dtype):
                normalizers_N[chunk] = torch.logsumexp(logits_CV, -1)
                logprobs_CV = logits_CV.sub_(normalizers_N[chunk, None])
                logprobs_N[chunk] = logprobs_CV.gather(-1, targets_N[chunk, None])[:, 0]
                entropies_N[chunk] = -logprobs_CV.exp().mul_(logprobs_CV).sum(-1)
        ctx.save_for_backward(states_Nd, weight_Vd, bias_V, targets_N, normalizers_N)
        ctx.settings = temperature, chunk_tokens, dtype
        ctx.mark_non_differentiable(entropies_N)
        return logprobs_N, entropies_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_N: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Recompute the chunks; accumulate the gradient of the weights in place."""
        states_Nd, weight_Vd, bias_V, targets_N, normalizers_N = ctx.saved_tensors
        temperature, chunk_tokens, dtype = ctx.settings
        needs_states, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        of_states_Nd = torch.empty_like(states_Nd) if needs_states else None
        of_weight_Vd = torch.zeros_like(weight_Vd) if needs_weight else None
        of_bias_V = torch.zeros_like(bias_V) if needs_bias else None
        gradient_N = gradient_N / temperature
        with torch.autocast(states_Nd.device.type, enabled=False):
            weight_cast_Vd = weight_Vd.to(dtype)
            for chunk, logits_CV in _logits(states_Nd, weight_Vd, bias_V, temperature, chunk_tokens, dtype):
                of_logits_CV = logits_CV.sub_(normalizers_N[chunk, None]).exp_().mul_(-gradient_N[chunk, None])
                of_logits_CV.scatter_add_(-1, targets_N[chunk, None], gradient_N[chunk, None])
                if of_bias_V is not None:
                    of_bias_V += of_logits_CV.sum(0)
                of_logits_CV = of_logits_CV.to(dtype)
                if of_states_Nd is not None:
                    of_states_Nd[chunk] = (of_logits_CV @ weight_cast_Vd).to(of_states_Nd.dtype)
                if of_weight_Vd is not None:
                    _add_product(of_weight_Vd, of_logits_CV.T, states_Nd[chunk].to(dtype))
        return of_states_Nd, of_weight_Vd, of_bias_V, None, None, None, None


def _logits(
    states_Nd: torch.Tensor,
    weight_Vd: torch.Tensor,
    bias_V: torch.Tensor | None,
    temperature: float,
    chunk_tokens: int,
    dtype: torch.dtype,
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield float32 logits after temperature, chunk by chunk. Callers may overwrite them."""
    weight_Vd, bias_V = weight_Vd.to(dtype), None if bias_V is None else bias_V.to(dtype)
    for start in range(0, len(states_Nd), chunk_tokens):
        chunk = slice(start, start + chunk_tokens)
        yield chunk, linear(states_Nd[chunk].to(dtype), weight_Vd, bias_V).float().div_(temperature)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
