"""A fitted score-weighted estimator: answers queries and is compared with labels.

b_{i,t} = clip(c + β·φ_{i,t}, 0, 1). It depends on the prompt, on the tokens before t and on earlier steps, never on the
reward or the token itself. Rollouts are computed in turn, column by column, so an answer is the same to the last bit in
any batch and after a restart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.algorithms.score_weighted import packed_moments, squared_score_norms, token_columns
from poise.value.probe.diagnostics import ValuedGroup
from poise.value.probe.features import Doubles, Floats, GroupQuery, Label, TokenStatistics
from poise.value.probe.model import Answer
from poise_client.types import Estimator

_TOKENS_AT_ONCE = 16384
"""Tokens computed at a time: few enough to stay in the cache."""


@dataclass(frozen=True, slots=True, eq=False)
class FittedScore:
    """A fitted score-weighted estimator. It is immutable, so many steps can share it."""

    estimator: Estimator
    """`score_mean` answers with one baseline per rollout, the others with one per token."""
    coefficients: Doubles
    """[1 + p]: c and β. β is zero for `score_mean`."""
    errors: Mapping[Estimator, float]
    """The weighted error of each estimator that was compared."""

    def problems(self, query: GroupQuery) -> list[tuple[str, str]]:
        """Return the fields of a query that prevent an answer, with the reasons."""
        if query.tokens is None:
            return [("rollouts", f"have no token statistics; the pinned estimator of the step is {self.estimator}")]
        return []

    def answer(self, queries: Sequence[GroupQuery]) -> list[Answer]:
        """Return values and baselines of groups."""
        answers = []
        for query in queries:
            assert query.tokens is not None, "problems() was not called"  # noqa: S101
            baselines, weights = self._baselines(query.tokens)
            values = _weighted_means(baselines, weights)
            if self.estimator == "score_mean":
                answers.append(Answer(values, values, None))
            else:
                answers.append(Answer(values, None, tuple(baselines)))
        return answers

    def compare(self, label: Label) -> ValuedGroup | None:
        """Return the values of a label's rollouts and their weighted squared advantages; None without tokens."""
        if label.tokens is None:
            return None
        baselines, weights = self._baselines(label.tokens)
        squares = [
            float((weight * (reward - baseline) ** 2).sum(dtype=np.float64))
            for baseline, weight, reward in zip(baselines, weights, label.rewards, strict=True)
        ]
        sums = [float(weight.sum(dtype=np.float64)) for weight in weights]
        return ValuedGroup(
            label.run_id,
            label.step,
            _weighted_means(baselines, weights),
            label.rewards,
            np.array([sums, squares], np.float32),
        )

    def _baselines(self, tokens: TokenStatistics) -> tuple[list[Floats], list[Floats]]:
        """Return b and ω of each token, [T] for each rollout."""
        baselines: list[Floats] = []
        weights: list[Floats] = []
        for part in _parts(tokens):
            columns = token_columns(part.logprobs, part.entropies, part.sum_squared_probs, part.lengths)
            values = np.full(columns.shape[1], self.coefficients[0])
            for column, slope in zip(columns[1:], self.coefficients[1:], strict=True):
                if slope:
                    values += slope * column
            clipped = np.clip(values, 0.0, 1.0).astype(np.float32)
            ends = np.cumsum(part.lengths)[:-1]
            baselines += np.split(clipped, ends)
            weights += np.split(squared_score_norms(part.logprobs, part.sum_squared_probs), ends)
        return baselines, weights

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return all parameters as arrays, to be stored."""
        return {
            "coefficients": self.coefficients,
            "errors": np.array([*self.errors.values()]),
            "compared": np.array([*self.errors], "S32"),
        }

    @staticmethod
    def from_arrays(estimator: Estimator, arrays: Mapping[str, NDArray[Any]]) -> FittedScore:
        """Rebuild an estimator from its `arrays`."""
        names = [name.decode() for name in arrays["compared"]]
        errors = dict(zip(names, arrays["errors"].tolist(), strict=True))
        return FittedScore(estimator, arrays["coefficients"], errors)


def reduced(label: Label) -> Label:
    """Return the label with moments instead of tokens: all that fits need."""
    if label.tokens is None:
        return label
    moments = [
        packed_moments(
            token_columns(part.logprobs, part.entropies, part.sum_squared_probs, part.lengths),
            squared_score_norms(part.logprobs, part.sum_squared_probs),
            part.lengths,
        )
        for part in _parts(label.tokens)
    ]
    return replace(label, tokens=None, moments=np.concatenate(moments))


def _parts(tokens: TokenStatistics) -> list[TokenStatistics]:
    """Return whole rollouts in parts of about `_TOKENS_AT_ONCE` tokens."""
    parts, first, start, end = [], 0, 0, 0
    for index, length in enumerate(tokens.lengths, 1):
        end += length
        if end - start >= _TOKENS_AT_ONCE or index == len(tokens.lengths):
            arrays = tokens.logprobs[start:end], tokens.entropies[start:end], tokens.sum_squared_probs[start:end]
            parts.append(TokenStatistics(*arrays, tokens.lengths[first:index]))
            first, start = index, end
    return parts


def _weighted_means(baselines: Sequence[Floats], weights: Sequence[Floats]) -> Floats:
    """Return Σ ωb / Σ ω of each rollout, [n]; the plain mean if no token has weight."""
    means = np.zeros(len(baselines))
    for index, (baseline, weight) in enumerate(zip(baselines, weights, strict=True)):
        total = float(weight.sum(dtype=np.float64))
        if total > 0:
            means[index] = float((weight * baseline).sum(dtype=np.float64)) / total
        elif baseline.size:
            means[index] = baseline.mean(dtype=np.float64)
    return np.clip(means, 0.0, 1.0).astype(np.float32)
