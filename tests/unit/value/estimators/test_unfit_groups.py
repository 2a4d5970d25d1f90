"""Groups that make a fit fail are found and dead-lettered, and the rest is fitted."""

from __future__ import annotations

import numpy as np
import pytest
from tests.unit.value.harness import PickyFitter

from poise.value.estimators.features import FeatureMatrix, Label
from poise.value.estimators.probe.incremental import IncrementalFitter
from poise.value.estimators.unfit_groups import FIT_ERRORS, unfit_groups


def fits(fitter):
    def can_be_fitted(groups):
        try:
            fitter.fit(groups)
        except FIT_ERRORS:
            return False
        return True

    return can_be_fitted


@pytest.mark.parametrize("unfit", [["g3"], ["g0"], ["g31"], ["g0", "g1"], ["g4", "g17", "g30"], []])
def test_only_the_unfit_groups_are_found(make, unfit):
    groups = [make.label(step, f"g{step}") for step in range(32)]
    assert [group.group_id for group in unfit_groups(groups, fits(PickyFitter(unfit)))] == unfit


def test_of_groups_that_fail_together_the_newest_is_removed(make):
    groups = [make.label(step, f"g{step}") for step in range(9)]
    found = unfit_groups(groups, fits(PickyFitter(["g2", "g7"], together=True)))
    assert [group.group_id for group in found] == ["g7"]


def test_few_fits_find_one_group_among_many(make):
    groups, sizes, picky = [make.label(step, f"g{step}") for step in range(512)], [], fits(PickyFitter(["g100"]))

    def counted(some):
        sizes.append(len(some))
        return picky(some)

    assert len(unfit_groups(groups, counted)) == 1
    assert len(sizes) < 25


def spoilt(label: Label, field: str, number: float) -> Label:
    """A label of an earlier release, which accepted any finite number."""
    rows = {name: getattr(label.features, name).copy() for name in ("prompt_hidden", "response_hidden", "entropies")}
    rows[field][0, 0] = number
    return Label(label.run_id, label.step, label.group_id, label.domain, FeatureMatrix(**rows), label.rewards)


@pytest.mark.parametrize("incremental", [True, False])
@pytest.mark.parametrize("width", [6, 160])
@pytest.mark.parametrize(
    ("field", "number"), [("prompt_hidden", 1e30), ("response_hidden", -3e38), ("prompt_hidden", np.inf)]
)
def test_the_real_fitter_fits_the_rest(make, field, number, width, incremental):
    def fitter():
        inputs = ("prompt_hidden", "response_hidden", "entropy", "sibling_reward")
        return IncrementalFitter(inputs, 4, 4, 1.0, incremental=incremental)

    labels = [make.label(step, f"g{step}", width=width) for step in range(24)]
    labels[7] = spoilt(labels[7], field, number)
    found = unfit_groups(labels, lambda some: fits(fitter())(some))
    assert found == [labels[7]]
    rest = [label for label in labels if label is not labels[7]]
    assert np.isfinite(fitter().fit(rest).predict(rest[0].inputs)).all()
