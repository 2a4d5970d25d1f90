"""Score-weighted estimators in the value service: queries, labels, the order invariant, and restarts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from tests.unit.value.harness import saved_and_read

from poise.errors import InvalidRequest, LabelsConsumed
from poise.runtime.rpc.validation import Violations
from poise.value.app import make_fitter
from poise.value.config import ValueConfig
from poise.value.dedup import Admission
from poise.value.estimator import BaselineEstimator
from poise.value.messages import parse_label, read_queries
from poise.value.probe.features import GroupQuery, Label
from poise.value.probe.step_probes import VersionedProbe
from poise_client.codec import encode
from poise_client.types import Group, GroupBaselines, Rollout, RolloutId
from poise_proto.v1 import value_pb2


class Groups:
    """Groups of rollouts whose reward is more likely after probable tokens."""

    def __init__(self) -> None:
        self._random = np.random.default_rng(0)

    def make(self, step: int, group_id: str = "g0", *, n: int = 1, length: int = 6, run_id: str = "run") -> Group:
        rollouts = []
        for index in range(n):
            size = int(self._random.integers(1, length + 1))
            probs = self._random.uniform(0.2, 1.0, size).astype(np.float32)
            rollouts.append(
                Rollout(
                    RolloutId(run_id, step, group_id, index),
                    token_ids=np.arange(size, dtype=np.int32),
                    logprobs=np.log(probs),
                    token_entropies=(1.5 * (1 - probs)).astype(np.float16),
                    sum_squared_probs=(probs**2).astype(np.float16),
                    reward=float(self._random.random() < probs.prod() ** 0.5),
                )
            )
        return Group(group_id, tuple(rollouts), prompt_id=f"p{self._random.integers(4)}")

    def step(self, step: int, num_groups: int = 8, **options: object) -> list[Group]:
        return [self.make(step, f"g{i}", **options) for i in range(num_groups)]


@pytest.fixture
def groups() -> Groups:
    return Groups()


@pytest.fixture
def settings(tmp_path) -> ValueConfig:
    return ValueConfig(state_dir=tmp_path / "state", estimator="score_prefix")


def label_of(group: Group, config: ValueConfig) -> Label:
    payload = encode(group, value_pb2.LabelledGroup).SerializeToString()
    return parse_label(payload, len(payload), config.estimator_of)


def queries_of(groups: Sequence[Group], config: ValueConfig) -> list[GroupQuery]:
    wrong = Violations()
    queries = read_queries([encode(group, value_pb2.GroupFeatures) for group in groups], wrong, config.estimator_of)
    wrong.raise_if_any()
    return [query for query in queries if query is not None]


def refit(estimator: BaselineEstimator, config: ValueConfig, name: str = "default") -> None:
    before, window = estimator.probes.get(name), estimator.domains[name].window
    fitted = make_fitter(config, name).fit(window.groups)
    estimator.install(name, VersionedProbe(before.version + 1 if before else 1, fitted, window.num_added, 0.0))


def learn(estimator: BaselineEstimator, groups: Sequence[Group], config: ValueConfig) -> list[Admission]:
    return [estimator.learn(label_of(group, config)) for group in groups]


def numbers(answers: Sequence[GroupBaselines]) -> list[bytes]:
    return [b"".join(array.tobytes() for array in answer.token_baselines or (answer.baselines,)) for answer in answers]


@pytest.fixture
def trained(groups, settings) -> BaselineEstimator:
    """An estimator that has learnt six steps of groups of one."""
    estimator = BaselineEstimator(settings)
    for step in range(6):
        estimator.estimate("run", step, queries_of(now := groups.step(step), settings))
        learn(estimator, now, settings)
        refit(estimator, settings)
    return estimator


def test_each_token_gets_a_baseline_in_range(trained, groups, settings):
    now = groups.step(6, n=3)
    for group, answer in zip(now, trained.estimate("run", 6, queries_of(now, settings)), strict=True):
        assert answer.estimator == "score_prefix"
        assert answer.baselines is None
        assert answer.token_baselines is not None
        assert [b.size for b in answer.token_baselines] == [rollout.logprobs.size for rollout in group.rollouts]
        for baseline, value in zip(answer.token_baselines, answer.values, strict=True):
            assert 0 <= baseline.min() <= value <= baseline.max() <= 1


def test_before_the_first_label_there_is_no_answer(groups, settings):
    (answer,) = BaselineEstimator(settings).estimate("run", 0, queries_of([groups.make(0)], settings))
    assert (answer.values, answer.token_baselines, answer.estimator) == (None, None, "")


def test_an_answer_is_the_same_in_any_batch(trained, groups, settings):
    now = groups.step(6, n=2, length=40)
    queries = queries_of(now, settings)
    together = numbers(trained.estimate("run", 6, queries))
    apart = [numbers(trained.estimate("run", 6, [query]))[0] for query in queries]
    assert apart == together


def test_a_label_before_the_answer_blocks_its_step(trained, groups, settings):
    first, second = groups.step(6, 2)
    learn(trained, [first], settings)
    refit(trained, settings)
    with pytest.raises(LabelsConsumed, match="step 6 of run 'run'"):
        trained.estimate("run", 6, queries_of([second], settings))


def test_a_pinned_answer_survives_labels_and_a_restart(trained, groups, settings):
    now = groups.step(6)
    first = numbers(trained.estimate("run", 6, queries_of(now, settings)))
    learn(trained, now, settings)
    refit(trained, settings)
    restarted = BaselineEstimator(settings, saved_and_read(trained.snapshot()))
    assert numbers(restarted.estimate("run", 6, queries_of(now, settings))) == first
    assert restarted.estimate("run", 7, queries_of(now, settings))[0].probe_version == 7


def test_a_redelivered_group_changes_nothing(trained, groups, settings):
    now = groups.step(6)
    learn(trained, now, settings)
    refit(trained, settings)
    before = trained.probes["default"].probe.arrays()
    assert set(learn(trained, now, settings)) == {Admission.DUPLICATE}
    refit(trained, settings)
    after = trained.probes["default"].probe.arrays()
    assert {name: array.tobytes() for name, array in after.items()} == {
        name: array.tobytes() for name, array in before.items()
    }


@pytest.mark.parametrize("seed", range(3))
def test_a_fit_does_not_depend_on_the_order_of_arrival(groups, settings, seed):
    labels = [group for step in range(5) for group in groups.step(step, n=2)]
    fits = []
    for order in (np.arange(len(labels)), np.random.default_rng(seed).permutation(len(labels))):
        estimator = BaselineEstimator(settings)
        learn(estimator, [labels[index] for index in order], settings)
        refit(estimator, settings)
        fits.append({name: array.tobytes() for name, array in estimator.probes["default"].probe.arrays().items()})
    assert fits[0] == fits[1]


def test_the_window_keeps_no_tokens(trained):
    for label in trained.domains["default"].window.groups:
        assert label.tokens is None
        assert label.moments is not None


def without_tokens(group: Group) -> Group:
    empty = np.zeros(0, np.float16)
    return dataclasses.replace(
        group, rollouts=tuple(dataclasses.replace(each, sum_squared_probs=empty) for each in group.rollouts)
    )


def test_missing_token_statistics_are_named(groups, settings):
    group = without_tokens(groups.make(0))
    for read in (lambda: queries_of([group], settings), lambda: label_of(group, settings)):
        with pytest.raises(InvalidRequest, match=r"rollouts\[0\].tokens: is unset, but the estimator .* score_prefix"):
            read()


CHANGES: dict[str, tuple[Callable[[Rollout], Rollout], str]] = {
    "logprob above 0": (lambda r: dataclasses.replace(r, logprobs=r.logprobs + 9), "logprobs: contains"),
    "logprob far below": (lambda r: dataclasses.replace(r, logprobs=r.logprobs - 99), "logprobs: contains"),
    "entropy NaN": (
        lambda r: dataclasses.replace(r, token_entropies=r.token_entropies * np.float16("nan")),
        "entropies: contains NaN",
    ),
    "squares above 1": (
        lambda r: dataclasses.replace(r, sum_squared_probs=r.sum_squared_probs + np.float16(2)),
        "sum_squared_probs: contains",
    ),
    "lengths": (lambda r: dataclasses.replace(r, logprobs=np.zeros(9, np.float32)), "entropies: has"),
}


@pytest.mark.parametrize(("change", "text"), CHANGES.values(), ids=CHANGES)
def test_wrong_token_statistics_are_named(groups, settings, change, text):
    group = groups.make(0, n=2)
    group = dataclasses.replace(group, rollouts=(group.rollouts[0], change(group.rollouts[1])))
    for read in (lambda: queries_of([group], settings), lambda: label_of(group, settings)):
        with pytest.raises(InvalidRequest, match=rf"rollouts\[1\].tokens.{text}"):
            read()


def test_a_single_rollout_is_not_a_label_of_the_probe(groups, settings):
    probe = settings.model_copy(update={"estimator": "probe"})
    with pytest.raises(InvalidRequest, match=r"Set rollouts_per_prompt to 2 or more, or value.estimator to a"):
        label_of(groups.make(0), probe)
