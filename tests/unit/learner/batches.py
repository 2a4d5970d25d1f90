"""Random batches from a seed, and settings, for the learner's tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from poise.learner.config import LearnerConfig
from poise_client.types import Batch, Rollout, RolloutId, VersionSpan

VOCABULARY = 260


def make_config(folder: Path, state_dir: Path, **changes: object) -> LearnerConfig:
    """Settings of a learner that starts from the model in `folder` and takes large steps."""
    optimizer = {"learning_rate": 1e-3, "warmup_updates": 0} | changes.pop("optimizer", {})  # type: ignore[operator]
    values = {"model": str(folder), "state_dir": state_dir, "threads": 1, "mini_batch_prompts": 2}
    return LearnerConfig(**values | {"optimizer": optimizer} | changes)


def make_group(
    random: np.random.Generator,
    group_id: str,
    num_prompt: int,
    lengths: Sequence[int],
    *,
    step: int = 0,
    version: int = 0,
    run_id: str = "run",
) -> list[Rollout]:
    """Siblings of one prompt, with responses of these lengths; log-probabilities around those of a random model."""
    prompt = random.integers(0, VOCABULARY, num_prompt).astype(np.int32)
    return [
        Rollout(
            RolloutId(run_id, step, group_id, index),
            prompt,
            random.integers(0, VOCABULARY, length).astype(np.int32),
            np.minimum(0, random.normal(-6, 1.5, length)).astype(np.float32),
            advantage=float(np.float32(random.normal())),
            version_spans=(VersionSpan(0, length, version),),
        )
        for index, length in enumerate(lengths)
    ]


def make_batch(
    step: int = 0, *, version: int | None = None, num_prompts: int = 3, temperature: float = 1.0, seed: int = 0
) -> Batch:
    """A batch of pairs sampled by `version`, by default the step's own."""
    random = np.random.default_rng([step, seed])
    version = step if version is None else version
    rollouts = [
        rollout
        for i in range(num_prompts)
        for rollout in make_group(random, f"g{i}", 3 + i, (4 + i, 6 - i), step=step, version=version)
    ]
    return Batch("run", f"step-{step:08d}", step, tuple(rollouts), temperature)


def rewarded(batch: Batch) -> Batch:
    """The batch for a learner with a critic: rewards of 0 and 1, and no advantages."""
    random = np.random.default_rng([batch.step, 7])
    rollouts = [dataclasses.replace(r, advantage=None, reward=float(random.integers(0, 2))) for r in batch.rollouts]
    return dataclasses.replace(batch, rollouts=tuple(rollouts))
