"""Which groups of a window keep its probe from being fitted. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from poise.value.probe.features import LabelledRows

UNFIT = (ArithmeticError, ValueError)
"""Errors that fitting raises because of the numbers; `numpy.linalg.LinAlgError` is one of them."""


def unfit_groups(
    groups: Sequence[LabelledRows], can_be_fitted: Callable[[Sequence[LabelledRows]], bool]
) -> list[LabelledRows]:
    """Return the groups without which the rest can be fitted.

    Searches by halving, which needs few fits if few groups are to blame.
    """
    fit: list[LabelledRows] = []

    def search(candidates: Sequence[LabelledRows]) -> list[LabelledRows]:
        if can_be_fitted([*fit, *candidates]):
            fit.extend(candidates)
            return []
        if len(candidates) == 1:
            return [candidates[0]]
        middle = len(candidates) // 2
        return search(candidates[:middle]) + search(candidates[middle:])

    return search(groups) if groups else []
