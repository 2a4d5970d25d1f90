import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from poise.learner.training.logprobs import token_logprobs

TEMPERATURE = 0.7


def make_head(*, bias: bool, dtype: torch.dtype = torch.float64) -> tuple[torch.nn.Linear, torch.Tensor, torch.Tensor]:
    """A head of 50 tokens, 17 hidden states and their targets."""
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50, bias=bias, dtype=dtype)
    return head, torch.randn(17, 8, dtype=dtype, requires_grad=True), torch.randint(50, (17,))


def whole(head, states, targets):
    """Compute log-probabilities and entropies from all logits at once."""
    logprobs = torch.log_softmax(head(states) / TEMPERATURE, -1)
    return logprobs.gather(-1, targets[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


@pytest.mark.parametrize("chunk_tokens", [1, 5, 17, 100])
@pytest.mark.parametrize("bias", [True, False])
def test_chunks_give_the_same_values_and_gradients(bias, chunk_tokens):
    head, states, targets = make_head(bias=bias, dtype=torch.float32)
    weights = torch.randn(17)
    inputs = [states, *head.parameters()]
    wanted, wanted_entropies = whole(head, states, targets)
    wanted_gradients = torch.autograd.grad((wanted * weights).sum(), inputs)
    got, entropies = token_logprobs(states, head, targets, TEMPERATURE, chunk_tokens, torch.float32)
    gradients = torch.autograd.grad((got * weights).sum(), inputs)
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(entropies, wanted_entropies, atol=1e-6, rtol=1e-6)
    for mine, theirs in zip(gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)
    assert not entropies.requires_grad


def test_a_frozen_head_passes_the_gradient_on():
    head, states, targets = make_head(bias=True, dtype=torch.float32)
    head.requires_grad_(False)
    logprobs, _ = token_logprobs(states, head, targets, TEMPERATURE, 4, torch.float32)
    (wanted,) = torch.autograd.grad(whole(head, states, targets)[0].sum(), [states])
    torch.testing.assert_close(torch.autograd.grad(logprobs.sum(), [states])[0], wanted, atol=1e-6, rtol=1e-5)


def test_bfloat16_rounds_products_but_not_chunk_sums():
    head, states, targets = make_head(bias=False, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got, entropies = token_logprobs(states, head, targets, TEMPERATURE, 4, torch.bfloat16)
    assert got.dtype == entropies.dtype == torch.float32
    wanted, _ = whole(head, states, targets)
    assert 1e-6 < float((got - wanted).detach().abs().max()) < 0.05
    gradients = torch.autograd.grad(got.sum(), [states, head.weight])
    for mine, theirs in zip(gradients, torch.autograd.grad(wanted.sum(), [states, head.weight]), strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, theirs, atol=0.1, rtol=0.05)


class Largest(TorchDispatchMode):
    """Records the largest tensor that is created, also in the backward pass."""

    num_elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple) else (made,):
            if isinstance(tensor, torch.Tensor):
                self.num_elements = max(self.num_elements, tensor.numel())
        return made


@pytest.mark.parametrize("chunk_tokens", [7, 64])
def test_only_the_logits_of_one_chunk_are_in_memory(chunk_tokens):
    vocabulary, num_tokens = 1000, 200
    head, states = torch.nn.Linear(4, vocabulary), torch.randn(num_tokens, 4, requires_grad=True)
    with Largest() as largest:
        logprobs, _ = token_logprobs(
            states, head, torch.zeros(num_tokens, dtype=torch.int64), 1.0, chunk_tokens, torch.float32
        )
        logprobs.sum().backward()
    assert largest.num_elements == chunk_tokens * vocabulary
