"""The gradient of a mini-batch before clipping, from the learner and from a naive loop over rollouts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import transformers

from poise.learner.config import LearnerConfig, LossConfig
from poise.learner.distributed.fsdp import full_tensor, shard_like
from poise.learner.distributed.process_group import World
from poise.learner.training.trainer import Trainer
from poise_client.types import Rollout

LOSSES = {
    f"{policy}-{aggregation}{'-kl' if kl else ''}": LossConfig(
        policy=policy, aggregation=aggregation, kl_coefficient=kl, normalizer_tokens=16, dual_clip=1.5
    )
    for policy, aggregation, kl in itertools.product(
        ("ppo", "gspo", "cispo"), ("token_mean", "sequence_mean", "constant"), (0.0, 0.3)
    )
}
"""Every policy loss, by every aggregation, with and without a KL to the reference."""

TEMPERATURE = 0.8


class GradientTrainer(Trainer):
    """A trainer with a reference model, whose policy differs from it, that only computes gradients."""

    def __init__(self, config: LearnerConfig) -> None:
        super().__init__(config.model_copy(update={"loss": LossConfig(kl_coefficient=1.0)}))
        self._gradients: dict[str, torch.Tensor] = {}

    def load(self) -> World:
        world = super().load()
        self.optimizer.clip = self._keep  # type: ignore[method-assign]
        return world

    @torch.no_grad()
    def leave_the_reference(self) -> None:
        random = torch.Generator().manual_seed(1)
        for _, parameter in self.policy.trained():
            here = full_tensor(parameter)
            parameter.copy_(shard_like(parameter, here + 0.02 * torch.randn(here.shape, generator=random)))

    def gradients(self, rollouts: Sequence[Rollout], loss: LossConfig) -> dict[str, torch.Tensor]:
        reference, config = self.reference, self._config
        self._config = config.model_copy(update={"loss": loss})
        self.reference = reference if loss.kl_coefficient else None
        self.train(rollouts, TEMPERATURE)
        self._config, self.reference = config, reference
        return self._gradients

    def _keep(self) -> float:
        """Keep the gradient. Return infinity, so that the trainer skips the update."""
        self._gradients = {name: full_tensor(p.grad).clone() for name, p in self.policy.trained()}
        return math.inf


class NaiveLoop:
    """Computes one rollout at a time with the papers' formulas."""

    def __init__(self, trainer: GradientTrainer, folder: str) -> None:
        load = transformers.AutoModelForCausalLM.from_pretrained
        self.model, self.reference = (load(folder, dtype=torch.float32) for _ in range(2))
        self.model.load_state_dict({name: p.detach() for name, p in trainer.policy.trained()}, strict=False)

    def gradients(self, rollouts: Sequence[Rollout], loss: LossConfig) -> dict[str, torch.Tensor]:
        self.model.zero_grad()
        num_tokens = sum(rollout.token_ids.size for rollout in rollouts)
        for rollout in rollouts:
            losses = self._token_losses(rollout, loss)
            if loss.aggregation == "token_mean":
                share = losses.sum() / num_tokens
            elif loss.aggregation == "sequence_mean":
                share = losses.mean() / len(rollouts)
            else:
                share = losses.sum() / loss.normalizer_tokens / len(rollouts)
            share.backward()
        return {name: p.grad for name, p in self.model.named_parameters()}

    def _token_losses(self, rollout: Rollout, loss: LossConfig) -> torch.Tensor:
        logprobs, advantage = _logprobs(self.model, rollout), rollout.advantage
        log_ratios = logprobs - torch.from_numpy(rollout.logprobs)
        if loss.policy == "cispo":
            weights = log_ratios.exp().clamp(1 - loss.clip_low, 1 + loss.clip_high).detach()
            losses = -weights * advantage * logprobs
        else:
            ratios = (log_ratios.mean().expand_as(log_ratios) if loss.policy == "gspo" else log_ratios).exp()
            clipped = ratios.clamp(1 - loss.clip_low, 1 + loss.clip_high)
            losses = torch.maximum(-advantage * ratios, -advantage * clipped)
            if loss.policy == "ppo" and advantage < 0:
                losses = losses.clamp(max=-advantage * loss.dual_clip)
        if loss.kl_coefficient:
            with torch.no_grad():
                reference = _logprobs(self.reference, rollout)
            d = reference - logprobs
            losses = losses + loss.kl_coefficient * (d.exp() - d - 1)
        return losses


def _logprobs(model: transformers.PreTrainedModel, rollout: Rollout) -> torch.Tensor:
    tokens = torch.tensor([[*rollout.prompt_token_ids, *rollout.token_ids]])
    num_prompt = rollout.prompt_token_ids.size
    logprobs = torch.log_softmax(model(tokens).logits[0, num_prompt - 1 : -1] / TEMPERATURE, -1)
    return logprobs.gather(-1, tokens[0, num_prompt:, None])[:, 0]


def assert_same_gradients(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Check equality to a few float32 roundings of each parameter's largest element."""
    assert mine.keys() == theirs.keys()
    for name, gradient in theirs.items():
        largest = float(gradient.abs().max())
        assert largest > 0, name
        torch.testing.assert_close(
            mine[name], gradient, rtol=1e-4, atol=2e-5 * largest, msg=lambda m, n=name: f"{n}: {m}"
        )
