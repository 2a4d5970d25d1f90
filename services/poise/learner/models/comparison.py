"""Compares engines, learner and adapters with a model's own forward, for `poise models check`.

Shapes: N response tokens.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from poise.errors import BackendDown
from poise.learner.config import LearnerConfig, LoraSettings
from poise.learner.distributed.fsdp import full_tensor
from poise.learner.distributed.process_group import World
from poise.learner.models.backbone import load_config, load_model
from poise.learner.models.forward_check import (
    LARGEST_NATS,
    MEAN_NATS,
    MEAN_NATS_BFLOAT16,
    Difference,
    random_groups,
    reference_logprobs,
    use_attention,
)
from poise.learner.models.lora import merged as merged_parameters
from poise.learner.models.policy import Policy
from poise.learner.training.packing import PromptGroup, build_row, group_by_prompt
from poise_client.types import Rollout

_ADAPTER_STD = 0.02
"""Standard deviation of the adapters' elements in the comparison. New adapters are zero and would test nothing."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """How much a part's log-probabilities differ from the model's own forward in float32, on the same tokens."""

    part: str
    """"engine torch", "engine vllm", "learner" or "adapters"."""
    dtype: str
    """The part's element type."""
    difference: Difference | None = None
    """None if the part fails."""
    detail: str = ""
    """The part's forward mode, or why it fails."""
    is_needed: bool = True
    """Whether training with these settings uses the part."""

    @property
    def allowed_nats(self) -> tuple[float | None, float]:
        """Allowed largest and mean difference. The first is None if single tokens have no limit."""
        return (LARGEST_NATS, MEAN_NATS) if self.dtype == "float32" else (None, MEAN_NATS_BFLOAT16)

    @property
    def is_within_limits(self) -> bool:
        """Whether the difference is within the allowed limits."""
        if self.difference is None:
            return False
        largest, mean = self.allowed_nats
        return self.difference.mean <= mean and (largest is None or self.difference.largest <= largest)


@dataclass(frozen=True, slots=True)
class EngineSample:
    """Rollouts that an engine sampled, or why it could not."""

    engine: str
    rollouts: Sequence[Rollout] = ()
    failure: str = ""


def checkpoint_dtype(model: str) -> str:
    """Return the element type that a model's config declares; float32 if it declares none.

    Raises:
        Unusable: transformers cannot load its config.
    """
    return str(load_config(model).get_text_config().dtype or torch.float32).removeprefix("torch.")


def compare(config: LearnerConfig, samples: Sequence[EngineSample], engine_dtype: str) -> list[Comparison]:
    """Compare engines, learner and adapters with the model's own forward, on rollouts that the engines sampled.

    Learner and adapters are compared on the first engine's rollouts, or on random tokens if no engine has any.

    Raises:
        BackendDown: the model cannot be loaded.
    """
    model = load_model(config).to(config.device)
    rollouts = next((sample.rollouts for sample in samples if sample.rollouts), None)
    groups = random_groups(model) if rollouts is None else group_by_prompt(rollouts)
    return [
        *(_engine(model, sample, engine_dtype) for sample in samples),
        _learner(config, model, groups),
        _adapters(config, model, groups),
    ]


def _engine(model: Any, sample: EngineSample, dtype: str) -> Comparison:
    part = f"engine {sample.engine}"
    if sample.failure:
        return Comparison(part, dtype, detail=sample.failure)
    groups = group_by_prompt(sample.rollouts)
    theirs_N = torch.cat([torch.from_numpy(rollout.logprobs) for group in groups for rollout in group.rollouts])
    return Comparison(part, dtype, Difference.between(theirs_N, _own(model, groups).cpu()))


def _learner(config: LearnerConfig, model: Any, groups: Sequence[PromptGroup]) -> Comparison:
    try:
        policy = _policy(config, lora=None)
        difference = Difference.between(_logprobs(policy, config, groups), _own(model, groups))
        with tempfile.TemporaryDirectory(prefix="poise-export-") as folder:
            policy.save_without_parameters(folder)
    except BackendDown as error:
        return Comparison("learner", config.dtype, detail=_reason(error))
    except Exception as error:  # architectures and tokenizers raise errors of many kinds
        return Comparison("learner", config.dtype, detail=f"its export fails: {type(error).__name__}: {error}")
    return Comparison("learner", config.dtype, difference, str(policy.logprobs.mode))


def _adapters(config: LearnerConfig, model: Any, groups: Sequence[PromptGroup]) -> Comparison:
    """Compare the learner's adapters with the merged model, which replicas get."""
    lora, is_needed = config.lora or LoraSettings(), config.lora is not None
    try:
        policy = _policy(config, lora)
        random = torch.Generator(config.device).manual_seed(0)
        with torch.no_grad():
            for _, parameter in policy.trained():
                parameter.normal_(0, _ADAPTER_STD, generator=random)
            merged = dict(merged_parameters(policy.model, full_tensor))
            for name, parameter in model.named_parameters():
                parameter.copy_(merged[name])
        difference = Difference.between(_logprobs(policy, config, groups), _own(model, groups))
    except BackendDown as error:
        return Comparison("adapters", config.dtype, detail=_reason(error), is_needed=is_needed)
    return Comparison("adapters", config.dtype, difference, f"rank {lora.rank}, merged", is_needed)


def _policy(config: LearnerConfig, lora: LoraSettings | None) -> Policy:
    return Policy(config.model_copy(update={"lora": lora, "dropout": False}), World(torch.device(config.device)))


def _reason(error: BackendDown) -> str:
    return f"{error}. {error.remedy}" if error.remedy else str(error)


@torch.no_grad()
def _own(model: Any, groups: Sequence[PromptGroup]) -> torch.Tensor:
    use_attention(model, "eager")
    return reference_logprobs(model, groups)


@torch.no_grad()
def _logprobs(policy: Policy, config: LearnerConfig, groups: Sequence[PromptGroup]) -> torch.Tensor:
    row = build_row(groups, torch.device(config.device), getattr(torch, config.dtype))
    logprobs_N: torch.Tensor = policy.logprobs(row, 1.0)[0]
    return logprobs_N
