"""The probe g_k: predicts the mean reward of a rollout's siblings from its features.

PCA of each hidden state, joined with the scalars (entropy means and, if chosen, the reward), standardised, then ridge
regression. Every stage is affine, so a fitted probe is stored as one affine map: one weight per input column and a
bias. A prediction is one product. `incremental` fits it.

**The sibling's reward as an input keeps the gradient unbiased.** With `sibling_reward` a row's own reward joins its
features, and rollout i gets b_i = mean_{j≠i} g(z_j, r_j). Fix the prompt x, and fix g, which was fitted without labels
of the step. The n rollouts are drawn independently given x, and r_j depends only on y_j and on chance independent of
y_i. So all (z_j, r_j) with j ≠ i, and therefore b_i, are independent of y_i, and

    E[∇log π(y_i|x)·b_i] = E[∇log π(y_i|x)]·E[b_i] = 0,  because  E[∇log π(y_i|x)] = Σ_y ∇π(y|x) = ∇1 = 0.

Hence E[∇log π(y_i|x)·(r_i − b_i)] = E[∇log π(y_i|x)·r_i], the gradient itself. The proof uses only independence: not
how good g is, nor which inputs of rollout j it takes. It fails if b_i contains g(z_i, r_i), which depends on y_i. That
value only enters the *others'* baselines; `algorithms.baselines.mean_of_others` ensures this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from poise.algorithms.baselines import mean_of_others
from poise.value.estimators.diagnostics import ValuedGroup
from poise.value.estimators.features import ENTROPY_MEANS, Doubles, FeatureMatrix, Floats, GroupQuery, Label
from poise.value.estimators.interface import Answer
from poise_client.types import Estimator

ProbeInput = Literal["prompt_hidden", "response_hidden", "entropy", "sibling_reward"]

HIDDEN_INPUTS = ("prompt_hidden", "response_hidden")
"""The inputs that PCA reduces. The others enter unchanged."""

_ROWS_AT_ONCE = 16
"""Rows converted to double at a time; more would not fit in the processor's cache."""
_COLUMNS_AT_ONCE = 8192
"""Above 10,000 columns BLAS sums in several threads, and their number changes the last bit."""

_BIAS, _PROMPT_WEIGHTS, _PROMPT_BIAS = "bias", "prompt_only_weights", "prompt_only_bias"


@dataclass(frozen=True, slots=True, eq=False)
class PromptProbe:
    """An affine map of the prompt's hidden state, clipped to [0, 1]: the expected reward before any rollout."""

    weights_d: Doubles
    bias: float

    def predict(self, prompt_hidden_nd: Floats) -> Floats:
        """Return the value of each prompt, [n] in [0, 1]. Like `FittedProbe.predict`, it is the same in any batch."""
        return np.clip(row_products(prompt_hidden_nd, self.weights_d) + self.bias, 0.0, 1.0).astype(np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class FittedProbe:
    """An affine map of the inputs, clipped to [0, 1]. It is immutable, so many steps can share it."""

    estimator: ClassVar[Estimator] = "probe"
    errors: ClassVar[Mapping[Estimator, float]] = {}

    weights: Mapping[str, Doubles]
    """One weight per column, by `ProbeInput`."""
    bias: float
    prompt_only: PromptProbe | None = None
    """Fitted to the same targets from `prompt_hidden` only; None if that is not an input."""

    @property
    def needs_rewards(self) -> bool:
        """Whether a prediction needs each row's reward."""
        return "sibling_reward" in self.weights

    @property
    def width(self) -> int | None:
        """The model's width that the probe was fitted on; None if no hidden state is an input."""
        hidden = [weights.size for name, weights in self.weights.items() if name in HIDDEN_INPUTS]
        return hidden[0] if hidden else None

    def predict(self, features: FeatureMatrix) -> Floats:
        """Return the value of each row, [n] in [0, 1].

        A row's value is the same to the last bit in any batch: rows are summed one by one, because the order of
        summation in a matrix product depends on the batch. It is also the same before and after storing the probe:
        inputs are summed in the order of their names, because storing does not keep the order of `weights`.

        Raises:
            ValueError: the probe needs rewards and the rows have none.
        """
        values = np.full(len(features), self.bias)
        for name in sorted(self.weights):
            values += row_products(_columns(features, name), self.weights[name])
        return np.clip(values, 0.0, 1.0).astype(np.float32)

    def problems(self, query: GroupQuery) -> list[tuple[str, str]]:
        """See `Fitted`."""
        problems = []
        if self.width is not None and query.features.width != self.width:
            problems.append(
                (
                    "rollouts",
                    f"hidden states have width {query.features.width}; the probe of domain {query.domain!r} needs "
                    f"{self.width}",
                )
            )
        if self.needs_rewards and query.features.rewards is None:
            problems.append(
                (
                    "rewards",
                    f"is unset, and the probe of domain {query.domain!r} was fitted with sibling_reward among "
                    "probe.inputs. Send each rollout's reward, in [0, 1]",
                )
            )
        return problems

    def answer(self, queries: Sequence[GroupQuery]) -> list[Answer]:
        """See `Fitted`. One prediction for all groups."""
        values = self.predict(FeatureMatrix.concatenate([query.features for query in queries]))
        answers, start = [], 0
        for query in queries:
            own = values[start : start + len(query.features)]
            start += len(own)
            answers.append(Answer(own, mean_of_others(own) if len(own) > 1 else None, None))
        return answers

    def compare(self, label: Label) -> ValuedGroup | None:
        """See `Fitted`."""
        if label.tokens is not None or self.width not in (None, label.features.width):
            return None  # the domain has another estimator, or another model
        return ValuedGroup(label.run_id, label.step, self.predict(label.inputs), label.rewards)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return all parameters as arrays, to be stored."""
        arrays: dict[str, NDArray[Any]] = {**self.weights, _BIAS: np.array([self.bias])}
        if self.prompt_only is not None:
            arrays[_PROMPT_WEIGHTS] = self.prompt_only.weights_d
            arrays[_PROMPT_BIAS] = np.array([self.prompt_only.bias])
        return arrays

    @staticmethod
    def from_arrays(arrays: Mapping[str, Doubles]) -> FittedProbe:
        """Rebuild a probe from its `arrays`."""
        weights = dict(arrays)
        bias = float(weights.pop(_BIAS)[0])
        prompt_only = None
        if _PROMPT_WEIGHTS in weights:
            prompt_only = PromptProbe(weights.pop(_PROMPT_WEIGHTS), float(weights.pop(_PROMPT_BIAS)[0]))
        return FittedProbe(weights, bias, prompt_only)


def _columns(features: FeatureMatrix, name: str) -> Floats:
    """Return the columns of a `ProbeInput`, [n, its columns].

    Raises:
        ValueError: `sibling_reward` is an input and the rows have no rewards.
    """
    match name:
        case "prompt_hidden":
            return features.prompt_hidden
        case "response_hidden":
            return features.response_hidden
        case "entropy":
            return features.entropies[:, ENTROPY_MEANS]
        case "sibling_reward" if features.rewards is not None:
            return features.rewards[:, None]
    raise ValueError(f"the rows have no {name}")


def row_products(columns: Floats, weights: Doubles) -> Doubles:
    """Return each row's product with the weights, [n], summed row by row."""
    products = np.zeros(len(columns))
    for start in range(0, len(columns), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        block = columns[rows].astype(np.float64, order="C")
        for first in range(0, len(weights), _COLUMNS_AT_ONCE):
            part = slice(first, first + _COLUMNS_AT_ONCE)
            products[rows] += np.vecdot(block[:, part], weights[part])
    return products
