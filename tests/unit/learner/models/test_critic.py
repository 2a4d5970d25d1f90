"""The critic: a whole step against plain torch, its state, and that it learns."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tests.unit.learner.batches import make_batch, make_group, rewarded

from poise.learner.config import LearnerConfig
from poise.learner.training.trainer import Trainer
from poise_client.types import Batch, Rollout, StepMetrics

RATE = 1e-3
CRITIC = {"learning_rate": RATE, "warmup_updates": 0}


def loaded(config: LearnerConfig) -> Trainer:
    trainer = Trainer(config)
    trainer.load()
    return trainer


def rollouts(step: int = 0) -> tuple[Rollout, ...]:
    """Four prompts with two rollouts each, all of different lengths."""
    random = np.random.default_rng(step)
    made = [r for i in range(4) for r in make_group(random, f"g{i}", 1 + i, (3 + i, 8 - i), step=step)]
    return rewarded(Batch("run", "b", step, tuple(made))).rollouts


def state_of(trainer: Trainer) -> dict[str, np.ndarray]:
    return {name: tensor.numpy().copy() for name, tensor in trainer.state()[0].items()}


def parameters(trainer: Trainer) -> dict[str, np.ndarray]:
    return {name: array for name, array in state_of(trainer).items() if name.startswith(("model.", "critic.model."))}


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def assert_near(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    """Check that weights are equal within float32 rounding."""
    assert one.keys() == other.keys()
    for name in one:
        # Adam takes full steps on gradients that are only rounding: a few elements may differ by one step.
        difference = np.abs(one[name] - other[name])
        assert np.quantile(difference, 0.999) < 2e-6, name
        assert difference.max() < RATE, name


class PlainPpo:
    """PPO in plain torch, one rollout at a time, with every sum written out."""

    def __init__(self, config: LearnerConfig) -> None:
        assert config.critic is not None
        self.config, self.critic_config = config, config.critic
        self.policy = transformers.AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
        self.critic = transformers.AutoModel.from_pretrained(config.model, dtype=torch.float32)
        self.head = torch.nn.Linear(self.critic.config.hidden_size, 1)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)
        decay = config.optimizer.weight_decay
        self.of_policy = torch.optim.AdamW(self.policy.parameters(), config.optimizer.learning_rate, weight_decay=decay)
        both = [*self.critic.parameters(), *self.head.parameters()]
        self.of_critic = torch.optim.AdamW(both, self.critic_config.learning_rate, weight_decay=decay)
        self.num_clipped = 0

    def logprobs(self, rollout: Rollout) -> torch.Tensor:
        tokens = torch.tensor([[*rollout.prompt_token_ids, *rollout.token_ids]])
        num_prompt = rollout.prompt_token_ids.size
        logprobs = torch.log_softmax(self.policy(tokens).logits[0, num_prompt - 1 : -1], -1)
        return logprobs.gather(-1, tokens[0, num_prompt:, None])[:, 0]

    def values(self, rollout: Rollout) -> torch.Tensor:
        tokens = torch.tensor([[*rollout.prompt_token_ids, *rollout.token_ids]])
        states = self.critic(tokens).last_hidden_state[0, rollout.prompt_token_ids.size - 1 : -1]
        return self.head(states)[:, 0]

    def train(self, mini_batches: list[tuple[Rollout, ...]]) -> dict[str, float]:
        c, loss_config = self.critic_config, self.config.loss
        everything = [r for mini_batch in mini_batches for r in mini_batch]
        with torch.no_grad():
            old = {r.id: self.values(r) for r in everything}
        advantages, returns = {}, {}
        for r in everything:
            values, made = [*old[r.id].double().tolist(), 0.0], []
            for t in range(r.token_ids.size):
                advantage = 0.0
                for i in range(t, r.token_ids.size):
                    reward = r.reward if i == r.token_ids.size - 1 else 0.0
                    delta = reward + c.discount * values[i + 1] - values[i]
                    advantage += (c.discount * c.gae_lambda) ** (i - t) * delta
                made.append(advantage)
            advantages[r.id] = torch.tensor(made)
            returns[r.id] = torch.tensor([a + v for a, v in zip(made, values, strict=False)])
        together = torch.cat([*advantages.values()])
        if c.whiten_advantages:
            mean, deviation = together.mean(), together.std(correction=0)
            advantages = {name: (a - mean) / deviation for name, a in advantages.items()}
        targets, before = torch.cat([*returns.values()]), torch.cat([*old.values()])
        value_losses, norms = [], []
        for mini_batch in mini_batches:
            policy_losses, own_losses = [], []
            for r in mini_batch:
                a, v = advantages[r.id], self.values(r)
                ratio = (self.logprobs(r) - torch.from_numpy(r.logprobs)).exp()
                loss = torch.maximum(-a * ratio, -a * ratio.clamp(1 - loss_config.clip_low, 1 + loss_config.clip_high))
                policy_losses.append(torch.where(a < 0, torch.minimum(loss, -a * loss_config.dual_clip), loss))
                error = (v - returns[r.id]) ** 2
                if c.value_clip is not None:
                    near = old[r.id] + (v - old[r.id]).clamp(-c.value_clip, c.value_clip)
                    self.num_clipped += int((near != v).sum())
                    error = torch.maximum(error, (near - returns[r.id]) ** 2)
                own_losses.append(0.5 * error)
            self.of_policy.zero_grad()
            torch.cat(policy_losses).mean().backward()
            torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.optimizer.gradient_clip)
            self.of_policy.step()
            self.of_critic.zero_grad()
            torch.cat(own_losses).mean().backward()
            both = [*self.critic.parameters(), *self.head.parameters()]
            norms.append(float(torch.nn.utils.clip_grad_norm_(both, self.config.optimizer.gradient_clip)))
            self.of_critic.step()
            value_losses += [loss.detach() for loss in own_losses]
        return {
            "value_loss": float(torch.cat(value_losses).mean()),
            "critic_gradient_norm": float(np.mean(norms)),
            "explained_variance": float(1 - (targets - before).var() / targets.var()),
        }

    def parameters(self) -> dict[str, np.ndarray]:
        named = {f"model.{name}": p for name, p in self.policy.named_parameters()}
        named |= {f"critic.model.decoder.{name}": p for name, p in self.critic.named_parameters()}
        named |= {f"critic.model.head.{name}": p for name, p in self.head.named_parameters()}
        return {name: parameter.detach().numpy() for name, parameter in named.items()}


@pytest.mark.parametrize(
    "changes",
    [
        {"value_clip": 0.01},
        {"value_clip": None, "whiten_advantages": False, "discount": 0.9, "gae_lambda": 0.5},
        {"gae_lambda": 1.0},
    ],
)
def test_step_equals_plain_ppo_on_single_rollouts(config, changes):
    """Two steps of two mini-batches: the second depends on values, moments and weights of the first."""
    settings = config(mini_batch_prompts=2, micro_batch_tokens=24, critic=CRITIC | changes)
    trainer, plain = loaded(settings), PlainPpo(settings)
    start = parameters(trainer)
    for step in range(2):
        metrics = trainer.train(rollouts(step), 1.0)
        wanted = plain.train([rollouts(step)[:4], rollouts(step)[4:]])
        for name, value in wanted.items():
            assert getattr(metrics, name) == pytest.approx(value, rel=1e-3, abs=1e-5), name
    after = parameters(trainer)
    assert_near(after, plain.parameters())
    for name, array in after.items():
        assert np.abs(array - start[name]).max() > RATE / 2, name
    assert plain.num_clipped > 5 or changes.get("value_clip") != 0.01


@pytest.mark.parametrize(
    "changes", [{"micro_batch_tokens": 1}, {"micro_batch_tokens": 10**6}, {"gradient_checkpointing": True}]
)
def test_rows_and_checkpointing_change_nothing(config, changes):
    plain, other = loaded(config(critic=CRITIC, micro_batch_tokens=24)), loaded(config(critic=CRITIC, **changes))
    for step in range(2):
        mine, theirs = (trainer.train(rollouts(step), 1.0) for trainer in (other, plain))
        for name in ("value_loss", "critic_gradient_norm", "explained_variance", "loss", "gradient_norm"):
            assert getattr(mine, name) == pytest.approx(getattr(theirs, name), rel=1e-3), name
    assert_near(parameters(other), parameters(plain))


def poisoned(made: tuple[Rollout, ...]) -> tuple[Rollout, ...]:
    """With returns whose squares overflow float32."""
    return tuple(dataclasses.replace(r, reward=3e38) for r in made)


@pytest.mark.parametrize("whiten", [True, False])
def test_nonfinite_loss_updates_neither_model(config, whiten, caplog):
    """Whitened advantages are still finite, so only the critic's loss is not."""
    trainer = loaded(config(critic=CRITIC | {"whiten_advantages": whiten}))
    before = state_of(trainer)
    metrics = trainer.train(poisoned(rollouts()[:4]), 1.0)
    assert (metrics.num_updates, metrics.num_skipped_updates, trainer.num_skipped_in_a_row) == (0, 1, 1)
    assert not math.isfinite(metrics.critic_gradient_norm)
    assert math.isfinite(metrics.gradient_norm) == whiten
    assert "Check its rewards" in caplog.text
    assert_same(state_of(trainer), before)
    assert trainer.train(rollouts(), 1.0).num_updates == 2
    fresh = loaded(config(critic=CRITIC | {"whiten_advantages": whiten}))
    fresh.train(rollouts(), 1.0)
    assert_same(state_of(trainer), state_of(fresh))


def test_nonfinite_policy_gradient_skips_the_critic_too(config):
    trainer = loaded(config(critic=CRITIC))
    before = state_of(trainer)
    broken = tuple(dataclasses.replace(r, logprobs=np.full_like(r.logprobs, np.nan)) for r in rollouts())
    metrics = trainer.train(broken, 1.0)
    assert math.isfinite(metrics.critic_gradient_norm)
    assert (metrics.num_updates, metrics.num_skipped_updates) == (0, 2)
    assert_same(state_of(trainer), before)


def test_training_resumes_bit_for_bit_from_a_state(config):
    settings = config(critic=CRITIC | {"warmup_updates": 5})
    straight = loaded(settings)
    straight.train(rollouts(0), 1.0)
    tensors, num_updates = straight.state()
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    straight.train(rollouts(1), 1.0)
    resumed = loaded(settings)
    resumed.restore(kept, num_updates)
    resumed.train(rollouts(1), 1.0)
    assert_same(state_of(resumed), state_of(straight))
    for kind in ("model", "step", "exp_avg", "exp_avg_sq"):
        assert f"critic.{kind}.head.weight" in kept


def test_critic_has_its_own_learning_rate_and_warmup(config):
    trainer = loaded(config(critic={"learning_rate": 1e-3, "warmup_updates": 4}, mini_batch_prompts=4))
    trainer.train(rollouts(), 1.0)
    bias = state_of(trainer)["critic.model.head.bias"]
    assert np.abs(bias) == pytest.approx(1e-3 / 4, rel=1e-3)  # Adam's first step equals the learning rate


def test_only_the_policy_is_pushed_and_exported(config, tmp_path):
    trainer, without = loaded(config(critic=CRITIC)), loaded(config())
    trainer.train(rollouts(), 1.0)
    assert trainer.weights().keys() == without.weights().keys()
    trainer.save_model(str(tmp_path / "export"))
    without.save_model(str(tmp_path / "plain"))
    exported = load_file(tmp_path / "export" / "model.safetensors")
    assert exported.keys() == load_file(tmp_path / "plain" / "model.safetensors").keys()
    for name, weight in trainer.weights().items():
        np.testing.assert_array_equal(exported[name].numpy(), weight.array)


def test_critic_metrics_are_0_without_a_critic(config):
    metrics = loaded(config()).train(make_batch(0).rollouts, 1.0)
    assert (metrics.value_loss, metrics.explained_variance, metrics.critic_gradient_norm) == (0, 0, 0)


def test_critic_is_trained_whole_beside_adapters(config):
    trainer = loaded(config(critic=CRITIC, lora={"rank": 4, "alpha": 8}))
    start = state_of(trainer)
    for step in range(2):
        trainer.train(rollouts(step), 1.0)
    after = state_of(trainer)
    assert all(".lora_" in name for name in after if not name.startswith(("critic.", "rng.")))
    for name in start:
        if name.startswith("critic.model."):
            assert (after[name] != start[name]).any(), name


def test_bfloat16_critic_is_updated_in_float32(config):
    exact, half = loaded(config(critic=CRITIC)), loaded(config(critic=CRITIC, dtype="bfloat16"))
    for step in range(2):
        wanted, metrics = exact.train(rollouts(step), 1.0), half.train(rollouts(step), 1.0)
    kept = half.state()[0]
    assert {tensor.dtype for name, tensor in kept.items() if not name.startswith("rng.")} == {torch.float32}
    assert metrics.value_loss == pytest.approx(wanted.value_loss, rel=0.05)
    assert metrics.value_loss != wanted.value_loss  # bfloat16 was used


def test_flops_include_the_critic_without_its_head(config):
    """A prompt of 3 tokens and a response of 4; layers of 64 and 32 x 64 for heads, and of 3 x 64 x 128."""
    one = make_group(np.random.default_rng(0), "g", 3, (4,))
    with_critic, without = loaded(config(critic=CRITIC, peak_flops=1e9)), loaded(config(peak_flops=1e9))
    decoder = 7 * 6 * 4 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128) + (7 * 8 // 2) * 12 * 32 * 2 * 4
    head = 4 * 6 * 64 * without.vocabulary_size
    for trainer, flops in ((without, decoder + head), (with_critic, 2 * decoder + head)):
        metrics = trainer.train(rewarded(Batch("run", "b", 0, tuple(one))).rollouts, 1.0)
        assert metrics.mfu * metrics.train_s * 1e9 == pytest.approx(flops)


def test_critic_learns_the_values_of_rollouts(config):
    """Rewards that depend on the prompt's last token."""
    random = np.random.default_rng(0)
    made = []
    for i in range(16):
        for r in make_group(random, f"g{i}", 4, (5, 7)):
            prompt = np.array([*r.prompt_token_ids[:-1], 10 + i % 2], np.int32)
            made.append(dataclasses.replace(r, prompt_token_ids=prompt, advantage=None, reward=float(i % 2)))
    trainer = loaded(config(critic=CRITIC | {"value_clip": None}, mini_batch_prompts=16))
    history: list[StepMetrics] = [trainer.train(made, 1.0) for _ in range(40)]
    assert history[0].explained_variance == 0  # a critic that predicts 0 explains nothing
    assert history[-1].explained_variance > 0.8
    assert history[-1].value_loss < history[0].value_loss / 5
