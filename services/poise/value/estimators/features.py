"""What estimators see of rollouts: features as matrices, token statistics, queries, and labels.

Shapes: n rows (rollouts), d the model's width, N tokens of all rollouts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from poise.algorithms.baselines import mean_of_others
from poise.algorithms.score_weighted import packed_moments, squared_score_norms, token_columns

Floats = NDArray[np.float32]
Halves = NDArray[np.float16]
Doubles = NDArray[np.float64]

NUM_ENTROPIES = 12
"""{mean, last, max, min} of {output, reasoning, answer}; the statistic varies fastest."""

ENTROPY_MEANS = (0, 4, 8)
"""The columns of the three means."""

_TOKENS_AT_ONCE = 16384


@dataclass(frozen=True, slots=True, eq=False)
class FeatureMatrix:
    """The features of n rollouts."""

    prompt_hidden: Floats
    """[n, d]"""
    response_hidden: Floats
    """[n, d]"""
    entropies: Floats
    """[n, NUM_ENTROPIES], nats."""
    rewards: Floats | None = None
    """[n], in [0, 1]: each row's *own* reward; None while it is unknown."""

    def __len__(self) -> int:
        return len(self.entropies)

    @property
    def width(self) -> int:
        """The model's width d."""
        return int(self.prompt_hidden.shape[1])

    @staticmethod
    def concatenate(parts: Sequence[FeatureMatrix]) -> FeatureMatrix:
        """Stack at least one matrix, all of one width. The result has rewards if all parts have them."""
        rewards = [part.rewards for part in parts if part.rewards is not None]
        return FeatureMatrix(
            np.concatenate([part.prompt_hidden for part in parts]),
            np.concatenate([part.response_hidden for part in parts]),
            np.concatenate([part.entropies for part in parts]),
            np.concatenate(rewards) if len(rewards) == len(parts) else None,
        )

    def part(self, start: int, end: int, rewards: Floats | None = None) -> FeatureMatrix:
        """Return the rows [start, end) as views, with the given rewards or this matrix's own."""
        if rewards is None and self.rewards is not None:
            rewards = self.rewards[start:end]
        return FeatureMatrix(
            self.prompt_hidden[start:end], self.response_hidden[start:end], self.entropies[start:end], rewards
        )


@dataclass(frozen=True, eq=False)
class TokenStatistics:
    """The distributions that the response tokens of n rollouts were sampled from, one rollout after the other."""

    logprobs: Floats
    """[N]: of the sampled tokens."""
    entropies: Halves
    """[N], nats."""
    sum_squared_probs: Halves
    """[N]"""
    lengths: tuple[int, ...]
    """Tokens of each rollout, n numbers."""

    @cached_property
    def parts(self) -> list[TokenInputs]:
        """The inputs of score-weighted estimators, in parts of whole rollouts that fit in the processor's cache."""
        parts, first, start, end = [], 0, 0, 0
        for index, length in enumerate(self.lengths, 1):
            end += length
            if end - start >= _TOKENS_AT_ONCE or index == len(self.lengths):
                tokens, lengths = slice(start, end), self.lengths[first:index]
                logprobs, squares = self.logprobs[tokens], self.sum_squared_probs[tokens]
                columns = token_columns(logprobs, self.entropies[tokens], squares, lengths)
                parts.append(TokenInputs(columns, squared_score_norms(logprobs, squares).astype(np.float64), lengths))
                first, start = index, end
        return parts

    @staticmethod
    def concatenate(parts: Sequence[TokenStatistics]) -> TokenStatistics:
        """Join the rollouts of at least one part."""
        if len(parts) == 1:
            return parts[0]
        return TokenStatistics(
            np.concatenate([part.logprobs for part in parts]),
            np.concatenate([part.entropies for part in parts]),
            np.concatenate([part.sum_squared_probs for part in parts]),
            tuple(length for part in parts for length in part.lengths),
        )


class TokenInputs(NamedTuple):
    """What score-weighted estimators compute with."""

    columns: Doubles
    """`score_weighted.token_columns`, [1 + p, N]."""
    weights: Doubles
    """ω of each token, [N]."""
    lengths: tuple[int, ...]
    """Tokens of each rollout."""

    def sums(self, numbers_N: Doubles) -> Doubles:
        """Return the sum over each rollout's tokens, [n]. It is the same to the last bit in any batch."""
        lengths = np.array(self.lengths)
        if not numbers_N.size:
            return np.zeros(len(lengths))
        starts = np.minimum(np.cumsum(lengths) - lengths, numbers_N.size - 1)
        return np.where(lengths > 0, np.add.reduceat(numbers_N, starts), 0.0)


@dataclass(frozen=True, slots=True, eq=False)
class GroupQuery:
    """One group whose baselines are requested."""

    group_id: str
    domain: str
    features: FeatureMatrix
    """With rewards if the domain's probe needs them. For a score-weighted estimator as in `Label`."""
    tokens: TokenStatistics | None = None
    """For score-weighted estimators."""
    prompt_id: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Label:
    """One group whose rewards are known."""

    run_id: str
    step: int
    group_id: str
    domain: str
    features: FeatureMatrix
    """Of a label for score-weighted estimators, only `prompt_hidden` is used. It is [1, d], or [1, 0] if unknown."""
    rewards: Floats
    """[n], in [0, 1]. The probe needs n ≥ 2."""
    prompt_id: str = ""
    """Names the prompt across steps; empty if unknown."""
    tokens: TokenStatistics | None = None
    """For score-weighted estimators. None once the label is learnt: `moments` are all that fits need."""
    moments: Doubles | None = None
    """[n, columns of `score_weighted.packed_moments`]; None before the label is learnt, and for the probe."""

    @property
    def inputs(self) -> FeatureMatrix:
        """The probe's inputs: row i holds the features and the reward of rollout i only."""
        return replace(self.features, rewards=self.rewards)

    @property
    def targets(self) -> Floats:
        """The probe's targets, [n]: row i holds the mean reward of the *other* rollouts."""
        return mean_of_others(self.rewards)

    def reduced(self) -> Label:
        """Return the label with moments instead of tokens: all that fits need."""
        if self.tokens is None:
            return self
        return replace(self, tokens=None, moments=np.concatenate([packed_moments(*part) for part in self.tokens.parts]))
