"""The learner's log-probabilities against each architecture's own forward in transformers."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.support.architectures import ALONE, PACKED, make_architecture

from poise.errors import BackendDown, Unusable
from poise.learner.config import LearnerConfig
from poise.learner.distributed.process_group import World
from poise.learner.models.critic import Critic
from poise.learner.models.policy import Policy, load_reference
from poise.learner.training.packing import PackedRow, build_row, group_by_prompt
from poise.learner.training.trainer import Trainer
from poise_client.types import Rollout, RolloutId, VersionSpan

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
TEMPERATURE = 0.7
LOGITS_DIFFER = ["cohere", "falcon_h1", "gemma2", "granite", "minicpm3", "nanochat", "xlstm"]
WITH_DROPOUT = {
    "bloom": {"hidden_dropout": 0.4, "attention_dropout": 0.4},
    "falcon": {"hidden_dropout": 0.4, "attention_dropout": 0.4},
    "gpt2": {"resid_pdrop": 0.4, "embd_pdrop": 0.4, "attn_pdrop": 0.4},
    "gpt_neox": {"hidden_dropout": 0.4, "attention_dropout": 0.4},
    "opt": {"dropout": 0.4, "attention_dropout": 0.4, "layerdrop": 0.4},
    "phi": {"resid_pdrop": 0.4, "embd_pdrop": 0.4, "attention_dropout": 0.4},
}


def settings(folder: Path, **changes: Any) -> LearnerConfig:
    return LearnerConfig(model=str(folder), state_dir=folder / "state", **changes)


ROUNDING = {"qwen3_next": 2e-3}
"""Nats by which transformers' own model differs between padded and single sequences, where that is much: its chunked
delta rule differs by 8e-4."""


def rollouts(folder: Path) -> list[Rollout]:
    """Return siblings of three prompts, shorter and longer than the windows."""
    size = transformers.AutoConfig.from_pretrained(folder).vocab_size
    random = np.random.default_rng(5)
    made = []
    for group, (num_prompt, responses) in enumerate(((3, (2, 11)), (14, (1, 6, 9)), (30, (25,)))):
        prompt = random.integers(2, size, num_prompt, dtype=np.int32)
        for index, num_tokens in enumerate(responses):
            tokens = random.integers(2, size, num_tokens, dtype=np.int32)
            logprobs = random.uniform(-9, -1, num_tokens).astype(np.float32)
            made.append(
                Rollout(
                    RolloutId("run", 0, f"g{group}", index),
                    prompt,
                    tokens,
                    logprobs,
                    (VersionSpan(0, num_tokens, 0),),
                    advantage=1.0 - index,
                )
            )
    return made


def row_of(folder: Path) -> PackedRow:
    return build_row(group_by_prompt(rollouts(folder)), CPU, torch.float32)


def plain(folder: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if getattr(model.config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # the others ignore the cap
    return model


def expected(model: Any, folder: Path) -> torch.Tensor:
    """Return log-probabilities by a plain forward of each sequence."""
    parts = []
    for rollout in rollouts(folder):
        ids = torch.tensor([[*rollout.prompt_token_ids, *rollout.token_ids]])
        logits = model(ids, use_cache=False).logits[0, rollout.prompt_token_ids.size - 1 : -1]
        logprobs = (logits / TEMPERATURE).log_softmax(-1)
        parts.append(logprobs.gather(-1, torch.from_numpy(rollout.token_ids).long()[:, None])[:, 0])
    return torch.cat(parts)


def assert_same(one: torch.Tensor, other: torch.Tensor, nats: float = 5e-4) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=nats)


@pytest.mark.parametrize("name", [*PACKED, *ALONE])
def test_logprobs_are_the_models_own(name, tmp_path):
    folder = make_architecture(tmp_path, name)
    policy = Policy(settings(folder), World(CPU))
    with torch.no_grad():
        own, learner = expected(plain(folder), folder), policy.logprobs(row_of(folder), TEMPERATURE)[0]
    assert_same(learner, own, ROUNDING.get(name, 5e-4))
    assert policy.logprobs.mode.packed == (name in PACKED)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["saved", "recomputed"])
@pytest.mark.parametrize("name", ["gemma2", "gpt2", "gpt_oss", "granite", "mamba", "mistral", "opt", "stablelm"])
def test_gradients_are_the_models_own(name, checkpointed, tmp_path):
    folder = make_architecture(tmp_path, name)
    policy = Policy(settings(folder, gradient_checkpointing=checkpointed), World(CPU))
    model = plain(folder)
    policy.logprobs(row_of(folder), TEMPERATURE)[0].mean().backward()
    expected(model, folder).mean().backward()
    theirs = {name: parameter.grad for name, parameter in model.named_parameters()}
    for parameter_name, parameter in policy.trained():
        own = theirs[parameter_name]
        assert (parameter.grad is None) == (own is None), parameter_name
        if own is not None:
            torch.testing.assert_close(parameter.grad, own, rtol=1e-3, atol=1e-4 * float(own.abs().max()) + 1e-7)


@pytest.mark.parametrize("name", LOGITS_DIFFER)
def test_entropies_are_those_of_the_models_logits(name, tmp_path):
    folder = make_architecture(tmp_path, name)
    policy, model = Policy(settings(folder, logprob_chunk_tokens=4), World(CPU)), plain(folder)
    first = rollouts(folder)[0]
    ids = torch.tensor([[*first.prompt_token_ids, *first.token_ids]])
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0, first.prompt_token_ids.size - 1 : -1] / TEMPERATURE
        entropies = policy.logprobs(row_of(folder), TEMPERATURE)[1]
    own = torch.distributions.Categorical(logits=logits).entropy()
    assert_same(entropies[: own.numel()], own)
    assert policy.logprobs.mode.own_head


@pytest.mark.parametrize("checkpointed", [False, True], ids=["saved", "recomputed"])
@pytest.mark.parametrize("name", WITH_DROPOUT)
def test_dropout_is_off(name, checkpointed, tmp_path):
    folder = make_architecture(tmp_path, name, **WITH_DROPOUT[name])
    policy = Policy(settings(folder, gradient_checkpointing=checkpointed), World(CPU))
    first, second = (policy.logprobs(row_of(folder), TEMPERATURE)[0].detach() for _ in range(2))
    with torch.no_grad():
        own = expected(plain(folder), folder)
    assert torch.equal(first, second)
    assert_same(first, own)


@pytest.mark.parametrize("name", WITH_DROPOUT)
def test_dropout_is_on_where_it_is_configured(name, tmp_path):
    folder = make_architecture(tmp_path, name, **WITH_DROPOUT[name])
    policy = Policy(settings(folder, dropout=True), World(CPU))
    first, second = (policy.logprobs(row_of(folder), TEMPERATURE)[0].detach() for _ in range(2))
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "mamba", "opt"])
def test_a_critic_reads_the_models_own_states(name, tmp_path):
    folder = make_architecture(tmp_path, name, **WITH_DROPOUT.get(name, {}))
    config = settings(folder, critic={})
    critic = Critic(config, config.critic, World(CPU))
    model = plain(folder)
    torch.nn.init.ones_(critic.values.head.weight)
    with torch.no_grad():
        values = critic.values(row_of(folder))
        heads = torch.nn.Linear(critic.values.head.in_features, model.config.vocab_size, bias=False)
        heads.weight.fill_(1.0)
        model.set_output_embeddings(heads)
        first = rollouts(folder)[0]
        ids = torch.tensor([[*first.prompt_token_ids, *first.token_ids]])
        states = []
        model.get_output_embeddings().register_forward_hook(lambda _, inputs, __: states.append(inputs[0]))
        model(ids, use_cache=False)
    own = states[0][0, first.prompt_token_ids.size - 1 : -1].sum(-1)
    torch.testing.assert_close(values[: own.numel()], own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "modules"),
    [
        ("cohere", "all-linear"),
        ("falcon", "all-linear"),
        ("gpt2", "all-linear"),
        ("gpt_neox", "all-linear"),
        ("mistral", "all-linear"),
        ("mamba", ["in_proj"]),
        ("qwen3_moe", ["q_proj", "o_proj"]),
    ],
)
def test_merged_adapters_give_the_learners_logprobs(name, modules, tmp_path):
    folder = make_architecture(tmp_path, name)
    lora = {"rank": 2, "alpha": 4, "target_modules": modules}
    policy = Policy(settings(folder, lora=lora), World(CPU))
    with torch.no_grad():
        for _, parameter in policy.trained():
            parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(3))
        model = plain(folder)
        base = expected(model, folder)
        merged = policy.weights()
        for parameter_name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(merged[parameter_name].array.copy()))
        learner = policy.logprobs(row_of(folder), TEMPERATURE)[0]
    assert_same(learner, expected(model, folder))
    assert (learner - base).abs().max() > 0.01


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "mamba", "nemotron"])
def test_a_step_moves_the_policy_of_an_architecture(name, tmp_path):
    folder = make_architecture(tmp_path, name)
    trainer = Trainer(
        settings(folder, optimizer={"learning_rate": 0.01, "warmup_updates": 0}, loss={"kl_coefficient": 0.1})
    )
    trainer.load()
    before = trainer.weights()
    metrics = trainer.train(rollouts(folder), TEMPERATURE)
    after = trainer.weights()
    assert metrics.num_updates == 1
    assert np.isfinite(metrics.loss)
    assert any(not np.array_equal(before[key].array, after[key].array) for key in before)


def test_siblings_may_share_a_row_of_a_model_that_cannot_pack(tmp_path):
    folder = make_architecture(tmp_path, "bloom")
    policy = Policy(settings(folder), World(CPU))
    row = row_of(folder)
    assert row.num_tokens < sum(r.prompt_token_ids.size + r.token_ids.size for r in rollouts(folder))
    with torch.no_grad():
        assert_same(policy.logprobs(row, TEMPERATURE)[0], expected(plain(folder), folder))


@pytest.mark.parametrize(
    ("name", "changes"),
    [("mistral", {"sliding_window": 4096}), ("llama4_text", {"attention_chunk_size": 8192})],
)
def test_check_detects_missing_sliding_windows(name, changes, tmp_path, monkeypatch):
    monkeypatch.setattr("poise.learner.models.attention._mask", _full_mask)
    folder = make_architecture(tmp_path, name, **changes)
    policy = Policy(settings(folder), World(CPU))
    assert not policy.logprobs.mode.packed  # the check detects that packed attention has no windows here
    text = policy.model.config.get_text_config()
    assert {key: getattr(text, key) for key in changes} == changes


def _full_mask(span: Any, device: torch.device, sliding_window: int | None = None) -> torch.Tensor | None:
    if not span.num_shared:
        return None
    return torch.ones(span.end - span.start, span.num_keys, dtype=torch.bool, device=device).tril(span.num_shared)


def test_slower_forward_modes_are_logged_with_a_reason(tmp_path, caplog):
    folder = make_architecture(tmp_path, "mamba")
    with caplog.at_level(logging.WARNING, "poise"):
        Policy(settings(folder), World(CPU))
    assert "MambaForCausalLM" in caplog.text
    assert "one sequence at a time" in caplog.text
    assert "nats" in caplog.text


@pytest.mark.parametrize("name", ["bert", "roberta"])
@pytest.mark.parametrize("load", [Policy, load_reference])
def test_non_causal_model_is_rejected_by_name(name, load, tmp_path):
    folder = make_architecture(tmp_path, name)
    with pytest.raises(BackendDown, match=r"(Bert|Roberta)\w+\) cannot be trained: .*differ by up to [\d.]+ nats"):
        load(settings(folder), World(CPU))


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"eos_token_id": [1, 2, 3]},
        {"eos_token_id": list(range(265))},
        {"pad_token_id": -1},
        {"output_attentions": True, "output_hidden_states": True},
        {"return_dict": False},
        {"attn_implementation": "flash_attention_2"},
        {"use_cache": False},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_irrelevant_config_entries_are_ignored(changes, tmp_path):
    folder = make_architecture(tmp_path / "model", "llama")
    own = expected(plain(folder), folder).detach()
    change_config(folder, **changes)
    policy = Policy(settings(folder), World(CPU))
    assert_same(policy.logprobs(row_of(folder), TEMPERATURE)[0].detach(), own)
    assert policy.logprobs.mode.packed
    policy.save(str(tmp_path / "exported"))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"vocab_size": "abc"}, "cannot be loaded: .*vocab_size"),
        ({"num_attention_heads": 0}, "cannot be loaded: ZeroDivisionError"),
        ({"hidden_act": "nonesuch"}, "cannot be loaded: KeyError: 'nonesuch'"),
        ({"rope_parameters": 7}, "cannot be loaded: .*rope_parameters"),
        ({"dtype": "float99"}, "cannot be loaded: .*float99"),
        (
            {"vocab_size": 100},
            r"2 weights whose shape differs .* lm_head.weight: \[265, 32\] instead of \[100, 32\]",
        ),
        ({"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}, "needs Python code from its own folder"),
    ],
)
def test_a_config_that_cannot_be_used_is_rejected(changes, why, tmp_path):
    folder = make_architecture(tmp_path, "llama")
    change_config(folder, **changes)
    with pytest.raises(Unusable, match=rf"^model {folder} .*{why}|^model {folder} {why}"):
        Policy(settings(folder), World(CPU))


def test_weights_that_are_not_finite_are_rejected(tmp_path):
    folder = make_architecture(tmp_path, "llama")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(Unusable, match="its own forward gives log-probabilities that are not finite"):
        Policy(settings(folder), World(CPU))


def test_a_model_that_lacks_weights_is_rejected(tmp_path):
    folder = make_architecture(tmp_path, "qwen3", tie_word_embeddings=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.model.save_pretrained(folder)  # without its head
    with pytest.raises(BackendDown, match=r"has no values for 1 of its weights, such as lm_head.weight"):
        Policy(settings(folder), World(CPU))


@pytest.mark.parametrize(
    ("name", "modules", "layer"),
    [
        ("llama", ["embed_tokens"], "embed_tokens"),
        ("qwen3_moe", "all-linear", "experts"),
        ("mixtral", ["w1", "w2", "w3"], "experts"),
    ],
)
def test_adapters_that_cannot_be_merged_are_rejected(name, modules, layer, tmp_path):
    folder = make_architecture(tmp_path, name)
    with pytest.raises(BackendDown, match=rf"{layer} of model .* is not a linear layer"):
        Policy(settings(folder, lora={"target_modules": modules}), World(CPU))


@pytest.mark.parametrize(
    ("name", "modules"), [("llama", ["nothing"]), ("mamba", "all-linear"), ("llama4_text", ["router"])]
)
def test_adapters_that_do_not_fit_are_rejected_by_name(name, modules, tmp_path):
    folder = make_architecture(tmp_path, name)
    with pytest.raises(BackendDown, match=r"ForCausalLM\) cannot take these adapters"):
        Policy(settings(folder, lora={"target_modules": modules}), World(CPU))


def test_length_dependent_rope_limits_sequences(tmp_path):
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [8.0] * 4}
    folder = make_architecture(tmp_path, "phi3", original_max_position_embeddings=64, rope_scaling=rope)
    trainer = Trainer(settings(folder))
    trainer.load()
    assert trainer.max_tokens == 64


def test_window_of_ranked_keys_limits_sequences(tmp_path):
    trainer = Trainer(settings(make_architecture(tmp_path, "doge", keep_window_size=100)))
    trainer.load()
    assert trainer.max_tokens == 100
