"""A fitted score-weighted estimator: answers queries and is compared with labels.

b_{i,t} = clip(c + β·φ_{i,t} + γ·q_i, 0, 1), with inputs q_i of the prompt. It depends on the prompt, on the tokens
before t and on earlier steps, never on the reward or the token itself. It is computed column by column, so an answer is
the same to the last bit in any batch and after a restart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.value.estimators.diagnostics import ValuedGroup
from poise.value.estimators.features import Doubles, Floats, GroupQuery, Label, TokenInputs, TokenStatistics
from poise.value.estimators.interface import Answer
from poise.value.estimators.probe.model import row_products
from poise_client.types import Estimator


@dataclass(frozen=True, slots=True, eq=False)
class FittedScore:
    """A fitted score-weighted estimator. It is immutable, so many steps can share it."""

    estimator: Estimator
    """`score_mean` answers with one baseline per rollout, the others with one per token."""
    coefficients: Doubles
    """[1 + p]: c and β."""
    errors: Mapping[Estimator, float]
    """The weighted error of each estimator that was compared; empty before two steps."""
    prompt_weights: Doubles = field(default_factory=lambda: np.zeros(0))
    """[d]: of the prompt's hidden state; empty if it is not an input."""
    prompt_bias: float = 0.0
    """Added to the product with `prompt_weights`."""
    offsets: Mapping[str, float] = field(default_factory=dict)
    """What the earlier rewards of a prompt add to its baselines, by prompt id."""

    def problems(self, query: GroupQuery) -> list[tuple[str, str]]:
        """See `Fitted`."""
        problems = []
        if query.tokens is None:
            problems.append(("rollouts", f"have no token statistics, which {self.estimator} of this step needs"))
        if not self._fits(query.features.width):
            problems.append(
                (
                    "rollouts",
                    f"hidden states have width {query.features.width}; {self.estimator} of domain {query.domain!r} "
                    f"needs {self.prompt_weights.size}",
                )
            )
        return problems

    def answer(self, queries: Sequence[GroupQuery]) -> list[Answer]:
        """See `Fitted`."""
        tokens = TokenStatistics.concatenate([query.tokens for query in queries if query.tokens is not None])
        prompts = self._of_prompts([(query.features.prompt_hidden, query.prompt_id) for query in queries])
        baselines: list[Floats] = []
        values: list[Floats] = []
        rows = np.repeat(prompts, [len(query.features) for query in queries])
        for part in tokens.parts:
            own = self._baselines(part, rows[len(baselines) :][: len(part.lengths)])
            values.append(_weighted_means(part, own))
            baselines += np.split(own, np.cumsum(part.lengths)[:-1])
        by_rollout = iter(zip(np.concatenate(values), baselines, strict=True))
        answers = []
        for query in queries:
            own_values, own_baselines = zip(*islice(by_rollout, len(query.features)), strict=True)
            of_group = np.array(own_values, np.float32)
            if self.estimator == "score_mean":
                answers.append(Answer(of_group, of_group, None))
            else:
                answers.append(Answer(of_group, None, own_baselines))
        return answers

    def compare(self, label: Label) -> ValuedGroup | None:
        """See `Fitted`. Adds the weighted squared advantages."""
        if label.tokens is None or not self._fits(label.features.width):
            return None
        prompt = self._of_prompts([(label.features.prompt_hidden, label.prompt_id)])
        values, weights, squares = [], [], []
        row = 0
        for part in label.tokens.parts:
            rewards = label.rewards[row : row + len(part.lengths)]
            row += len(part.lengths)
            baselines = self._baselines(part, np.repeat(prompt, len(part.lengths)))
            values.append(_weighted_means(part, baselines))
            weights.append(part.sums(part.weights))
            squares.append(part.sums(part.weights * (np.repeat(rewards, part.lengths) - baselines) ** 2))
        weighted = np.array([np.concatenate(weights), np.concatenate(squares)], np.float32)
        return ValuedGroup(label.run_id, label.step, np.concatenate(values), label.rewards, weighted)

    def _fits(self, width: int) -> bool:
        """Whether hidden states of this width can be inputs."""
        return self.prompt_weights.size in (0, width)

    def _of_prompts(self, prompts: Sequence[tuple[Floats, str]]) -> Doubles:
        """Return what hidden state and earlier rewards of each prompt add to its baselines."""
        added = np.zeros(len(prompts))
        for index, (hidden, prompt_id) in enumerate(prompts):
            if self.prompt_weights.size:
                added[index] = row_products(hidden, self.prompt_weights)[0] + self.prompt_bias
            added[index] += self.offsets.get(prompt_id, 0.0)
        return added

    def _baselines(self, part: TokenInputs, added_n: Doubles) -> Floats:
        """Return the baseline of each token, [N]."""
        values = self.coefficients[0] + np.repeat(added_n, part.lengths)
        for column, slope in zip(part.columns[1:], self.coefficients[1:].tolist(), strict=True):
            if slope:
                values += slope * column
        clipped: Floats = np.clip(values, 0.0, 1.0).astype(np.float32)
        return clipped

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return all parameters as arrays, to be stored."""
        return {
            "coefficients": self.coefficients,
            "compared": np.array([*self.errors], "S32"),
            "errors": np.array([*self.errors.values()], float),
            "prompt_weights": self.prompt_weights,
            "prompt_bias": np.array([self.prompt_bias]),
            "prompts": np.array([*self.offsets] or [""], "S"),
            "offsets": np.array([*self.offsets.values()] or [0.0]),
        }

    @staticmethod
    def from_arrays(estimator: Estimator, arrays: Mapping[str, NDArray[Any]]) -> FittedScore:
        """Rebuild an estimator from its `arrays`."""

        def by_name(names: str, numbers: str) -> dict[Any, float]:
            return dict(zip((name.decode() for name in arrays[names]), arrays[numbers].tolist(), strict=True))

        return FittedScore(
            estimator,
            arrays["coefficients"],
            by_name("compared", "errors"),
            arrays["prompt_weights"],
            float(arrays["prompt_bias"][0]),
            by_name("prompts", "offsets"),
        )


def _weighted_means(part: TokenInputs, baselines_N: Floats) -> Floats:
    """Return Σ ωb / Σ ω of each rollout, [n]; the plain mean if no token has weight, 0 without tokens."""
    weights = part.sums(part.weights)
    lengths = np.maximum(part.lengths, 1)
    means = np.where(
        weights > 0,
        part.sums(part.weights * baselines_N) / np.where(weights > 0, weights, 1.0),
        part.sums(baselines_N.astype(np.float64)) / lengths,
    )
    return np.clip(means, 0.0, 1.0).astype(np.float32)
