"""The interface of estimators: a `Fitter` fits a window of labels, and the `Fitted` estimator answers queries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from numpy.typing import NDArray

from poise.value.estimators.diagnostics import ValuedGroup
from poise.value.estimators.features import Floats, GroupQuery, Label
from poise_client.types import Estimator


class Answer(NamedTuple):
    """The answer to one query."""

    values: Floats
    """[n]"""
    baselines: Floats | None
    """[n]"""
    token_baselines: tuple[Floats, ...] | None
    """[T] for each rollout."""


class Fitted(Protocol):
    """A fitted estimator of one domain. Immutable, so many steps can share it."""

    @property
    def estimator(self) -> Estimator:
        """Its name in answers."""
        ...

    @property
    def errors(self) -> Mapping[Estimator, float]:
        """The weighted error of each estimator that it was compared with, and its own."""
        ...

    def problems(self, query: GroupQuery) -> list[tuple[str, str]]:
        """Return the fields of a query that prevent an answer, with the reasons."""
        ...

    def answer(self, queries: Sequence[GroupQuery]) -> list[Answer]:
        """Return values and baselines of queries without problems, in their order."""
        ...

    def compare(self, label: Label) -> ValuedGroup | None:
        """Return a label's values and rewards; None if the label lacks an input."""
        ...

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return all parameters as arrays, to be stored."""
        ...


class Fitter(Protocol):
    """Fits the successive estimators of one domain, in a thread."""

    def fit(self, groups: Sequence[Label]) -> Fitted:
        """Fit to at least one group of a window. May keep the groups and intermediate results for the next fit.

        Raises:
            ArithmeticError, ValueError: these numbers have no finite fit.
        """
        ...
