"""What an optimizer step trains on: some prompts' rollouts in rows, dealt out to the processes.

Knows no model. Every process packs all of a mini-batch, and takes every so manieth row.
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
    """Where a mini-batch is cut in two, for their gradients to be told apart."""

    num_rows: int
    """Rows of the first half, in this process."""
    num_groups: tuple[int, int]
    """Prompt groups of either half, in all processes."""


@dataclass(frozen=True)
class MiniBatch:
    """What an optimizer step trains on."""

    rows: list[PackedRow]
    """This process's share; as many in every process, for each pass is one of all of them."""
    counts: list[bool]
    """Of each row: whether it counts, or only keeps those of other processes company."""
    halves: Halves | None
    """None where it is not cut."""
    denominator: int
    """Of all processes' rows."""
    num_targets: int
    """Response tokens, in all processes."""
    num_tokens: int
    """Through the model, in all processes."""

    def own(self, of_rows: Iterable[T]) -> list[T]:
        """Return what, of something for each row, is for those that count."""
        return [one for one, counts in zip(of_rows, self.counts, strict=True) if counts]


def build_mini_batch(
    groups: Sequence[PromptGroup], config: LearnerConfig, world: World, share_prompts: bool = True
) -> MiniBatch:
    """Pack groups; in halves, where the variance of their gradient is to be measured and there are two at least.

    `share_prompts` puts the siblings of a prompt behind one copy of it. Otherwise each has its own, and rows are packed
    for a model that computes their sequences padded to the longest.
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
        company = [part[0]] * (-(-len(part) // world.size) - len(own))
        rows += [build_row(row, world.device, dtype) for row in (*own, *company)]
        counts += [True] * len(own) + [False] * len(company)
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
