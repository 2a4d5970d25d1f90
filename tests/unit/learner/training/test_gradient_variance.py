"""The measured gradient variance against per-group gradients in plain torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pytest
import torch
import transformers
from tests.unit.learner.batches import make_group, rewarded

from poise.learner.config import LearnerConfig
from poise.learner.distributed.process_group import World
from poise.learner.training.gradient_variance import HalfGradient
from poise.learner.training.trainer import Trainer
from poise_client.types import Batch, Rollout, StepMetrics

Group = list[Rollout]
STILL = {"learning_rate": 1e-30, "weight_decay": 0.0, "gradient_clip": 1e-3}
"""Changes no weight, so that all mini-batches of a step see the same model. Clipping comes after measuring."""


def groups(count: int) -> list[Group]:
    """Groups with the same number of tokens, so that all mini-batches have the same denominator."""
    random = np.random.default_rng(0)
    return [make_group(random, f"g{i}", 3, (4, 5)) for i in range(count)]


def trained(config: LearnerConfig, mini_batches: Sequence[Sequence[Group]]) -> StepMetrics:
    """The metrics of a step with these mini-batches, which may repeat a group."""
    trainer = Trainer(config)
    trainer.load()
    rollouts = [
        dataclasses.replace(r, id=dataclasses.replace(r.id, group_id=f"{i} {r.id.group_id}"))
        for i, mini_batch in enumerate(mini_batches)
        for group in mini_batch
        for r in group
    ]
    return trainer.train(rollouts, 1.0)


def gradients(config: LearnerConfig, groups: Sequence[Group], num_tokens: int) -> np.ndarray:
    """Gradient of each group's share in the mean loss of `num_tokens` tokens, float64 [groups, parameters]."""
    model = transformers.AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    rows = []
    for group in groups:
        losses = []
        for r in group:
            tokens = torch.tensor([[*r.prompt_token_ids, *r.token_ids]])
            logprobs = torch.log_softmax(model(tokens).logits[0, r.prompt_token_ids.size - 1 : -1], -1)
            own = logprobs.gather(-1, tokens[0, r.prompt_token_ids.size :, None])[:, 0]
            ratio = (own - torch.from_numpy(r.logprobs)).exp()
            loss = torch.maximum(-r.advantage * ratio, -r.advantage * ratio.clamp(0.8, 1.28))
            losses.append(loss.clamp(max=-r.advantage * 10) if r.advantage < 0 else loss)
        model.zero_grad()
        (torch.cat(losses).sum() / num_tokens).backward()
        rows.append(torch.cat([p.grad.flatten() for p in model.parameters()]).double().numpy())
    return np.stack(rows)


def settings_for(config, num_prompts: int, **changes: object) -> LearnerConfig:
    changes = {"micro_batch_tokens": 24, "optimizer": STILL, "measure_gradient_variance": True} | changes
    return config(mini_batch_prompts=num_prompts, **changes)


def test_two_groups_give_the_squared_gradient_distance(config):
    settings = settings_for(config, 2)
    pair = groups(2)
    one, other = gradients(settings, pair, 18)
    assert trained(settings, [pair]).gradient_variance == pytest.approx(np.square(one - other).sum(), rel=1e-4)


def test_uneven_halves_are_weighted_by_their_groups(config):
    settings = settings_for(config, 5)
    five = groups(5)
    of_groups = gradients(settings, five, 45)
    difference = of_groups[:2].mean(0) - of_groups[2:].mean(0)
    wanted = 2 * 3 * np.square(difference).sum()
    assert trained(settings, [five]).gradient_variance == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("size", [2, 3])
def test_mean_over_all_draws_is_the_sample_covariance(config, size):
    """Unbiased: over all ways to draw and split a mini-batch of six groups, the mean is m·tr Σ up to rounding."""
    settings = settings_for(config, size)
    six = groups(6)
    draws = [
        [six[first], *(six[i] for i in rest)]
        for first in range(6)
        for rest in combinations([i for i in range(6) if i != first], size - 1)
    ]
    assert len(draws) == {2: 30, 3: 60}[size]
    of_groups = gradients(settings, six, 9 * size)
    wanted = size * np.square(of_groups - of_groups.mean(0)).sum() / 5
    assert trained(settings, draws).gradient_variance == pytest.approx(wanted, rel=1e-4)


def test_measuring_changes_no_gradient(config):
    after = {}
    for measure in (True, False):
        trainer = Trainer(config(mini_batch_prompts=3, **({"measure_gradient_variance": True} if measure else {})))
        trainer.load()
        metrics = trainer.train([r for group in groups(6) for r in group], 1.0)
        after[measure] = metrics, {name: weight.array for name, weight in trainer.weights().items()}
    (on, weights), (off, plain) = after[True], after[False]
    for name in ("loss", "gradient_norm", "entropy", "clip_share"):
        assert getattr(on, name) == pytest.approx(getattr(off, name), rel=1e-4), name
    assert on.num_model_tokens == off.num_model_tokens
    for name, array in plain.items():
        assert np.quantile(np.abs(weights[name] - array), 0.999) < 1e-6, name
    assert on.gradient_variance > 0
    assert off.gradient_variance == 0


def test_a_mini_batch_of_one_prompt_has_no_variance(config):
    three = groups(3)
    settings = settings_for(config, 2)
    odd, even = trained(settings, [three[:2], three[2:]]), trained(settings, [three[:2]])
    assert odd.gradient_variance == even.gradient_variance
    assert math.isnan(trained(settings_for(config, 1), [three[:1], three[1:2]]).gradient_variance)


def test_skipped_mini_batches_are_left_out_of_the_variance(config):
    settings = settings_for(config, 2)
    pair, other = groups(2), groups(4)[2:]
    poisoned = [[dataclasses.replace(r, advantage=3e38) for r in group] for group in other]
    metrics = trained(settings, [pair, poisoned])
    assert metrics.num_skipped_updates == 1
    assert metrics.gradient_variance == trained(settings, [pair]).gradient_variance


@pytest.mark.parametrize("changes", [{"critic": {}}, {"lora": {"rank": 4}}])
def test_variance_is_measured_with_critic_and_with_adapters(config, changes):
    settings = settings_for(config, 4, **changes)
    rollouts = tuple(r for group in groups(4) for r in group)
    if "critic" in changes:
        rollouts = rewarded(Batch("run", "b", 0, rollouts)).rollouts
    trainer = Trainer(settings)
    trainer.load()
    assert trainer.train(rollouts, 1.0).gradient_variance > 0


def test_a_parameter_that_only_one_half_moves_counts():
    first, second, idle = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    first.grad = torch.tensor([3.0, 0.0])
    half = HalfGradient([first, second, idle], (1, 2))
    first.grad = first.grad + torch.tensor([0.0, 8.0])
    second.grad = torch.tensor([2.0, 0.0])
    # g_A = (3, 0 | 0, 0), g_B = (0, 8 | 2, 0): 1·2·(3² + 4² + 1²)
    assert half.variance(World(torch.device("cpu"))) == pytest.approx(52)
