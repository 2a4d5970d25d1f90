"""Rollouts as rows for the model: siblings share their prompt's tokens in one row.

A row is the prompt, then each sibling's response. Positions restart after the prompt for every sibling, and a mask
keeps siblings from seeing each other, so that each token sees exactly what it saw alone; the prompt is computed once.

Shapes: B rows, L tokens of the longest, N response tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from poise_client.types import Ints, TrainingRollout


@dataclass(frozen=True, slots=True)
class GroupRow:
    """The siblings of one prompt."""

    prompt_token_ids: Ints
    rollouts: tuple[TrainingRollout, ...]

    @property
    def num_tokens(self) -> int:
        """Its length as a row."""
        return int(self.prompt_token_ids.size) + sum(rollout.token_ids.size for rollout in self.rollouts)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows that go through the model together, and which of its outputs predict response tokens."""

    token_ids_BL: torch.Tensor
    positions_BL: torch.Tensor
    mask_B1LL: torch.Tensor
    """True where a token (third axis) may see another (fourth)."""
    predictors_N: torch.Tensor
    """Index, into B·L, of the token whose output predicts each response token."""
    targets_N: torch.Tensor
    rollout_logprobs_N: torch.Tensor
    advantages_N: torch.Tensor

    @property
    def num_targets(self) -> int:
        """N."""
        return int(self.targets_N.numel())


def group_rows(rollouts: Sequence[TrainingRollout]) -> list[GroupRow]:
    """Gather siblings, in order of first appearance: same run, step, group and prompt tokens."""
    groups: dict[tuple[str, int, str, bytes], list[TrainingRollout]] = {}
    for rollout in rollouts:
        key = (rollout.id.run_id, rollout.id.step, rollout.id.group_id, rollout.prompt_token_ids.tobytes())
        groups.setdefault(key, []).append(rollout)
    return [GroupRow(siblings[0].prompt_token_ids, tuple(siblings)) for siblings in groups.values()]


def micro_batches(rows: Sequence[GroupRow], max_tokens: int) -> Iterator[list[GroupRow]]:
    """Split rows into runs of like length, of at most `max_tokens` tokens with padding; a longer row goes alone."""
    pending: list[GroupRow] = []
    for row in sorted(rows, key=lambda row: row.num_tokens):  # the last of a run is its longest
        if pending and (len(pending) + 1) * row.num_tokens > max_tokens:
            yield pending
            pending = []
        pending.append(row)
    if pending:
        yield pending


def build_micro_batch(rows: Sequence[GroupRow], device: str) -> MicroBatch:
    """Lay rows out as tensors."""
    length = max(row.num_tokens for row in rows)
    token_ids = np.zeros((len(rows), length), np.int64)
    positions = np.zeros((len(rows), length), np.int64)
    segments = np.full((len(rows), length), -1)  # 0 is the prompt, 1.. the siblings, -1 padding
    predictors: list[int] = []
    for b, row in enumerate(rows):
        num_prompt = row.prompt_token_ids.size
        token_ids[b, :num_prompt] = row.prompt_token_ids
        positions[b, :num_prompt] = np.arange(num_prompt)
        segments[b, :num_prompt] = 0
        start = num_prompt
        for sibling, rollout in enumerate(row.rollouts, 1):
            end = start + rollout.token_ids.size
            token_ids[b, start:end] = rollout.token_ids
            positions[b, start:end] = np.arange(num_prompt, num_prompt + end - start)
            segments[b, start:end] = sibling
            predictors += [b * length + num_prompt - 1, *range(b * length + start, b * length + end - 1)]
            start = end
    return MicroBatch(
        token_ids_BL=torch.from_numpy(token_ids).to(device),
        positions_BL=torch.from_numpy(positions).to(device),
        mask_B1LL=_mask(torch.from_numpy(segments).to(device))[:, None],
        predictors_N=torch.tensor(predictors, device=device),
        targets_N=_joined(rows, "token_ids").long().to(device),
        rollout_logprobs_N=_joined(rows, "logprobs").to(device),
        advantages_N=_advantages(rows).to(device),
    )


def _mask(segments_BL: torch.Tensor) -> torch.Tensor:
    query, key = segments_BL[:, :, None], segments_BL[:, None, :]
    length = segments_BL.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments_BL.device).tril()
    visible = ((key == 0) | (key == query)) & (key >= 0) & causal
    # Padding sees itself: a softmax over nothing would be NaN.
    return visible | torch.eye(length, dtype=torch.bool, device=segments_BL.device)


def _joined(rows: Sequence[GroupRow], name: str) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([getattr(rollout, name) for row in rows for rollout in row.rollouts]))


def _advantages(rows: Sequence[GroupRow]) -> torch.Tensor:
    rollouts = [rollout for row in rows for rollout in row.rollouts]
    advantages = np.array([rollout.advantage for rollout in rollouts], np.float32)
    return torch.from_numpy(np.repeat(advantages, [rollout.token_ids.size for rollout in rollouts]))
