"""Finds the groups of a window that make a fit fail."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from poise.value.estimators.features import Label

FIT_ERRORS = (ArithmeticError, ValueError)
"""Errors that a fit raises because of its input values, including `numpy.linalg.LinAlgError`."""


def unfit_groups(groups: Sequence[Label], can_be_fitted: Callable[[Sequence[Label]], bool]) -> list[Label]:
    """Return the groups to remove so that the rest can be fitted. Bisects: few bad groups need few fits."""
    good: list[Label] = []

    def search(candidates: Sequence[Label]) -> list[Label]:
        if can_be_fitted([*good, *candidates]):
            good.extend(candidates)
            return []
        if len(candidates) == 1:
            return [candidates[0]]
        middle = len(candidates) // 2
        return search(candidates[:middle]) + search(candidates[middle:])

    return search(groups) if groups else []
