import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import transformers
from tests.unit.learner.batches import make_batch, make_group

from poise.errors import BackendDown, Misconfigured
from poise.learner.config import LearnerConfig
from poise.learner.training.trainer import Trainer
from poise_client.types import Rollout


def loaded(config: LearnerConfig) -> Trainer:
    trainer = Trainer(config)
    trainer.load()
    return trainer


def rollouts(step: int = 0) -> list[Rollout]:
    random = np.random.default_rng(step)
    return [r for i in range(4) for r in make_group(random, f"g{i}", 1 + i, (3 + i, 8 - i), step=step)]


def weights(trainer: Trainer) -> dict[str, np.ndarray]:
    return {name: weight.array for name, weight in trainer.weights().items()}


def assert_same(one, other) -> None:
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


class PlainLoop:
    """The same training in plain torch, one rollout at a time."""

    def __init__(self, config: LearnerConfig) -> None:
        self.config = config
        self.model = transformers.AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
        settings = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), settings.learning_rate, settings.betas, weight_decay=settings.weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda update: min(1.0, (update + 1) / max(1, settings.warmup_updates))
        )

    def logprobs(self, rollout: Rollout, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the log-probabilities of the response's tokens, and the entropies."""
        tokens = torch.tensor([[*rollout.prompt_token_ids, *rollout.token_ids]])
        num_prompt = rollout.prompt_token_ids.size
        logprobs = torch.log_softmax(self.model(tokens).logits[0, num_prompt - 1 : -1] / temperature, -1)
        return logprobs.gather(-1, tokens[0, num_prompt:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)

    def train(self, mini_batches: list[list[Rollout]], temperature: float) -> dict[str, float]:
        with torch.no_grad():
            before = {r.id: self.logprobs(r, temperature)[0] for rollouts in mini_batches for r in rollouts}
        losses, entropies, mismatches, norms, clipped, truncated = [], [], [], [], [], []
        c = self.config.loss
        for index, mini_batch in enumerate(mini_batches):
            self.optimizer.zero_grad()
            mini_losses = []
            for r in mini_batch:
                logprobs, entropy = self.logprobs(r, temperature)
                rollout_logprobs = torch.from_numpy(r.logprobs)
                old = before[r.id] if c.old_logprobs == "recompute" else rollout_logprobs
                ratio = (logprobs - old).exp()
                loss = torch.maximum(-r.advantage * ratio, -r.advantage * ratio.clamp(1 - c.clip_low, 1 + c.clip_high))
                decided = loss.detach() != (-r.advantage * ratio).detach()
                if r.advantage < 0:
                    decided |= loss.detach() > -r.advantage * c.dual_clip
                    loss = loss.clamp(max=-r.advantage * c.dual_clip)
                clipped.append(decided)
                weight = (old - rollout_logprobs).exp()
                truncated.append(weight > c.importance_cap)
                mini_losses.append(loss * weight.clamp(max=c.importance_cap))
                entropies.append(entropy.detach())
                if index == 0 or c.old_logprobs == "recompute":
                    mismatches.append(before[r.id] - rollout_logprobs)
            torch.cat(mini_losses).mean().backward()
            losses += [loss.detach() for loss in mini_losses]
            norms.append(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.gradient_clip))
            self.optimizer.step()
            self.schedule.step()
        d = torch.cat(mismatches)
        return {
            "loss": float(torch.cat(losses).mean()),
            "entropy": float(torch.cat(entropies).mean()),
            "mismatch_logprob": float(d.abs().mean()),
            "mismatch_kl": float((d.exp() - 1 - d).mean()),
            "truncated_share": float(torch.cat(truncated).float().mean()),
            "clip_share": float(torch.cat(clipped).float().mean()),
            "gradient_norm": float(torch.stack(norms).mean()),
        }


def assert_close(trainer: Trainer, loop: PlainLoop, start: dict[str, np.ndarray], learning_rate: float) -> None:
    """Same weights, for all that float32 can tell, and far from the start."""
    for name, parameter in loop.model.named_parameters():
        mine, theirs = weights(trainer)[name], parameter.detach().numpy()
        # Adam takes full steps on gradients that are only rounding: a few elements may differ by one step.
        difference = np.abs(mine - theirs)
        assert np.quantile(difference, 0.999) < 1e-6, name
        assert difference.max() < learning_rate, name
        assert np.abs(theirs - start[name]).max() > learning_rate / 2, name


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("old_logprobs", ["rollout", "recompute"])
def test_step_equals_a_plain_torch_loop(config, temperature, old_logprobs):
    settings = config(mini_batch_prompts=8, micro_batch_tokens=40, loss={"old_logprobs": old_logprobs})
    trainer, loop = loaded(settings), PlainLoop(settings)
    start = weights(trainer)
    metrics = trainer.train(rollouts(), temperature)
    wanted = loop.train([rollouts()], temperature)
    for name, value in wanted.items():
        assert getattr(metrics, name) == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert metrics.num_tokens == sum(r.token_ids.size for r in rollouts())
    assert (metrics.num_rollouts, metrics.num_updates, metrics.learning_rate) == (8, 1, 1e-3)
    assert (metrics.truncated_share > 0) == (old_logprobs == "recompute")
    assert (metrics.clip_share > 0) == (old_logprobs == "rollout")
    assert_close(trainer, loop, start, 1e-3)


@pytest.mark.parametrize("old_logprobs", ["rollout", "recompute"])
def test_several_mini_batches_match_the_reference_loop(config, old_logprobs):
    """Two steps of two mini-batches each: ratios, moments, learning rate and decay all carry over."""
    settings = config(
        optimizer={"learning_rate": 4e-3, "warmup_updates": 3, "gradient_clip": 0.5},
        loss={"clip_low": 0.01, "clip_high": 0.02, "old_logprobs": old_logprobs},
    )
    trainer, loop = loaded(settings), PlainLoop(settings)
    start = weights(trainer)
    rates = []
    for step in range(2):
        metrics = trainer.train(rollouts(step), 1.0)
        rates.append(metrics.learning_rate)
        wanted = loop.train([rollouts(step)[:4], rollouts(step)[4:]], 1.0)
        for name, value in wanted.items():
            assert getattr(metrics, name) == pytest.approx(value, rel=1e-3, abs=1e-5), name
        assert metrics.clip_share > 0  # the second mini-batch is off-policy
        assert metrics.gradient_norm > 0.5  # and clipped
    assert rates == pytest.approx([4e-3 * 2 / 3, 4e-3])  # of the second and fourth update
    assert_close(trainer, loop, start, 4e-3)


def test_the_split_into_micro_batches_changes_nothing(config):
    answers = {}
    for max_tokens in (1, 40, 10**6):
        trainer = loaded(config(mini_batch_prompts=2, micro_batch_tokens=max_tokens))
        answers[max_tokens] = trainer.train(rollouts(), 1.0), weights(trainer)
    metrics, after = answers.pop(10**6)
    for other, weights_after in answers.values():
        assert other.loss == pytest.approx(metrics.loss, rel=1e-4)
        assert other.entropy == pytest.approx(metrics.entropy, rel=1e-5)
        for name in after:
            assert np.quantile(np.abs(after[name] - weights_after[name]), 0.999) < 1e-6


def test_zero_advantages_only_decay_the_weights(config):
    trainer = loaded(config(optimizer={"weight_decay": 0.0}))
    before = weights(trainer)
    trainer.train([dataclasses.replace(r, advantage=0.0) for r in rollouts()], 1.0)
    assert_same(weights(trainer), before)


def test_nonfinite_gradient_changes_nothing(config, caplog):
    trainer = loaded(config(mini_batch_prompts=2))
    before, state = weights(trainer), trainer.state()
    poisoned = [dataclasses.replace(r, advantage=3e38) for r in rollouts()]
    metrics = trainer.train(poisoned, 1.0)
    assert metrics.num_updates == 0
    assert not math.isfinite(metrics.gradient_norm)
    assert "skipped a mini-batch" in caplog.text
    assert (metrics.num_skipped_updates, trainer.num_skipped_in_a_row) == (2, 2)
    assert_same(weights(trainer), before)
    assert trainer.state()[0].keys() == state[0].keys()
    assert trainer.state()[1] == 0
    # The step's other mini-batch is trained on, and the next step is unaffected.
    mixed = [*poisoned[:4], *rollouts()[4:]]
    fresh = loaded(config(mini_batch_prompts=2))
    metrics = trainer.train(mixed, 1.0)
    assert (metrics.num_updates, metrics.num_skipped_updates, trainer.num_skipped_in_a_row) == (1, 1, 0)
    fresh.train(mixed[4:], 1.0)
    assert_same(weights(trainer), weights(fresh))


def test_training_resumes_bit_for_bit_from_a_state(config, tmp_path):
    settings = config(mini_batch_prompts=2, optimizer={"warmup_updates": 5})
    straight = loaded(settings)
    straight.train(rollouts(0), 1.0)
    tensors, num_updates = straight.state()
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    straight.train(rollouts(1), 1.0)

    resumed = loaded(settings)
    resumed.restore(kept, num_updates)
    resumed.train(rollouts(1), 1.0)
    assert num_updates == 2
    assert_same(weights(resumed), weights(straight))
    assert_same(*({name: value.numpy() for name, value in t.state()[0].items()} for t in (resumed, straight)))
    assert resumed.state()[1] == straight.state()[1] == 4


def test_restoring_a_state_shares_no_memory_with_it(config):
    trainer = loaded(config())
    trainer.train(rollouts(0), 1.0)
    state = {name: tensor.clone() for name, tensor in trainer.state()[0].items()}
    copies = {name: tensor.clone() for name, tensor in state.items()}
    trainer.restore(state, 2)
    trainer.train(rollouts(1), 1.0)
    for name, tensor in state.items():
        assert torch.equal(tensor, copies[name]), name


def test_initial_state_restores_without_moments(config):
    trainer, fresh = loaded(config()), loaded(config())
    start, _ = fresh.state()
    trainer.train(rollouts(0), 1.0)
    trainer.restore(start, 0)
    trainer.train(rollouts(1), 1.0)
    fresh.train(rollouts(1), 1.0)
    assert_same(weights(trainer), weights(fresh))


def test_parameter_without_gradient_restores_without_moments(config):
    trainer = loaded(config())
    idle = trainer.policy.model.get_decoder().layers[0].mlp.down_proj.weight.requires_grad_(False)
    trainer.train(rollouts(0), 1.0)
    tensors, num_updates = trainer.state()
    assert not any(name.endswith("layers.0.mlp.down_proj.weight") and "exp" in name for name in tensors)
    trainer.restore({name: tensor.clone() for name, tensor in tensors.items()}, num_updates)
    assert idle not in trainer.optimizer.adam.state
    assert trainer.train(rollouts(1), 1.0).num_updates == 2


def test_next_step_does_not_change_published_weights(config):
    trainer = loaded(config())
    before = trainer.weights()
    copies = {name: weight.array.copy() for name, weight in before.items()}
    trainer.train(rollouts(), 1.0)
    assert_same({name: weight.array for name, weight in before.items()}, copies)
    assert any((before[name].array != weight).any() for name, weight in weights(trainer).items())


def test_tied_weights_are_sent_once(config, model):
    names = set(loaded(config()).weights())
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_bfloat16_keeps_float32_weights_and_pushes_rounded_ones(config):
    """The paper's learning rate, 1e-6, is below the bfloat16 resolution of all but the smallest weights."""
    trainer = loaded(config(dtype="bfloat16", optimizer={"learning_rate": 1e-6}))
    exact = loaded(config())
    for name, weight in trainer.weights().items():
        assert (weight.dtype, weight.array.dtype) == ("bfloat16", np.uint16)
        wanted = torch.from_numpy(exact.weights()[name].array).to(torch.bfloat16)
        np.testing.assert_array_equal(weight.array, wanted.view(torch.uint16).numpy())
    before = {name: tensor.clone() for name, tensor in trainer.state()[0].items()}
    metrics = trainer.train(rollouts(), 1.0)
    for name, tensor in trainer.state()[0].items():
        if name.startswith("model."):
            assert tensor.dtype == torch.float32
            assert (tensor != before[name]).float().mean() > 0.5, name
    reference = exact.train(rollouts(), 1.0)
    assert metrics.entropy == pytest.approx(reference.entropy, rel=0.02)
    assert metrics.entropy != reference.entropy  # bfloat16 was used


def test_missing_model_is_named(config, tmp_path):
    with pytest.raises(BackendDown, match="nowhere cannot be loaded"):
        loaded(config(model=str(tmp_path / "nowhere")))


def test_a_model_with_damaged_weights_is_named(config, model, tmp_path):
    folder = tmp_path / "damaged"
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(BackendDown, match="damaged cannot be loaded"):
        loaded(config(model=str(folder)))


def test_mini_batch_size_counts_prompts_not_rollouts(config):
    metrics = loaded(config(mini_batch_prompts=2)).train(make_batch(num_prompts=5).rollouts, 1.0)
    assert (metrics.num_rollouts, metrics.num_updates) == (10, 3)
    assert json.dumps(dataclasses.asdict(metrics))


@pytest.mark.parametrize(
    "settings", [{"device": "gpu"}, {"device": "cuda:x"}, {"device": "cuda:99"}, {"model": "/nowhere/model"}], ids=str
)
def test_missing_device_or_model_is_misconfigured(tmp_path, settings):
    with pytest.raises(Misconfigured, match=r"cannot be used|cannot be loaded"):
        loaded(LearnerConfig(**({"model": str(tmp_path), "state_dir": tmp_path} | settings)))
