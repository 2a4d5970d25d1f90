"""Score-weighted estimators in the value service: queries, labels, the order invariant, and restarts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from tests.unit.value.harness import saved_and_read

from poise.algorithms.score_weighted import squared_score_norms
from poise.errors import InvalidRequest, LabelsConsumed
from poise.runtime.rpc.validation import Violations
from poise.value.app import make_fitter
from poise.value.config import ValueConfig
from poise.value.dedup import Admission
from poise.value.estimators.features import GroupQuery, Label
from poise.value.estimators.step_probes import VersionedProbe
from poise.value.messages import parse_label, read_queries
from poise.value.state import ValueState
from poise_client.codec import encode
from poise_client.types import Estimator, Features, Group, GroupBaselines, Rollout, RolloutId
from poise_proto.v1 import value_pb2


class Groups:
    """Groups of rollouts whose reward is more likely after probable tokens."""

    def __init__(self) -> None:
        self._random = np.random.default_rng(0)

    def make(
        self, step: int, group_id: str = "g0", *, n: int = 1, length: int = 6, run_id: str = "run", width: int = 0
    ) -> Group:
        rollouts = []
        prompt = int(self._random.integers(4))
        hidden = (self._random.normal(size=width) + prompt).astype(np.float32)
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
                    features=Features(hidden, hidden),
                    reward=float(self._random.random() < (prompt / 3 if width else probs.prod() ** 0.5)),
                )
            )
        return Group(group_id, tuple(rollouts), prompt_id=f"p{prompt}")

    def step(self, step: int, num_groups: int = 8, **options: object) -> list[Group]:
        return [self.make(step, f"g{i}", **options) for i in range(num_groups)]


@pytest.fixture
def groups() -> Groups:
    return Groups()


@pytest.fixture
def settings(tmp_path) -> ValueConfig:
    return ValueConfig(state_dir=tmp_path / "state", estimator="score_prefix")


ESTIMATORS = ("score_mean", "score_prefix", "score_prompt", "auto")


def with_estimator(settings: ValueConfig, estimator: Estimator, **changes: object) -> ValueConfig:
    return settings.model_copy(update={"estimator": estimator, **changes})


def label_of(group: Group, config: ValueConfig) -> Label:
    payload = encode(group, value_pb2.LabelledGroup).SerializeToString()
    return parse_label(payload, len(payload), config.estimator_of)


def queries_of(groups: Sequence[Group], config: ValueConfig) -> list[GroupQuery]:
    wrong = Violations()
    queries = read_queries([encode(group, value_pb2.GroupFeatures) for group in groups], wrong, config.estimator_of)
    wrong.raise_if_any()
    return [query for query in queries if query is not None]


def refit(state: ValueState, config: ValueConfig, name: str = "default") -> None:
    window = state.domains[name].window
    fitted = make_fitter(config, name).fit(window.groups)
    state.install(name, VersionedProbe(state.next_version(name), fitted, window.num_added, 0.0))


def learn(state: ValueState, groups: Sequence[Group], config: ValueConfig) -> list[Admission]:
    return [state.learn(label_of(group, config)) for group in groups]


def train(settings: ValueConfig, groups: Groups, num_steps: int = 6, **options: int) -> ValueState:
    """Return a state that has learnt some steps."""
    state = ValueState(settings)
    for step in range(num_steps):
        state.estimate("run", step, queries_of(now := groups.step(step, **options), settings))
        learn(state, now, settings)
        refit(state, settings)
    return state


def bits(state: ValueState) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in state.probes["default"].probe.arrays().items()}


def numbers(answers: Sequence[GroupBaselines]) -> list[bytes]:
    return [b"".join(array.tobytes() for array in answer.token_baselines or (answer.baselines,)) for answer in answers]


@pytest.fixture
def trained(groups, settings) -> ValueState:
    return train(settings, groups)


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
    (answer,) = ValueState(settings).estimate("run", 0, queries_of([groups.make(0)], settings))
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
    restarted = ValueState(settings, saved_and_read(trained.snapshot()))
    assert numbers(restarted.estimate("run", 6, queries_of(now, settings))) == first
    assert restarted.estimate("run", 7, queries_of(now, settings))[0].probe_version == 7


def test_a_redelivered_group_changes_nothing(trained, groups, settings):
    now = groups.step(6)
    learn(trained, now, settings)
    refit(trained, settings)
    before = bits(trained)
    assert set(learn(trained, now, settings)) == {Admission.DUPLICATE}
    refit(trained, settings)
    assert bits(trained) == before


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_fit_does_not_depend_on_the_order_of_arrival(groups, settings, name):
    settings = with_estimator(settings, name)
    labels = [group for step in range(5) for group in groups.step(step, n=2, width=5)]
    fits = []
    for order in (np.arange(len(labels)), *(np.random.default_rng(seed).permutation(len(labels)) for seed in (0, 1))):
        state = ValueState(settings)
        learn(state, [labels[index] for index in order], settings)
        refit(state, settings)
        fits.append(bits(state))
    assert fits[0] == fits[1] == fits[2]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_restart_answers_and_fits_with_the_same_bits(groups, settings, name):
    settings = with_estimator(settings, name)
    state = train(settings, groups, width=5)
    now = queries_of(groups.step(6, n=2, width=5), settings)
    restarted = ValueState(settings, saved_and_read(state.snapshot()))
    assert numbers(restarted.estimate("run", 6, now)) == numbers(state.estimate("run", 6, now))
    refit(restarted, settings)
    assert bits(restarted) == bits(state)


def test_the_mean_is_the_discounted_weighted_mean_reward(groups, settings):
    settings = with_estimator(settings, "score_mean")
    state = ValueState(settings)
    sums = np.zeros(2)
    for step in range(6):
        now = groups.step(step)
        rollouts = [group.rollouts[0] for group in now]
        weights = [squared_score_norms(each.logprobs, each.sum_squared_probs).sum(dtype=float) for each in rollouts]
        factor = len(rollouts) / sum(weights)
        own = [(factor * weight, factor * weight * each.reward) for weight, each in zip(weights, rollouts, strict=True)]
        sums = 0.5 ** (1 / 40) * sums + np.sum(own, axis=0)
        learn(state, now, settings)
    refit(state, settings)
    (answer,) = state.estimate("run", 6, queries_of([groups.make(6, n=3)], settings))
    np.testing.assert_allclose(answer.baselines, [sums[1] / sums[0]] * 3, rtol=1e-6)
    assert (answer.token_baselines, answer.estimator) == (None, "score_mean")


def test_auto_names_the_best_and_all_errors(groups, settings):
    settings = with_estimator(settings, "auto")
    status = train(settings, groups, 30, width=3).probe_status("default")
    errors = {error.estimator: error.weighted_error for error in status.errors}
    assert list(errors) == ["score_mean", "score_prefix", "score_prompt"]
    assert (status.configured, status.estimator) == ("auto", min(errors, key=errors.__getitem__))
    assert status.estimator == "score_prompt"  # rewards depend on the prompt
    assert errors["score_prompt"] < 0.9 * errors["score_mean"]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_one_step_gives_a_constant_and_no_errors(groups, settings, name):
    settings = with_estimator(settings, name)
    state = train(settings, groups, 1, width=3)
    status = state.probe_status("default")
    assert (status.probe_version, status.errors) == (1, ())
    assert status.estimator == ("score_mean" if name == "auto" else name)
    restarted = ValueState(settings, saved_and_read(state.snapshot()))
    queries = queries_of(groups.step(1, 3, width=3), settings)
    answers = restarted.estimate("run", 1, queries)
    assert len(set(np.concatenate([answer.values for answer in answers]).tolist())) == 1


def test_prompts_with_earlier_rewards_get_other_baselines(groups, settings):
    settings = with_estimator(settings, "score_prompt")
    state = train(settings, groups, 30, width=3)
    group = groups.make(30, width=3)
    means = [
        state.estimate("run", 30, queries_of([dataclasses.replace(group, prompt_id=name)], settings))[0].values[0]
        for name in ("p0", "new", "p3")
    ]
    assert means[0] < means[1] < means[2]


def test_a_domain_can_have_its_own_estimator(groups, settings):
    settings = settings.model_copy(update={"estimator_by_domain": {"math": "score_mean"}})
    state = train(settings, groups)
    labels = [dataclasses.replace(group, domain="math") for group in groups.step(6)]
    learn(state, labels, settings)
    refit(state, settings, "math")
    answers = state.estimate("run", 7, queries_of([groups.make(7), labels[0]], settings))
    assert [answer.estimator for answer in answers] == ["score_prefix", "score_mean"]


def test_a_restart_with_another_estimator_keeps_pins(trained, groups, settings):
    now = groups.step(6)
    first = numbers(trained.estimate("run", 6, queries_of(now, settings)))
    probe = with_estimator(settings, "probe")
    restarted = ValueState(probe, saved_and_read(trained.snapshot()))
    assert restarted.estimators_of_step("run", 6)("default") == "score_prefix"
    assert numbers(restarted.estimate("run", 6, queries_of(now, settings))) == first
    assert restarted.probes == {}
    assert restarted.domains["default"].window.num_rows == 0
    assert not restarted.is_due("default")


def test_versions_grow_through_restarts_with_other_estimators(trained, settings):
    first = trained.next_version("default")
    settings = with_estimator(settings, "probe", pinned_steps=1)
    for _ in range(2):  # the second restart reads a state without a fitted estimator
        trained = ValueState(settings, saved_and_read(trained.snapshot()))
    assert trained.next_version("default") == first


def test_quality_compares_values_with_own_rewards(trained, groups, settings):
    quality = trained.domains["default"].diagnostics.quality()
    assert quality.num_rows == 40
    assert 0 < quality.weighted_variance_vs_none < 2
    assert 0 < quality.weighted_variance_vs_batch_mean < 2
    assert np.isnan(quality.variance_vs_rloo)


@pytest.mark.parametrize("width", [0, 7])
def test_hidden_states_are_not_needed_and_not_kept(groups, settings, width):
    state = train(settings, groups, 2, width=width)
    assert {group.features.width for group in state.domains["default"].window.groups} == {0}


@pytest.mark.parametrize("name", ["score_prompt", "auto"])
def test_the_prompts_hidden_state_is_required(groups, settings, name):
    settings = with_estimator(settings, name)
    for read in (lambda: label_of(groups.make(0), settings), lambda: queries_of([groups.make(0)], settings)):
        with pytest.raises(InvalidRequest, match=r"rollouts\[0\].prompt_hidden"):
            read()


def test_quality_skips_labels_without_the_pinned_inputs(groups, settings):
    state = train(with_estimator(settings, "score_prompt"), groups, width=5)
    now = groups.step(6, width=5)
    state.estimate("run", 6, queries_of(now, with_estimator(settings, "score_prompt")))
    restarted = ValueState(settings, saved_and_read(state.snapshot()))
    before = restarted.domains["default"].diagnostics.num_added
    learn(restarted, now, settings)  # score_prefix keeps no hidden states
    assert restarted.domains["default"].diagnostics.num_added == before


def test_one_rollout_of_a_larger_group_is_rejected(groups, settings):
    group = dataclasses.replace(groups.make(0), num_rollouts=8)
    with pytest.raises(InvalidRequest, match="num_rollouts: is 8, but the message has 1 rollouts"):
        label_of(group, settings)


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


def test_the_number_of_tokens_is_bounded(groups, settings, monkeypatch):
    monkeypatch.setattr("poise.value.messages.MAX_TOKENS", 1)
    group = groups.make(0, n=3)
    for read in (lambda: queries_of([group], settings), lambda: label_of(group, settings)):
        with pytest.raises(InvalidRequest, match=r"have \d+ tokens; at most 1 are accepted"):
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
