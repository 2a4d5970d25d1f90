"""Packs rollouts end to end into rows without padding; siblings share their prompt's tokens.

For each group, a row has the prompt, then the siblings' responses. Positions restart after the prompt for every
sibling, and attention spans limit each response to its prompt and itself. So a prompt is computed once, and every token
has the same context as when it was sampled.

Shapes: L tokens of the row, N response tokens of it, R rollouts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from poise.learner.models.attention import Span, Spans, build_spans
from poise_client.types import Ints, Rollout


@dataclass(frozen=True, slots=True)
class PromptGroup:
    """All or some siblings of one prompt."""

    prompt_token_ids: Ints
    rollouts: tuple[Rollout, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens that the group takes in a row."""
        return int(self.prompt_token_ids.size) + sum(rollout.token_ids.size for rollout in self.rollouts)


@dataclass(frozen=True, slots=True)
class PackedRow:
    """The packed form of rollouts: the tokens of one row, and the inputs of the losses."""

    token_ids_1L: torch.Tensor
    positions_1L: torch.Tensor
    spans: Spans
    predictors_N: torch.Tensor
    """For each response token, the row index of the token whose output predicts it."""
    targets_N: torch.Tensor
    rollout_logprobs_N: torch.Tensor
    advantages_N: torch.Tensor
    rewards_R: torch.Tensor
    """NaN for rollouts without a reward."""
    lengths_R: torch.Tensor
    """Response tokens of each rollout."""
    num_attended: int
    """Number of pairs of a query and a key it attends to."""

    @property
    def num_tokens(self) -> int:
        """L."""
        return int(self.token_ids_1L.numel())


def group_by_prompt(rollouts: Sequence[Rollout]) -> list[PromptGroup]:
    """Group siblings (same run, step, group and prompt tokens), in order of first appearance."""
    groups: dict[tuple[str, int, str, bytes], list[Rollout]] = {}
    for rollout in rollouts:
        key = (rollout.id.run_id, rollout.id.step, rollout.id.group_id, rollout.prompt_token_ids.tobytes())
        groups.setdefault(key, []).append(rollout)
    return [PromptGroup(siblings[0].prompt_token_ids, tuple(siblings)) for siblings in groups.values()]


def pack(groups: Sequence[PromptGroup], max_tokens: int) -> list[list[PromptGroup]]:
    """Distribute groups over rows of at most `max_tokens` tokens: first fit, largest first.

    Groups too large for a row are split over several, each with the prompt. A longer rollout gets a row of its own.
    """
    rows: list[list[PromptGroup]] = []
    free_tokens: list[int] = []
    pieces = [piece for group in groups for piece in _split(group, max_tokens)]
    # The sort is stable, so the same batch is always packed in the same way.
    for piece in sorted(pieces, key=lambda piece: -piece.num_tokens):
        index = next((i for i, free in enumerate(free_tokens) if free >= piece.num_tokens), len(rows))
        if index == len(rows):
            rows.append([])
            free_tokens.append(max_tokens)
        rows[index].append(piece)
        free_tokens[index] -= piece.num_tokens
    return rows


def pack_padded(groups: Sequence[PromptGroup], max_tokens: int) -> list[list[PromptGroup]]:
    """Distribute rollouts, each with its own copy of the prompt, over rows of similar lengths.

    A row has at most `max_tokens` tokens after padding to its longest sequence. A longer rollout gets a row of its own.
    """
    sequences = [PromptGroup(group.prompt_token_ids, (rollout,)) for group in groups for rollout in group.rollouts]
    rows: list[list[PromptGroup]] = []
    for sequence in sorted(sequences, key=lambda sequence: -sequence.num_tokens):
        if not rows or (len(rows[-1]) + 1) * rows[-1][0].num_tokens > max_tokens:
            rows.append([])
        rows[-1].append(sequence)
    return rows


def build_row(groups: Sequence[PromptGroup], device: torch.device, dtype: torch.dtype) -> PackedRow:
    """Return the row that contains these groups, for models that compute in `dtype` on `device`."""
    token_ids: list[Ints] = []
    positions: list[Ints] = []
    predictors: list[Ints] = []
    spans: list[Span] = []
    start = 0
    for group in groups:
        num_prompt = int(group.prompt_token_ids.size)
        prompt_start, start = start, start + num_prompt
        token_ids.append(group.prompt_token_ids)
        positions.append(np.arange(num_prompt))
        for rollout in group.rollouts:
            num_own = int(rollout.token_ids.size)
            token_ids.append(rollout.token_ids)
            positions.append(np.arange(num_prompt, num_prompt + num_own))
            # The prompt's last token predicts the first response token; each response token predicts the next.
            predictors += [np.array([prompt_start + num_prompt - 1]), np.arange(start, start + num_own - 1)]
            first = start == prompt_start + num_prompt
            spans.append(
                Span(prompt_start, start + num_own)
                if first
                else Span(start, start + num_own, prompt_start, prompt_start + num_prompt)
            )
            start += num_own
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    lengths = np.array([rollout.token_ids.size for rollout in rollouts])
    advantages = [
        np.full(length, rollout.advantage or 0.0, np.float32) if rollout.advantages is None else rollout.advantages
        for rollout, length in zip(rollouts, lengths, strict=True)
    ]
    rewards = np.array([np.nan if rollout.reward is None else rollout.reward for rollout in rollouts], np.float32)
    return PackedRow(
        token_ids_1L=_tensor(np.concatenate(token_ids).astype(np.int64), device)[None],
        positions_1L=_tensor(np.concatenate(positions), device)[None],
        spans=build_spans(spans, device, dtype),
        predictors_N=_tensor(np.concatenate(predictors), device),
        targets_N=_tensor(np.concatenate([rollout.token_ids for rollout in rollouts]).astype(np.int64), device),
        rollout_logprobs_N=_tensor(np.concatenate([rollout.logprobs for rollout in rollouts]), device),
        advantages_N=_tensor(np.concatenate(advantages), device),
        rewards_R=_tensor(rewards, device),
        lengths_R=_tensor(lengths, device),
        num_attended=sum(span.num_attended for span in spans),
    )


def _split(group: PromptGroup, max_tokens: int) -> list[PromptGroup]:
    parts: list[list[Rollout]] = []
    free_tokens = 0
    for rollout in group.rollouts:
        if not parts or rollout.token_ids.size > free_tokens:
            parts.append([])
            free_tokens = max_tokens - int(group.prompt_token_ids.size)
        parts[-1].append(rollout)
        free_tokens -= int(rollout.token_ids.size)
    return [PromptGroup(group.prompt_token_ids, tuple(part)) for part in parts]


def _tensor(array: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(array).to(device)
