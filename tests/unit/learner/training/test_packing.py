import numpy as np
import pytest
import torch
import transformers
from tests.unit.learner.batches import VOCABULARY, make_group

from poise.learner.models import attention
from poise.learner.models.attention import PACKED, Span, SpanMasks, build_index, build_spans
from poise.learner.training.packing import build_row, group_by_prompt, pack, pack_padded

CPU = torch.device("cpu")


def make_model(kind: str, *, tied: bool) -> torch.nn.Module:
    """A random model whose heads share keys."""
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "tie_word_embeddings": tied,
        "initializer_range": 0.15,
    }
    config = getattr(transformers, f"{kind}Config")(**settings)
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def packed(model):
    attention.register()
    model.set_attn_implementation(PACKED)
    return model


def rollouts():
    """Mixed lengths, three siblings, one alone, a prompt and a response of a single token."""
    random = np.random.default_rng(0)
    return [
        *make_group(random, "a", 5, (7, 3, 9)),
        *make_group(random, "b", 1, (4, 6)),
        *make_group(random, "c", 8, (5,)),
        *make_group(random, "d", 3, (1, 12)),
    ]


def naive_logprobs(model, rollout):
    """Its own forward pass over prompt and response."""
    tokens = torch.tensor([[*rollout.prompt_token_ids, *rollout.token_ids]])
    logprobs = torch.log_softmax(model(tokens).logits[0, rollout.prompt_token_ids.size - 1 : -1], -1)
    return logprobs.gather(-1, tokens[0, rollout.prompt_token_ids.size :, None])[:, 0]


def packed_logprobs(model, row):
    states = model.get_decoder()(
        input_ids=row.token_ids_1L, position_ids=row.positions_1L, attention_spans=row.spans, use_cache=False
    ).last_hidden_state
    logits = model.get_output_embeddings()(states[0, row.predictors_N])
    return torch.log_softmax(logits, -1).gather(-1, row.targets_N[:, None])[:, 0]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3", "Mistral"])
def test_a_packed_row_equals_rollouts_computed_separately(kind, tied):
    model = make_model(kind, tied=tied)
    parameters = list(model.parameters())
    alone = torch.cat([naive_logprobs(model, rollout) for rollout in rollouts()])
    row = build_row(group_by_prompt(rollouts()), CPU, torch.float32)
    assert row.num_tokens == 5 + 19 + 1 + 10 + 8 + 5 + 3 + 13
    wanted = torch.autograd.grad((alone * row.advantages_N).mean(), parameters)
    together = packed_logprobs(packed(model), row)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    got = torch.autograd.grad((together * row.advantages_N).mean(), parameters)
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
    assert max(float(theirs.abs().max()) for theirs in wanted) > 0.01


def test_varlen_index_and_masks_agree():
    """The kernel runs on GPUs alone; by its contract, query i of a span of Q sees the first i + 1 + K - Q of K keys."""
    spans = [Span(0, 12), Span(12, 15, 0, 5), Span(15, 16), Span(16, 22, 15, 16)]
    index = build_index(spans, CPU)
    masks = build_spans(spans, CPU, torch.float32)
    assert isinstance(masks, SpanMasks)
    seen_by_kernel, seen_by_masks = torch.zeros(22, 22, dtype=torch.bool), torch.zeros(22, 22, dtype=torch.bool)
    queries, keys = index.query_ends.tolist(), index.key_ends.tolist()
    for s, (span, mask) in enumerate(zip(spans, masks.masks, strict=True)):
        num_queries, num_keys = queries[s + 1] - queries[s], keys[s + 1] - keys[s]
        for i in range(num_queries):
            seen = index.keys_K[keys[s] : keys[s] + i + 1 + num_keys - num_queries]
            seen_by_kernel[queries[s] + i, seen.cpu()] = True
        own = torch.arange(span.start, span.end)
        if mask is None:
            seen_by_masks[span.start : span.end, span.start : span.end] = torch.ones(len(own), len(own)).tril().bool()
        else:
            looked_at = torch.cat((torch.arange(span.shared_start, span.shared_end), own))
            seen_by_masks[own[:, None], looked_at[None]] = mask
    assert torch.equal(seen_by_kernel, seen_by_masks)
    assert int(seen_by_masks.sum()) == sum(span.num_attended for span in spans)
    assert (index.max_queries, index.max_keys) == (12, 12)
    assert seen_by_masks[13].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4, 12, 13]  # the prompt, itself


def test_targets_logprobs_and_advantages_are_aligned():
    row = build_row(group_by_prompt(rollouts()), CPU, torch.float32)
    wanted = [
        (int(token), float(logprob), np.float32(rollout.advantage))
        for rollout in rollouts()
        for token, logprob in zip(rollout.token_ids, rollout.logprobs, strict=True)
    ]
    got = zip(row.targets_N.tolist(), row.rollout_logprobs_N.tolist(), map(np.float32, row.advantages_N), strict=True)
    assert list(got) == wanted
    assert row.lengths_R.tolist() == [rollout.token_ids.size for rollout in rollouts()]


def test_siblings_are_gathered_in_order_of_first_appearance():
    mixed = rollouts()
    mixed = [*mixed[::2], *mixed[1::2]]
    groups = group_by_prompt(mixed)
    assert [group.rollouts[0].id.group_id for group in groups] == ["a", "b", "d", "c"]
    indices = [[rollout.id.rollout_index for rollout in group.rollouts] for group in groups]
    assert indices == [[0, 2, 1], [1, 0], [0, 1], [0]]


def test_same_group_id_with_another_prompt_is_another_group():
    random = np.random.default_rng(0)
    first, other = (make_group(random, "a", 4, (2, 2)) for _ in range(2))
    assert [len(group.rollouts) for group in group_by_prompt([*first, *other])] == [2, 2]
    later = make_group(np.random.default_rng(0), "a", 4, (2,), step=1)  # the same prompt, at another step
    assert [len(group.rollouts) for group in group_by_prompt([*first, *later])] == [2, 1]


@pytest.mark.parametrize(("max_tokens", "num_rows"), [(10**6, 1), (64, 1), (40, 2), (24, 3), (16, 5), (1, 8)])
def test_rows_hold_every_rollout_once_within_their_limit(max_tokens, num_rows):
    rows = pack(group_by_prompt(rollouts()), max_tokens)
    packed_rollouts = [rollout.id for row in rows for group in row for rollout in group.rollouts]
    assert len(packed_rollouts) == len(set(packed_rollouts)) == len(rollouts())
    assert len(rows) == num_rows
    for row in rows:
        alone = len(row) == 1 and len(row[0].rollouts) == 1
        assert alone or sum(group.num_tokens for group in row) <= max_tokens


def test_large_groups_are_split_over_rows():
    group = make_group(np.random.default_rng(0), "a", 10, (10,) * 7)
    rows = pack(group_by_prompt(group), 45)
    assert [[len(piece.rollouts) for piece in row] for row in rows] == [[3], [3], [1]]
    assert all(piece.prompt_token_ids.size == 10 for row in rows for piece in row)


@pytest.mark.parametrize(("max_tokens", "num_rows"), [(10**6, 1), (96, 2), (32, 3), (16, 6), (1, 8)])
def test_padded_rows_hold_every_rollout_once_within_their_limit(max_tokens, num_rows):
    rows = pack_padded(group_by_prompt(rollouts()), max_tokens)
    ids = [rollout.id for row in rows for group in row for rollout in group.rollouts]
    assert len(ids) == len(set(ids)) == sum(len(row) for row in rows) == len(rollouts())
    assert len(rows) == num_rows
    assert all(len(row) == 1 or len(row) * max(each.num_tokens for each in row) <= max_tokens for row in rows)
