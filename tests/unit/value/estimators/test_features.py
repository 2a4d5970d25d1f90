from __future__ import annotations

import numpy as np


def test_targets_are_the_mean_rewards_of_the_siblings(make) -> None:
    label = make.label(0, n=3)
    r = label.rewards
    np.testing.assert_allclose(label.targets, [(r[1] + r[2]) / 2, (r[0] + r[2]) / 2, (r[0] + r[1]) / 2], rtol=1e-6)


def test_inputs_are_the_features_and_the_rows_own_reward(make) -> None:
    label = make.label(0, n=3)
    np.testing.assert_array_equal(label.inputs.prompt_hidden, label.features.prompt_hidden)
    np.testing.assert_array_equal(label.inputs.rewards, label.rewards)
