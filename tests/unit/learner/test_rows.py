import numpy as np
import pytest
import torch
import transformers
from tests.unit.learner.batches import make_group

from poise.learner.rows import build_micro_batch, group_rows, micro_batches


@pytest.fixture(scope="module")
def llama(model):
    return transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa")


def rollouts():
    """Mixed lengths, three siblings, one alone, a prompt and a response of a single token."""
    random = np.random.default_rng(0)
    return [
        *make_group(random, "a", 5, (7, 3, 9)),
        *make_group(random, "b", 1, (4, 6)),
        *make_group(random, "c", 8, (5,)),
        *make_group(random, "d", 3, (1, 12)),
    ]


def naive_logprobs(llama, rollout):
    """Its own forward pass over prompt and response."""
    tokens = torch.tensor([[*rollout.prompt_token_ids, *rollout.token_ids]])
    logprobs = torch.log_softmax(llama(tokens).logits[0, rollout.prompt_token_ids.size - 1 : -1], -1)
    return logprobs.gather(-1, tokens[0, rollout.prompt_token_ids.size :, None])[:, 0]


def shared_logprobs(llama, batch):
    states = llama.get_decoder()(
        input_ids=batch.token_ids_BL,
        attention_mask=batch.mask_B1LL,
        position_ids=batch.positions_BL,
        use_cache=False,
    ).last_hidden_state
    logits = llama.get_output_embeddings()(states.flatten(0, 1)[batch.predictors_N])
    return torch.log_softmax(logits, -1).gather(-1, batch.targets_N[:, None])[:, 0]


def test_siblings_in_one_row_get_the_logprobs_of_rows_of_their_own(llama):
    rows = group_rows(rollouts())
    batch = build_micro_batch(rows, "cpu")
    assert batch.token_ids_BL.shape == (4, 24)  # a's prompt of 5 and responses of 7, 3 and 9
    with torch.no_grad():
        got = shared_logprobs(llama, batch)
        wanted = torch.cat([naive_logprobs(llama, rollout) for rollout in rollouts()])
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)


def test_siblings_in_one_row_give_the_gradient_of_rows_of_their_own(llama):
    batch = build_micro_batch(group_rows(rollouts()), "cpu")
    parameters = list(llama.parameters())
    got = torch.autograd.grad((shared_logprobs(llama, batch) * batch.advantages_N).mean(), parameters)
    loss = sum((naive_logprobs(llama, rollout) * rollout.advantage).sum() for rollout in rollouts())
    wanted = torch.autograd.grad(loss / batch.num_targets, parameters)
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
    assert max(float(theirs.abs().max()) for theirs in wanted) > 0.01


def test_targets_logprobs_and_advantages_lie_side_by_side():
    batch = build_micro_batch(group_rows(rollouts()), "cpu")
    assert batch.num_targets == sum(rollout.token_ids.size for rollout in rollouts())
    wanted = [
        (int(token), float(logprob), np.float32(rollout.advantage))
        for rollout in rollouts()
        for token, logprob in zip(rollout.token_ids, rollout.logprobs, strict=True)
    ]
    got = zip(
        batch.targets_N.tolist(), batch.rollout_logprobs_N.tolist(), map(np.float32, batch.advantages_N), strict=True
    )
    assert list(got) == wanted


def test_siblings_are_gathered_in_order_of_first_appearance():
    mixed = rollouts()
    mixed = [*mixed[::2], *mixed[1::2]]
    rows = group_rows(mixed)
    assert [row.rollouts[0].id.group_id for row in rows] == ["a", "b", "d", "c"]
    assert [[rollout.id.rollout_index for rollout in row.rollouts] for row in rows] == [[0, 2, 1], [1, 0], [0, 1], [0]]


def test_a_group_id_that_comes_again_with_another_prompt_makes_a_row_of_its_own():
    random = np.random.default_rng(0)
    first, other = (make_group(random, "a", 4, (2, 2)) for _ in range(2))
    assert [len(row.rollouts) for row in group_rows([*first, *other])] == [2, 2]
    later = make_group(np.random.default_rng(0), "a", 4, (2,), step=1)  # the same prompt, at another step
    assert [len(row.rollouts) for row in group_rows([*first, *later])] == [2, 1]


@pytest.mark.parametrize(("max_tokens", "wanted"), [(1, 4), (40, 3), (48, 2), (10**6, 1)])
def test_micro_batches_hold_every_row_once_within_their_limit(max_tokens, wanted):
    rows = group_rows(rollouts())
    parts = list(micro_batches(rows, max_tokens))
    assert len(parts) == wanted
    assert sorted(id(row) for part in parts for row in part) == sorted(id(row) for row in rows)
    for part in parts:
        assert len(part) == 1 or len(part) * max(row.num_tokens for row in part) <= max_tokens
