"""Mini-batches: the rollouts of some prompts in packed rows, spread over the ranks.

Every rank packs the whole mini-batch and takes every `world.size`-th row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from poise.learner.config import LearnerConfig
from poise.learner.distributed.process_group import World
from poise.learner.training.losses import denominator
from poise.learner.training.packing import PackedRow, PromptGroup, build_row, pack, pack_padded

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Halves:
    """The split of a mini-batch for measuring its gradient variance."""

    num_rows: int
    """Rows of the first half on this rank."""
    num_groups: tuple[int, int]
    """Prompt groups of each half on all ranks."""


@dataclass(frozen=True)
class MiniBatch:
    """The rollouts of one optimizer step."""

    rows: list[PackedRow]
    """This rank's rows. Every rank has the same number, because each forward pass involves all ranks."""
    counts: list[bool]
    """Whether each row counts. False for padding rows that keep ranks in step."""
    halves: Halves | None
    """None if the variance is not measured."""
    denominator: int
    """Divisor of the losses of all ranks' rows."""
    num_targets: int
    """Response tokens on all ranks."""
    num_tokens: int
    """Tokens through the model on all ranks."""

    def without_padding(self, values: Iterable[T]) -> list[T]:
        """Return the values of rows that count, given one value per row."""
        return [value for value, counts in zip(values, self.counts, strict=True) if counts]


def build_mini_batch(
    groups: Sequence[PromptGroup], config: LearnerConfig, world: World, share_prompts: bool = True
) -> MiniBatch:
    """Pack prompt groups into rows; in two halves if `measure_gradient_variance` is set and there are two groups.

    With `share_prompts`, siblings follow one copy of their prompt. Otherwise each sibling has its own copy, for models
    that compute a row as a batch of sequences padded to the longest.
    """
    half = len(groups) // 2 if config.measure_gradient_variance else 0
    distribute = pack if share_prompts else pack_padded
    packed = [distribute(part, config.micro_batch_tokens) for part in (groups[:half], groups[half:]) if part]
    rows: list[PackedRow] = []
    counts: list[bool] = []
    num_rows = []
    dtype: torch.dtype = getattr(torch, config.dtype)
    for part in packed:
        own = part[world.rank :: world.size]
        padding = [part[0]] * (-(-len(part) // world.size) - len(own))
        rows += [build_row(row, world.device, dtype) for row in (*own, *padding)]
        counts += [True] * len(own) + [False] * len(padding)
        num_rows.append(len(rows))
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    num_targets = sum(int(rollout.token_ids.size) for rollout in rollouts)
    return MiniBatch(
        rows,
        counts,
        Halves(num_rows[0], (half, len(groups) - half)) if half else None,
        denominator(num_targets, len(rollouts), config.loss),
        num_targets,
        sum(piece.num_tokens for part in packed for row in part for piece in row),
    )
