"""LoRA: only adapters are trained, and pushes and exports are plain models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tests.unit.learner.batches import make_batch

from poise.learner.config import LearnerConfig
from poise.learner.training.trainer import Trainer


@pytest.fixture
def trained(config) -> Trainer:
    """A trainer with adapters, after two batches."""
    trainer = loaded(config(lora={"rank": 4, "alpha": 8}))
    for step in range(2):
        trainer.train(make_batch(step).rollouts, 1.0)
    return trainer


def loaded(config: LearnerConfig) -> Trainer:
    trainer = Trainer(config)
    trainer.load()
    return trainer


def weights(trainer: Trainer) -> dict[str, np.ndarray]:
    return {name: weight.array for name, weight in trainer.weights().items()}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        answer: torch.Tensor = model(torch.arange(12)[None]).logits
    return answer


def test_before_the_first_update_the_weights_are_the_models_own(config):
    plain, adapted = loaded(config()), loaded(config(lora={"rank": 4}))
    before = weights(plain)
    after = weights(adapted)
    assert before.keys() == after.keys()
    for name, values in before.items():
        np.testing.assert_array_equal(after[name], values)


def test_only_adapters_are_trained_and_only_they_are_kept(trained, config):
    tensors, num_updates = trained.state()
    assert num_updates == 4
    assert {name for name in tensors if ".lora_" not in name} == {"rng.cpu.0"}
    assert sum(name.startswith("exp_avg_sq.") for name in tensors) == (len(tensors) - 1) / 4
    start = weights(loaded(config()))
    for name, values in weights(trained).items():
        is_adapted = name.endswith(("_proj.weight",))
        assert bool((values != start[name]).any()) == is_adapted, name


def test_training_resumes_bit_for_bit_from_only_adapters(trained, config):
    tensors, num_updates = trained.state()
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    resumed = loaded(config(lora={"rank": 4, "alpha": 8}))
    resumed.restore(kept, num_updates)
    for trainer in (trained, resumed):
        trainer.train(make_batch(2).rollouts, 1.0)
    mine, theirs = weights(resumed), weights(trained)
    for name, values in theirs.items():
        np.testing.assert_array_equal(mine[name], values)


def test_export_has_the_merged_model_and_peft_adapter(trained, config, tmp_path: Path):
    trained.save_model(str(tmp_path / "exported"))
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32)
    stored = load_file(tmp_path / "exported" / "model.safetensors")
    for name, values in weights(trained).items():
        np.testing.assert_array_equal(stored[name].numpy(), values)
    base = transformers.AutoModelForCausalLM.from_pretrained(config().model, dtype=torch.float32)
    assert (logits(base) - logits(merged)).abs().max() > 1e-4
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "exported" / "adapter")
    torch.testing.assert_close(logits(adapted), logits(merged), atol=1e-5, rtol=1e-5)


def test_sent_adapters_equal_exported_adapters(config, tmp_path: Path):
    sender = loaded(config(lora={"rank": 4, "alpha": 8}, push={"transport": "lora"}))
    sender.train(make_batch(0).rollouts, 1.0)
    sender.save_model(str(tmp_path / "exported"))
    stored = load_file(tmp_path / "exported" / "adapter" / "adapter_model.safetensors")
    sent = weights(sender)
    assert sent.keys() == stored.keys()
    for name, values in sent.items():
        np.testing.assert_array_equal(stored[name].numpy(), values)


def test_lora_transport_needs_adapters(config):
    with pytest.raises(ValueError, match="but `lora` is not set"):
        config(push={"transport": "lora"})


def test_step_equals_peft_with_a_plain_torch_loop(config):
    """Oracle: peft's wrapped model, its own forward pass, AdamW on the adapters."""
    settings = config(lora={"rank": 4, "alpha": 8}, mini_batch_prompts=8)
    trainer = loaded(settings)
    rollouts = make_batch(0).rollouts
    base = transformers.AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    own = dict(trainer.policy.trained())
    theirs = {
        name.removeprefix("base_model.model."): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert own.keys() == theirs.keys()
    with torch.no_grad():
        for name, parameter in theirs.items():
            parameter.copy_(own[name])
    optimizer = torch.optim.AdamW(theirs.values(), lr=1e-3, weight_decay=settings.optimizer.weight_decay)
    losses = []
    for r in rollouts:
        ids = torch.tensor([[*r.prompt_token_ids, *r.token_ids]])
        num_prompt = r.prompt_token_ids.size
        all_logprobs = torch.log_softmax(model(ids).logits[0, num_prompt - 1 : -1], -1)
        logprobs = all_logprobs.gather(-1, ids[0, num_prompt:, None])[:, 0]
        ratio = (logprobs - torch.from_numpy(r.logprobs)).exp()
        loss = torch.maximum(-r.advantage * ratio, -r.advantage * ratio.clamp(0.8, 1.28))
        losses.append(loss.clamp(max=-r.advantage * 10) if r.advantage < 0 else loss)
    torch.cat(losses).mean().backward()
    torch.nn.utils.clip_grad_norm_(theirs.values(), settings.optimizer.gradient_clip)
    optimizer.step()
    trainer.train(rollouts, 1.0)
    for name, parameter in trainer.policy.trained():
        assert (parameter - theirs[name]).abs().quantile(0.99) < 1e-6, name


def served_and_trained(config: LearnerConfig, num_batches: int) -> tuple[dict[str, torch.Tensor], ...]:
    """Return the original, the served and the trained W + (alpha / r) B A of every adapted parameter."""
    trainer = loaded(config)
    layers = {
        f"{name}.weight": layer for name, layer in trainer.policy.model.named_modules() if hasattr(layer, "base_layer")
    }
    for step in range(num_batches):
        trainer.train(make_batch(step).rollouts, 1.0)
    with torch.no_grad():
        before = {name: layer.base_layer.weight.clone() for name, layer in layers.items()}
        trained = {name: before[name] + layer.get_delta_weight("default") for name, layer in layers.items()}
    served = {name: torch.from_numpy(trainer.weights()[name].array) for name in layers}
    if config.dtype == "bfloat16":
        served = {name: bits.view(torch.bfloat16).float() for name, bits in served.items()}
    return before, served, trained


def test_float32_serves_exactly_the_trained_weights(config):
    _, served, trained = served_and_trained(config(lora={"rank": 4, "alpha": 8}), 2)
    for name, weight in trained.items():
        torch.testing.assert_close(served[name], weight, rtol=2e-7, atol=1e-8)


def test_bfloat16_rounds_small_adapter_updates_away(config):
    """The error is at most half a bfloat16 step, so smaller updates may vanish."""
    settings = config(dtype="bfloat16", lora={"rank": 4, "alpha": 8}, optimizer={"learning_rate": 1e-4})
    before, served, trained = served_and_trained(settings, 2)
    moved, lost = 0, 0
    for name, weight in trained.items():
        assert torch.equal(served[name], weight.to(torch.bfloat16).float())
        assert ((served[name] - weight).abs() <= weight.abs() * 2**-8).all()
        has_moved = weight != before[name]
        moved += int(has_moved.sum())
        lost += int((has_moved & (served[name] == before[name].to(torch.bfloat16).float())).sum())
    assert lost > moved / 2
