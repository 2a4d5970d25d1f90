"""Gradients of packed, accumulated and checkpointed mini-batches against a naive loop, for every loss."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.unit.learner.batches import make_config, make_group
from tests.unit.learner.gradients import LOSSES, GradientTrainer, NaiveLoop, assert_same_gradients

from poise_client.types import Rollout

VARIANTS: dict[str, dict[str, object]] = {
    "one row": {"micro_batch_tokens": 10**6},
    "many rows": {"micro_batch_tokens": 24, "logprob_chunk_tokens": 5},
    "many rows, checkpointed": {"micro_batch_tokens": 24, "gradient_checkpointing": True},
}


@pytest.fixture(scope="module", params=VARIANTS)
def trainer(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> GradientTrainer:
    settings = VARIANTS[request.param] | {"mini_batch_prompts": 100}
    trainer = GradientTrainer(make_config(model, tmp_path_factory.mktemp("state"), **settings))
    trainer.load()
    trainer.leave_the_reference()
    return trainer


@pytest.fixture(scope="module")
def naive(trainer: GradientTrainer, model: Path) -> Iterator[NaiveLoop]:
    yield NaiveLoop(trainer, str(model))


@pytest.fixture(scope="module")
def rollouts() -> list[Rollout]:
    """Pairs and a group of three, of different lengths, with slightly different engine log-probabilities."""
    random = np.random.default_rng(3)
    lengths = ((3, 8), (4, 7), (5, 6, 1), (6, 5))
    return [r for i, each in enumerate(lengths) for r in make_group(random, f"g{i}", 1 + i, each)]


@pytest.mark.parametrize("loss", LOSSES)
def test_mini_batch_sums_the_gradients_of_single_rollouts(
    trainer: GradientTrainer, naive: NaiveLoop, rollouts: list[Rollout], loss: str
) -> None:
    mine = trainer.gradients(rollouts, LOSSES[loss])
    assert_same_gradients(mine, naive.gradients(rollouts, LOSSES[loss]))


def test_every_loss_has_a_gradient_of_its_own(naive: NaiveLoop, rollouts: list[Rollout]) -> None:
    """Otherwise the comparison could not distinguish the losses."""
    norms = []
    for loss in LOSSES.values():
        naive_gradients = naive.gradients(rollouts, loss)
        norms.append(float(torch.stack([gradient.norm() for gradient in naive_gradients.values()]).norm()))
    assert len({round(norm, 6) for norm in norms}) == len(LOSSES)
