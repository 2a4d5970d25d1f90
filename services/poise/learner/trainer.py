"""The policy's optimiser: one batch in, the numbers of the step out.

Knows no versions, no files but the model's, no transport. With several processes each runs one, with the same calls;
each computes its share of the rows, and all come to the same numbers.

Shapes: N response tokens of a packed row.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor

from poise.learner.accumulation import Before, Sums, accumulate
from poise.learner.config import LearnerConfig
from poise.learner.flops import ModelSize, model_size, peak_flops
from poise.learner.losses import denominator
from poise.learner.packing import PackedRow, PromptGroup, build_row, group_by_prompt, pack
from poise.learner.policy import PackedForward, Policy, load_reference
from poise.learner.randomness import random_state, restore_random_state
from poise.learner.world import World, join, leave
from poise_client.types import StepMetrics, TrainingRollout, WeightArray

logger = logging.getLogger(__name__)

_ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class _MiniBatch:
    """What an optimiser step trains on."""

    rows: list[PackedRow]
    """This process's share; as many in every process, for each pass is one of all of them."""
    num_own: int
    """Rows that count; those after them only keep the others company."""
    denominator: int
    """Of all processes' rows."""
    num_tokens: int
    """Through the model, in all processes."""


class Trainer:
    """One process's part in the training. Its calls must not overlap."""

    def __init__(self, config: LearnerConfig) -> None:
        self._config = config
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        self._world = World(torch.device(config.device))
        self._policy: Policy | None = None
        self._reference: PackedForward | None = None
        """The model that training started from; None where the loss does not look at it."""
        self._optimiser: torch.optim.AdamW | None = None
        self._num_updates = 0
        """Optimiser steps ever taken: the learning rate follows it."""
        self.num_skipped_in_a_row = 0
        """Mini-batches since the last one that changed the policy."""
        self._size: ModelSize | None = None

    def load(self) -> World:
        """Meet the other processes and load the model to start from.

        Raises:
            BackendDown: it cannot be loaded, or cannot be trained.
        """
        config = self._config
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        self._world = join(config.device)
        self._policy = Policy(config, self._world)
        self._size = model_size(self._policy.model)
        if config.loss.kl_coefficient:
            self._reference = load_reference(config, self._world)
        settings = config.optimiser
        self._optimiser = torch.optim.AdamW(
            [parameter for _, parameter in self._policy.trained()],
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        return self._world

    @property
    def max_tokens(self) -> int:
        """Most tokens of prompt and response together."""
        limit: int = self.policy.model.config.max_position_embeddings
        return limit

    @property
    def vocabulary_size(self) -> int:
        """Ids are below it."""
        size: int = self.policy.model.config.vocab_size
        return size

    def train(self, rollouts: Sequence[TrainingRollout], temperature: float) -> StepMetrics:
        """Take one optimiser step for each mini-batch of prompts, one epoch. Needs at least one rollout.

        A mini-batch whose loss or gradient is not finite changes nothing, and has no part in the means.
        """
        started = time.monotonic()
        groups = group_by_prompt(rollouts)
        size = self._config.mini_batch_prompts
        mini_batches = [self._mini_batch(groups[start : start + size]) for start in range(0, len(groups), size)]
        # The policy before the step is that of the first mini-batch's only forward pass.
        recompute = self._config.loss.old_logprobs == "recompute"
        before = [
            self._before(each.rows, temperature, policy=recompute and i > 0) for i, each in enumerate(mini_batches)
        ]
        totals, units, norms = Sums(), 0, []
        num_updates = self._num_updates
        for index, mini_batch in enumerate(mini_batches):
            sums, norm = self._update(mini_batch, before[index], temperature, first=index == 0)
            norms.append(norm)
            if self.num_skipped_in_a_row == 0:
                totals += sums
                units += mini_batch.denominator
        num_updates = self._num_updates - num_updates
        train_s = time.monotonic() - started
        num_model_tokens = sum(mini_batch.num_tokens for mini_batch in mini_batches)
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
            gradient_norm=_mean(sum(norms), len(norms)),
            learning_rate=self._learning_rate(max(0, self._num_updates - 1)),
            num_tokens=int(totals.num_tokens),
            num_rollouts=len(rollouts),
            num_updates=num_updates,
            num_skipped_updates=len(mini_batches) - num_updates,
            num_model_tokens=num_model_tokens,
            train_s=train_s,
            tokens_per_s=num_model_tokens / train_s,
            mfu=self._mfu(mini_batches, train_s),
        )

    def weights(self) -> dict[str, WeightArray]:
        """See `Policy.weights`."""
        return self.policy.weights()

    def save_model(self, folder: str) -> None:
        """See `Policy.save`."""
        self.policy.save(folder)

    def trained_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of what `state` gives of the policy itself, by the names it gives them."""
        return {f"model.{name}": tuple(parameter.shape) for name, parameter in self.policy.trained()}

    def state(self) -> tuple[dict[str, torch.Tensor], int]:
        """Return all that training goes on from: tensors by name, and the count of updates. Not copies.

        The tensors are empty on all processes but the first.
        """
        tensors, policy = {}, self.policy
        for name, parameter in policy.trained():
            tensors[f"model.{name}"] = policy.kept(policy.whole(parameter))
            # A parameter that never had a gradient has no state.
            moments = self._adam().state.get(parameter, {})
            tensors |= {f"{kind}.{name}": policy.kept(policy.whole(value)) for kind, value in moments.items()}
        return tensors | random_state(self._world), self._num_updates

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, torch.Tensor], num_updates: int) -> None:
        """Take over what `state` gave.

        Raises:
            KeyError: a parameter is missing. The trainer is then half restored: load it again.
        """
        optimiser, part_of = self._adam(), self.policy.part_of
        for name, parameter in self.policy.trained():
            parameter.copy_(part_of(parameter, tensors[f"model.{name}"]))
            optimiser.state.pop(parameter, None)
            if f"{_ADAM_STATE[0]}.{name}" in tensors:
                step, *moments = (tensors[f"{kind}.{name}"] for kind in _ADAM_STATE)
                values = [step.to(parameter.device, copy=True), *(part_of(parameter, moment) for moment in moments)]
                optimiser.state[parameter] = dict(zip(_ADAM_STATE, values, strict=True))
        restore_random_state(tensors, self._world)
        self._num_updates = num_updates

    def close(self) -> None:
        """Part from the other processes."""
        leave()

    @property
    def policy(self) -> Policy:
        """What is trained; loaded."""
        assert self._policy is not None  # noqa: S101 (loaded)
        return self._policy

    def _adam(self) -> torch.optim.AdamW:
        assert self._optimiser is not None  # noqa: S101 (loaded)
        return self._optimiser

    def _learning_rate(self, update: int) -> float:
        settings = self._config.optimiser
        if update < settings.warmup_updates:
            return settings.learning_rate * (update + 1) / settings.warmup_updates
        return settings.learning_rate

    def _update(
        self, mini_batch: _MiniBatch, before: Sequence[Before], temperature: float, *, first: bool
    ) -> tuple[Sums, float]:
        """Take one optimiser step on the loss of a mini-batch; return its sums, and the gradient's norm."""
        optimiser = self._adam()
        optimiser.zero_grad(set_to_none=True)
        sums = Sums()
        for index, (row, known) in enumerate(zip(mini_batch.rows, before, strict=True)):
            counts = index < mini_batch.num_own
            of_row = accumulate(
                lambda row: self.policy.logprobs(row, temperature),
                row,
                known,
                first=first,
                denominator=mini_batch.denominator if counts else math.inf,
                config=self._config.loss,
            )
            sums += of_row if counts else Sums()
        sums = Sums.from_tensor(self._world.sum(sums.to_tensor(self._world.device)))
        norm = self._clip_gradient()
        if not (math.isfinite(norm) and math.isfinite(sums.loss)):
            logger.error(
                "a mini-batch changes nothing: its loss is %s, the norm of its gradient %s; look at its advantages",
                sums.loss,
                norm,
            )
            optimiser.zero_grad(set_to_none=True)
            self.num_skipped_in_a_row += 1
            return sums, norm
        for group in optimiser.param_groups:
            group["lr"] = self._learning_rate(self._num_updates)
        optimiser.step()
        self._num_updates += 1
        self.num_skipped_in_a_row = 0
        return sums, norm

    def _clip_gradient(self) -> float:
        """Bound the norm of the gradient; return what it was."""
        parameters = [parameter for _, parameter in self.policy.trained()]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self._config.optimiser.gradient_clip)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    @torch.no_grad()
    def _before(self, rows: Sequence[PackedRow], temperature: float, *, policy: bool) -> list[Before]:
        """Ask the policy, if so told, and the reference, if there is one, of the tokens of a mini-batch."""
        reference = self._reference
        return [
            Before(
                self.policy.logprobs(row, temperature)[0] if policy else None,
                reference(row, temperature)[0] if reference is not None else None,
            )
            for row in rows
        ]

    def _mini_batch(self, groups: Sequence[PromptGroup]) -> _MiniBatch:
        """Pack groups into rows, and take every so manieth."""
        world = self._world
        packed = pack(groups, self._config.micro_batch_tokens)
        own = packed[world.rank :: world.size]
        num_rows = -(-len(packed) // world.size)
        rows = [build_row(row, world.device, self._dtype) for row in (*own, *([packed[0]] * (num_rows - len(own))))]
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        num_tokens = sum(int(rollout.token_ids.size) for rollout in rollouts)
        return _MiniBatch(
            rows,
            len(own),
            denominator(num_tokens, len(rollouts), self._config.loss),
            sum(piece.num_tokens for row in packed for piece in row),
        )

    def _mfu(self, mini_batches: Sequence[_MiniBatch], train_s: float) -> float:
        world = self._world
        peak = self._config.peak_flops or peak_flops(world.device, self._dtype)
        if peak is None or self._size is None:
            return 0.0
        own = sum(
            self._size.training_flops(row.num_tokens, row.targets_N.numel(), row.num_attended)
            for mini_batch in mini_batches
            for row in mini_batch.rows[: mini_batch.num_own]
        )
        flops = float(world.sum(torch.tensor(float(own), device=world.device)))
        return flops / train_s / (world.size * peak)


def _mean(total: float, count: float) -> float:
    """Over nothing, not a number."""
    return total / count if count else math.nan
