"""Sampling one token from a distribution, with top-k and top-p.

Shapes: V vocabulary.
"""

from __future__ import annotations

import torch

from poise_client.types import Sampling


def sample_token(logprobs_V: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Return a token: the likeliest at temperature 0, else one drawn from the top k and the nucleus of mass top_p."""
    if sampling.temperature == 0:
        return int(logprobs_V.argmax())
    probabilities_V = logprobs_V.exp()
    if sampling.top_k or sampling.top_p < 1:
        ordered, order = probabilities_V.sort(descending=True)
        keep = torch.ones_like(ordered, dtype=torch.bool)
        if sampling.top_k:
            keep[sampling.top_k :] = False
        # Keep a token if the mass before it is below top_p. This always keeps the first.
        keep &= ordered.cumsum(0) - ordered < sampling.top_p
        probabilities_V = torch.zeros_like(probabilities_V).scatter(0, order, ordered * keep)
    return int(torch.multinomial(probabilities_V, 1, generator=generator))
