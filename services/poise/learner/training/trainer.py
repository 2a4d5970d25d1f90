"""The training step: trains on a batch of rollouts and returns the step's metrics.

Each rank has a `Trainer`, and all ranks make the same calls. Each computes its share of the rows, and all return the
same metrics.

Shapes: N response tokens of a packed row.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from poise.errors import Unusable
from poise.learner.config import LearnerConfig
from poise.learner.distributed.process_group import World, join, leave
from poise.learner.distributed.rank_health import RankEvents, RankHealth
from poise.learner.models.critic import Critic
from poise.learner.models.forward import PackedForward
from poise.learner.models.policy import Policy, load_reference
from poise.learner.storage.random_state import random_state, restore_random_state
from poise.learner.training.flops import ModelSize, model_size, peak_flops
from poise.learner.training.gradient_variance import HalfGradient
from poise.learner.training.gradients import PreviousOutputs, TokenSums, accumulate_gradient
from poise.learner.training.minibatch import MiniBatch, build_mini_batch
from poise.learner.training.optimizer import Optimizer
from poise.learner.training.packing import PackedRow, group_by_prompt
from poise.runtime.models.decoder import position_limit
from poise_client.types import Rollout, StepMetrics, WeightArray

logger = logging.getLogger(__name__)

_NO_LIMIT = 2**31 - 1
_CRITIC = "critic."
"""Prefix of the critic's tensors in the state."""


@dataclass(frozen=True, slots=True)
class Update:
    """The outcome of one mini-batch."""

    sums: TokenSums
    """Over all ranks."""
    gradient_norm: float
    """Norm of the policy's gradient before clipping."""
    critic_gradient_norm: float
    """Norm of the critic's gradient before clipping; 0 without a critic."""
    gradient_variance: float | None
    """Variance of the policy's gradient before clipping; None if not measured."""

    @property
    def is_finite(self) -> bool:
        """Whether losses and gradients were finite. Otherwise no model was updated."""
        values = (self.sums.loss, self.gradient_norm, self.sums.value_loss, self.critic_gradient_norm)
        return all(map(math.isfinite, values))


class Trainer:
    """The models and optimizers of one rank. Its calls must not overlap."""

    policy: Policy
    """The model that is trained. `load` sets it, `optimizer`, `critic` and `reference`."""
    optimizer: Optimizer
    critic: Critic | None
    """None unless `learner.critic` is set."""
    reference: PackedForward | None
    """The model that training started from; None unless the loss has a KL term."""

    def __init__(self, config: LearnerConfig) -> None:
        self._config = config
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        self._world = World(_device(config.device))
        self._num_updates = 0
        """Updates so far. They determine the learning rates of policy and critic."""
        self.num_skipped_in_a_row = 0
        """Mini-batches skipped since the last one that changed the policy."""
        self._size: ModelSize | None = None

    def load(self) -> World:
        """Join the other ranks and load the models; return once all ranks have loaded theirs.

        Raises:
            BackendDown: a model cannot be loaded, or cannot be trained.
            RankLost: another rank did not join, or was lost.
        """
        config = self._config
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        world = self._world = join(config.device, config.rank_timeout_s)
        self.policy = Policy(config, world)
        self.optimizer = Optimizer(self.policy.trained(), config.optimizer, world)
        self.critic = None if config.critic is None else Critic(config, config.critic, world)
        self.reference = load_reference(config, world) if config.loss.kl_coefficient else None
        if world.health is not None:
            world.health.wait_for_all("loaded")
        self._size = model_size(self.policy.model)
        return world

    @property
    def health(self) -> RankHealth | None:
        """Watches the other ranks; None without any, and before `load`."""
        return self._world.health

    @property
    def has_other_ranks(self) -> bool:
        """Whether other ranks train too."""
        return self._world.size > 1

    @property
    def max_tokens(self) -> int:
        """Maximum tokens of prompt and response together."""
        return position_limit(self.policy.model.config) or _NO_LIMIT

    @property
    def vocabulary_size(self) -> int:
        """Upper bound of token ids, exclusive."""
        size: int = self.policy.model.config.get_text_config().vocab_size
        return size

    def train(self, rollouts: Sequence[Rollout], temperature: float) -> StepMetrics:
        """Train one epoch on at least one rollout, with one optimizer step for each mini-batch of prompts.

        With a critic, rollouts need rewards, from which their advantages are computed. A mini-batch with a loss or
        gradient that is not finite changes nothing and is left out of the metrics' means.
        """
        started = time.monotonic()
        groups = group_by_prompt(rollouts)
        size, packed = self._config.mini_batch_prompts, self.policy.logprobs.mode.packed
        mini_batches = [
            build_mini_batch(groups[start : start + size], self._config, self._world, packed)
            for start in range(0, len(groups), size)
        ]
        previous, explained_variance = self._previous_outputs(mini_batches, temperature)
        updates: list[Update] = []
        totals, denominator = TokenSums(), 0
        for index, mini_batch in enumerate(mini_batches):
            update = self.update(mini_batch, previous[index], temperature, first=index == 0)
            updates.append(update)
            if not update.is_finite:
                self.num_skipped_in_a_row += 1
                continue
            self._num_updates += 1
            self.num_skipped_in_a_row = 0
            totals += update.sums
            denominator += mini_batch.denominator
        train_s = time.monotonic() - started
        num_skipped = sum(not update.is_finite for update in updates)
        num_model_tokens = sum(mini_batch.num_tokens for mini_batch in mini_batches)
        variances = [u.gradient_variance for u in updates if u.is_finite and u.gradient_variance is not None]
        num_tokens = totals.num_tokens
        return StepMetrics(
            loss=_mean(totals.loss, denominator),
            entropy=_mean(totals.entropy, num_tokens),
            mismatch_logprob=_mean(totals.mismatch_logprob, totals.num_compared),
            mismatch_kl=_mean(totals.mismatch_kl, totals.num_compared),
            clip_share=_mean(totals.clip_low + totals.clip_high + totals.dual_clip, num_tokens),
            clip_low_share=_mean(totals.clip_low, num_tokens),
            clip_high_share=_mean(totals.clip_high, num_tokens),
            dual_clip_share=_mean(totals.dual_clip, num_tokens),
            truncated_share=_mean(totals.truncated, num_tokens),
            reference_kl=_mean(totals.reference_kl, num_tokens),
            gradient_norm=_mean(sum(update.gradient_norm for update in updates), len(updates)),
            learning_rate=self.optimizer.learning_rate(max(0, self._num_updates - 1)),
            num_tokens=int(num_tokens),
            num_rollouts=len(rollouts),
            num_updates=len(updates) - num_skipped,
            num_skipped_updates=num_skipped,
            num_model_tokens=num_model_tokens,
            train_s=train_s,
            tokens_per_s=num_model_tokens / train_s,
            mfu=self._mfu(mini_batches, train_s),
            value_loss=_mean(totals.value_loss, num_tokens) if self._config.critic else 0.0,
            explained_variance=explained_variance,
            critic_gradient_norm=_mean(sum(update.critic_gradient_norm for update in updates), len(updates)),
            gradient_variance=_mean(sum(variances), len(variances)) if self._config.measure_gradient_variance else 0.0,
        )

    def update(
        self, mini_batch: MiniBatch, previous: Sequence[PreviousOutputs], temperature: float, *, first: bool
    ) -> Update:
        """Take one optimizer step of the policy and, if there is one, the critic. Update both or neither.

        Args:
            mini_batch: the rollouts.
            previous: outputs for each row from before the step.
            temperature: the sampling temperature.
            first: whether this is the first mini-batch of its batch.
        """
        optimizers = [self.optimizer] if self.critic is None else [self.optimizer, self.critic.optimizer]
        for optimizer in optimizers:
            optimizer.zero_grad()
        sums, variance = self._backward(mini_batch, previous, temperature, first=first)
        if self.critic is not None:
            sums += TokenSums(value_loss=self.critic.backward(mini_batch, previous))
        sums = TokenSums.from_tensor(self._world.sum(sums.to_tensor(self._world.device)))
        norm, *critic_norm = [optimizer.clip() for optimizer in optimizers]
        update = Update(sums, norm, sum(critic_norm), variance)
        if update.is_finite:
            for optimizer in optimizers:
                optimizer.step(self._num_updates)
            return update
        logger.error(
            "skipped a mini-batch: loss %s, gradient norm %s%s. Check its %s",
            sums.loss,
            norm,
            f", critic loss {sums.value_loss}, critic gradient norm {critic_norm[0]}" if critic_norm else "",
            "rewards" if critic_norm else "advantages",
        )
        for optimizer in optimizers:
            optimizer.zero_grad()
        return update

    def weights(self) -> dict[str, WeightArray]:
        """Return the weights to push, see `Policy.weights`."""
        return self.policy.weights()

    def save_model(self, folder: str) -> None:
        """Write the policy as a Hugging Face folder, see `Policy.save`."""
        self.policy.save(folder)

    def num_parameters(self) -> int:
        """Return the number of the policy's parameters; tied ones count once."""
        return sum(parameter.numel() for parameter in self.policy.model.parameters())

    def trained_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the policy's trained parameters, by their names in `state`."""
        return {f"model.{name}": tuple(parameter.shape) for name, parameter in self.policy.trained()}

    def state(self) -> tuple[dict[str, torch.Tensor], int]:
        """Return the state that training resumes from: tensors by name, not copied, and the number of updates.

        The tensors are empty on all ranks but 0.
        """
        tensors = self.optimizer.state()
        if self.critic is not None:
            tensors |= {f"{_CRITIC}{name}": tensor for name, tensor in self.critic.optimizer.state().items()}
        return tensors | random_state(self._world), self._num_updates

    def restore(self, tensors: Mapping[str, torch.Tensor], num_updates: int) -> None:
        """Restore what `state` returned.

        Raises:
            KeyError: a parameter is missing. The trainer is then unusable until it is loaded again.
        """
        self.optimizer.restore(tensors)
        if self.critic is not None:
            own = {name.removeprefix(_CRITIC): each for name, each in tensors.items() if name.startswith(_CRITIC)}
            self.critic.optimizer.restore(own)
        restore_random_state(tensors, self._world)
        self._num_updates = num_updates

    def listen(self, events: RankEvents) -> None:
        """Set the callbacks about other ranks; call it on rank 0 before `load`. Unused with one rank."""

    def ping(self) -> None:
        """Check that the other ranks, if any, still take commands.

        Raises:
            RankLost: one does not.
        """

    def touch(self) -> None:
        """Tell the other ranks, if any, that this rank's event loop runs."""
        if self.health is not None:
            self.health.touch()

    def close(self) -> None:
        """Leave the process group."""
        if self.health is not None:
            self.health.stop()
        leave()

    @torch.no_grad()
    def _previous_outputs(
        self, mini_batches: Sequence[MiniBatch], temperature: float
    ) -> tuple[list[list[PreviousOutputs]], float]:
        """Return the outputs for each row from before the step, and the explained variance, 0 without a critic."""
        recompute = self._config.loss.old_logprobs == "recompute"
        previous = []
        for index, mini_batch in enumerate(mini_batches):
            # The first mini-batch's own forward pass gives the policy's log-probabilities from before the step.
            models = (self.policy.logprobs if recompute and index > 0 else None, self.reference)
            rows = [
                [None if model is None else model(row, temperature)[0] for model in models] for row in mini_batch.rows
            ]
            previous.append([PreviousOutputs(*outputs) for outputs in rows])
        if self.critic is None:
            return previous, 0.0
        targets, explained_variance = self.critic.targets(mini_batches)
        with_targets = [
            [dataclasses.replace(outputs, critic=of_critic) for outputs, of_critic in zip(*rows, strict=True)]
            for rows in zip(previous, targets, strict=True)
        ]
        return with_targets, explained_variance

    def _backward(
        self, mini_batch: MiniBatch, previous: Sequence[PreviousOutputs], temperature: float, *, first: bool
    ) -> tuple[TokenSums, float | None]:
        """Compute the policy's gradient; return this rank's sums, and the gradient's variance if it is measured."""

        def forward(row: PackedRow) -> tuple[torch.Tensor, torch.Tensor]:
            outputs: tuple[torch.Tensor, torch.Tensor] = self.policy.logprobs(row, temperature)
            return outputs

        halves, half, sums = mini_batch.halves, None, TokenSums()
        for index, (row, outputs, counts) in enumerate(zip(mini_batch.rows, previous, mini_batch.counts, strict=True)):
            if halves is not None and index == halves.num_rows:
                half = HalfGradient(self.optimizer.parameters, halves.num_groups)
            row_sums = accumulate_gradient(
                forward,
                row,
                outputs,
                first=first,
                denominator=mini_batch.denominator if counts else math.inf,
                config=self._config.loss,
            )
            sums += row_sums if counts else TokenSums()
        return sums, None if half is None else half.variance(self._world)

    def _mfu(self, mini_batches: Sequence[MiniBatch], train_s: float) -> float:
        """Return the model FLOP/s utilization; 0 if the FLOPs or the device's peak are unknown."""
        world = self._world
        peak = self._config.peak_flops or peak_flops(world.device, self._dtype)
        sizes = [self._size, *([] if self.critic is None else [self.critic.size])]
        if peak is None or None in sizes:
            return 0.0
        own = sum(
            size.training_flops(row.num_tokens, row.targets_N.numel(), row.num_attended)
            for mini_batch in mini_batches
            for row in mini_batch.without_padding(mini_batch.rows)
            for size in sizes
            if size is not None
        )
        flops = float(world.sum(torch.tensor(float(own), device=world.device)))
        return flops / train_s / (world.size * peak)


def has_critic_tensors(names: Iterable[str]) -> bool:
    """Return whether a state with these tensor names has a critic."""
    return any(name.startswith(_CRITIC) for name in names)


def _mean(total: float, count: float) -> float:
    """Return total / count, or NaN if there is nothing to count."""
    return total / count if count else math.nan


def _device(name: str) -> torch.device:
    """Return a torch device of this machine without creating a CUDA context, which takes memory. Raises `Unusable`."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise Unusable(f"device {name} cannot be used: {str(error).splitlines()[0]}") from error
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise Unusable(f"device {name} cannot be used: this process has {count} CUDA devices")
    return device
