"""Token statistics against double precision."""

from __future__ import annotations

import pytest
import torch

from poise.generation.engines.vllm.token_statistics import TokenStatistics, scaled_logits

TOLERANCE = 5e-5


def check(logits: torch.Tensor, scale: float = 1.0) -> None:
    logprobs = torch.log_softmax(logits.double() / scale, -1)
    probs = logprobs.exp()
    tokens = torch.multinomial(probs, 1, generator=torch.Generator().manual_seed(0))[:, 0].int()
    found = TokenStatistics(scaled_logits(logits, torch.full((len(logits),), scale), 1e-5))
    expected = logprobs.gather(1, tokens.long()[:, None])[:, 0]
    torch.testing.assert_close(found.logprobs(tokens).double(), expected, atol=TOLERANCE, rtol=1e-6)
    entropies = torch.special.entr(probs).sum(-1)
    torch.testing.assert_close(found.entropies().double(), entropies, atol=TOLERANCE, rtol=1e-6)
    squares = probs.square().sum(-1)
    torch.testing.assert_close(found.sum_squared_probs().double(), squares, atol=1e-7, rtol=TOLERANCE)


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("offset", [-60.0, 0.0, 60.0])
@pytest.mark.parametrize("spread", [0.0, 1.0, 8.0])
def test_statistics_are_exact(spread: float, offset: float, scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    check(offset + spread * torch.randn(7, 50000, generator=generator), scale)


def test_certain_tokens_have_no_entropy() -> None:
    logits = torch.zeros(1, 1000)
    logits[0, 3] = 200.0
    check(logits)


def test_impossible_tokens_do_not_matter() -> None:
    logits = torch.randn(3, 1000, generator=torch.Generator().manual_seed(2))
    logits[:, ::3] = -torch.inf
    check(logits)


def test_scaling_copies_the_logits() -> None:
    logits = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    scaled = scaled_logits(logits, torch.tensor([0.0, 0.5]), 1e-5)
    unscaled = scaled_logits(logits, None, 1e-5)
    assert scaled.tolist() == [[1.0, 2.0], [6.0, 8.0]]
    TokenStatistics(scaled)
    TokenStatistics(unscaled)
    assert logits.tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_half_precision_is_computed_in_float32() -> None:
    logits = torch.randn(3, 1000, generator=torch.Generator().manual_seed(3)).bfloat16()
    assert scaled_logits(logits, None, 1e-5).dtype == torch.float32
    check(logits)
