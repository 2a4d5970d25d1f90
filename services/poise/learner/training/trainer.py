"""One batch in, the numbers of the step out.

Knows no versions, no files but the model's, no transport. With several processes each runs one, with the same calls;
each computes its share of the rows, and all come to the same numbers.

Shapes: N response tokens of a packed row.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

import torch

from poise.errors import Unusable
from poise.learner.config import LearnerConfig
from poise.learner.distributed.process_group import World, join, leave
from poise.learner.distributed.rank_health import RankEvents, RankHealth
from poise.learner.models.model_set import Models, Update
from poise.learner.models.policy import Policy
from poise.learner.storage.random_state import random_state, restore_random_state
from poise.learner.training.flops import ModelSize, model_size, peak_flops
from poise.learner.training.gradients import Sums
from poise.learner.training.minibatch import MiniBatch, build_mini_batch
from poise.learner.training.packing import group_by_prompt
from poise.runtime.models.decoder import position_limit
from poise_client.types import StepMetrics, TrainingRollout, WeightArray

_NO_LIMIT = 2**31 - 1


class Trainer:
    """One process's part in the training. Its calls must not overlap."""

    def __init__(self, config: LearnerConfig) -> None:
        self._config = config
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        self._world = World(_device(config.device))
        self._loaded: Models | None = None
        self._num_updates = 0
        """Steps ever taken by the policy and, with it, by its critic: their learning rates follow it."""
        self.num_skipped_in_a_row = 0
        """Mini-batches since the last one that changed the policy."""
        self._size: ModelSize | None = None

    def load(self) -> World:
        """Meet the other processes and load the model to start from; return once all of them have loaded it.

        Raises:
            BackendDown: it cannot be loaded, or cannot be trained.
            RankLost: another process did not come, or was lost.
        """
        config = self._config
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        self._world = join(config.device, config.rank_timeout_s)
        self._loaded = Models(config, self._world)
        if self._world.health is not None:
            self._world.health.wait_for_all("loaded")
        self._size = model_size(self.policy.model)
        return self._world

    @property
    def health(self) -> RankHealth | None:
        """Watches the other processes; None where there are none, and before `load` has met them."""
        return self._world.health

    @property
    def is_one_of_several(self) -> bool:
        """Whether other processes train too."""
        return self._world.size > 1

    @property
    def max_tokens(self) -> int:
        """Most tokens of prompt and response together."""
        return position_limit(self.policy.model.config) or _NO_LIMIT

    @property
    def vocabulary_size(self) -> int:
        """Ids are below it."""
        size: int = self.policy.model.config.get_text_config().vocab_size
        return size

    def train(self, rollouts: Sequence[TrainingRollout], temperature: float) -> StepMetrics:
        """Take one optimizer step for each mini-batch of prompts, one epoch. Needs at least one rollout.

        With a critic, rollouts need rewards, and advantages are made of these. A mini-batch of which a loss or gradient
        is not finite changes nothing, and has no part in the means.
        """
        started = time.monotonic()
        groups = group_by_prompt(rollouts)
        size = self._config.mini_batch_prompts
        mini_batches = [
            build_mini_batch(groups[start : start + size], self._config, self._world, self.policy.logprobs.mode.packed)
            for start in range(0, len(groups), size)
        ]
        before, explained_variance = self._models.before(mini_batches, temperature)
        updates: list[Update] = []
        totals, units = Sums(), 0
        num_updates = self._num_updates
        for index, mini_batch in enumerate(mini_batches):
            updates.append(
                self._models.update(mini_batch, before[index], temperature, self._num_updates, first=index == 0)
            )
            if not updates[-1].is_finite:
                self.num_skipped_in_a_row += 1
                continue
            self._num_updates += 1
            self.num_skipped_in_a_row = 0
            totals += updates[-1].sums
            units += mini_batch.denominator
        num_updates = self._num_updates - num_updates
        train_s = time.monotonic() - started
        num_model_tokens = sum(mini_batch.num_tokens for mini_batch in mini_batches)
        variances = [each.variance for each in updates if each.is_finite and each.variance is not None]
        clips = (totals.clip_low, totals.clip_high, totals.dual_clip)
        return StepMetrics(
            loss=_mean(totals.loss, units),
            entropy=_mean(totals.entropy, totals.num_tokens),
            mismatch_logprob=_mean(totals.mismatch_logprob, totals.num_compared),
            mismatch_kl=_mean(totals.mismatch_kl, totals.num_compared),
            clip_share=_mean(sum(clips), totals.num_tokens),
            clip_low_share=_mean(totals.clip_low, totals.num_tokens),
            clip_high_share=_mean(totals.clip_high, totals.num_tokens),
            dual_clip_share=_mean(totals.dual_clip, totals.num_tokens),
            truncated_share=_mean(totals.truncated, totals.num_tokens),
            reference_kl=_mean(totals.reference_kl, totals.num_tokens),
            gradient_norm=_mean(sum(update.norm for update in updates), len(updates)),
            learning_rate=self._models.optimizer.learning_rate(max(0, self._num_updates - 1)),
            num_tokens=int(totals.num_tokens),
            num_rollouts=len(rollouts),
            num_updates=num_updates,
            num_skipped_updates=len(mini_batches) - num_updates,
            num_model_tokens=num_model_tokens,
            train_s=train_s,
            tokens_per_s=num_model_tokens / train_s,
            mfu=self._mfu(mini_batches, train_s),
            value_loss=_mean(totals.value_loss, totals.num_tokens) if self._config.critic else 0.0,
            explained_variance=explained_variance,
            critic_gradient_norm=_mean(sum(update.critic_norm for update in updates), len(updates)),
            gradient_variance=_mean(sum(variances), len(variances)) if self._config.measure_gradient_variance else 0.0,
        )

    def weights(self) -> dict[str, WeightArray]:
        """See `Policy.weights`."""
        return self.policy.weights()

    def save_model(self, folder: str) -> None:
        """See `Policy.save`."""
        self.policy.save(folder)

    def save_without_parameters(self, folder: str) -> None:
        """See `Policy.save_without_parameters`; on this process only."""
        self.policy.save_without_parameters(folder)

    def num_parameters(self) -> int:
        """Return the number of the policy's parameters, tied ones once."""
        return sum(parameter.numel() for parameter in self.policy.model.parameters())

    def trained_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of what `state` gives of the policy itself, by the names it gives them."""
        return {f"model.{name}": tuple(parameter.shape) for name, parameter in self.policy.trained()}

    def state(self) -> tuple[dict[str, torch.Tensor], int]:
        """Return all that training goes on from: tensors by name, and the count of updates. Not copies.

        The tensors are empty on all processes but the first.
        """
        return self._models.state() | random_state(self._world), self._num_updates

    def restore(self, tensors: Mapping[str, torch.Tensor], num_updates: int) -> None:
        """Take over what `state` gave.

        Raises:
            KeyError: a parameter is missing. The trainer is then half restored: load it again.
        """
        self._models.restore(tensors)
        restore_random_state(tensors, self._world)
        self._num_updates = num_updates

    def listen(self, events: RankEvents) -> None:
        """Have the first of several processes call these, from `load` on; nothing happens with one process."""

    def ping(self) -> None:
        """Check that the other processes, where there are any, still take commands.

        Raises:
            RankLost: one does not.
        """

    def touch(self) -> None:
        """Show the other processes, where there are any, that this one's event loop runs."""
        if self.health is not None:
            self.health.touch()

    def close(self) -> None:
        """Part from the other processes."""
        if self.health is not None:
            self.health.stop()
        leave()

    @property
    def policy(self) -> Policy:
        """What is trained; loaded."""
        return self._models.policy

    @property
    def _models(self) -> Models:
        assert self._loaded is not None  # noqa: S101 (loaded)
        return self._loaded

    def _mfu(self, mini_batches: Sequence[MiniBatch], train_s: float) -> float:
        world = self._world
        peak = self._config.peak_flops or peak_flops(world.device, self._dtype)
        critic = self._models.critic
        sizes = [self._size, *([] if critic is None else [critic.size])]
        if peak is None or None in sizes:
            return 0.0
        own = sum(
            size.training_flops(row.num_tokens, row.targets_N.numel(), row.num_attended)
            for mini_batch in mini_batches
            for row in mini_batch.own(mini_batch.rows)
            for size in sizes
            if size is not None
        )
        flops = float(world.sum(torch.tensor(float(own), device=world.device)))
        return flops / train_s / (world.size * peak)


def _mean(total: float, count: float) -> float:
    """Over nothing, not a number."""
    return total / count if count else math.nan


def _device(name: str) -> torch.device:
    """Return a torch device of this machine. Raises `Unusable`. Makes no CUDA context: each would take memory."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise Unusable(f"device {name} cannot be used: {str(error).splitlines()[0]}") from error
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise Unusable(f"device {name} cannot be used: this process sees {count} CUDA devices")
    return device
