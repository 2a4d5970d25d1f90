"""The values file for Qwen3-4B, and the settings of compose's GPU profile, are the paper's."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from tests.chart.rendering import render, values_of
from tests.chart.test_images import DEPLOY

from poise.learner.config import LearnerConfig
from poise.orchestrator.config import OrchestratorConfig
from poise.runtime.config.load import parse_config
from poise.value.config import ValueConfig

PARAMETERS = 4.02e9
FLOAT32_STATE_GB = 16 * PARAMETERS / 1e9
"""Bytes a parameter: weights, two moments, gradient."""

SOURCES = ("chart", "compose")


def settings(source: str, role: str) -> dict[str, Any]:
    if source == "chart":
        return render(values_of("qwen3-4b-two-gpus")).config(role)
    read: dict[str, Any] = yaml.safe_load((DEPLOY / "compose" / f"{role}-gpu.yaml").read_text())
    return read


@pytest.mark.parametrize("source", SOURCES)
def test_learner_settings_are_the_papers(source: str) -> None:
    config = parse_config(LearnerConfig, settings(source, "learner"))
    loss, optimizer = config.loss, config.optimizer
    assert (loss.policy, loss.aggregation, loss.clip_low, loss.clip_high) == ("ppo", "token_mean", 0.2, 0.28)
    assert (loss.dual_clip, loss.kl_coefficient) == (10, 0)
    # The cap has no effect unless ratios are taken to the policy before the step.
    assert (loss.old_logprobs, loss.importance_cap) == ("recompute", 2)
    assert (optimizer.learning_rate, optimizer.weight_decay) == (1e-6, 0.01)
    assert (optimizer.warmup_updates, optimizer.gradient_clip, config.mini_batch_prompts) == (10, 1.0, 32)


@pytest.mark.parametrize("source", SOURCES)
def test_probe_settings_are_the_papers(source: str) -> None:
    train = parse_config(OrchestratorConfig, settings(source, "train"))
    probe = parse_config(ValueConfig, settings(source, "value")).probe
    assert probe.inputs == ("prompt_hidden", "response_hidden", "entropy")
    assert (probe.prompt_components, probe.response_components, probe.rows_per_component) == (32, 64, 1)
    assert (probe.alpha, probe.warmup_steps) == (100, 16)
    assert [probe.rows_of(task.domain) for task in train.tasks if task.domain] == [4096]
    assert (train.prompts_per_step, train.group_size) == (256, 2)
    assert (train.algorithm.estimator, train.algorithm.bootstrap_baseline) == ("probe", "rloo")
    assert (train.sampling.temperature, train.sampling.top_p, train.max_staleness) == (1.0, 1.0, 0)


@pytest.mark.parametrize("source", SOURCES)
def test_training_fits_the_requested_gpu(source: str) -> None:
    config = parse_config(LearnerConfig, settings(source, "learner"))
    copies_gb = 2 * PARAMETERS / 1e9 * (config.dtype == "bfloat16")
    assert config.lora is None and config.gradient_checkpointing
    assert 72 < FLOAT32_STATE_GB + copies_gb < 0.6 * 141
    assert "141" in (DEPLOY.parent / "helm/poise/values/qwen3-4b-two-gpus.yaml").read_text().splitlines()[0]
