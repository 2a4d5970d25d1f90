"""The state: the order invariant, values and baselines, prompt scores, learning, and diagnostics."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from tests.support.reference_probe import ReferenceFitter, training_data
from tests.unit.value.harness import saved_and_read

from poise.algorithms.baselines import mean_of_others
from poise.errors import InvalidRequest, LabelsConsumed
from poise.value.config import ValueConfig
from poise.value.dedup import Admission
from poise.value.estimators.features import GroupQuery, Label
from poise.value.estimators.probe.incremental import IncrementalFitter
from poise.value.estimators.step_probes import VersionedProbe
from poise.value.state import ValueState
from poise_client.types import PromptFeatures

Build = Callable[..., ValueConfig]
FITTER = ReferenceFitter(("prompt_hidden", "response_hidden", "entropy"), 4, 4, 1.0)


def refit(state: ValueState, name: str = "default") -> VersionedProbe:
    before, window = state.probes.get(name), state.domains[name].window
    probe = FITTER.fit(*training_data(window.groups))
    fitted = VersionedProbe(before.version + 1 if before else 1, probe, window.num_added, 0.1)
    state.install(name, fitted)
    return fitted


@pytest.fixture
def fitted(config: Build, make) -> ValueState:
    """A state with a probe fitted on steps 0 to 9 of another run."""
    state = ValueState(config())
    for step in range(10):
        state.learn(make.label(step, run_id="past"))
    refit(state)
    return state


def restart(state: ValueState, config: ValueConfig) -> ValueState:
    return ValueState(config, saved_and_read(state.snapshot()))


def numbers(answers) -> list[bytes | None]:
    return [None if answer.values is None else answer.values.tobytes() for answer in answers]


# The order invariant.


def test_a_step_gets_the_same_answer_after_its_labels(fitted, make) -> None:
    queries = [make.query("a"), make.query("b")]
    first = fitted.estimate("run", 0, queries)
    for name, query in zip("ab", queries, strict=True):
        fitted.learn(make.label(0, name, features=query.features))
    refit(fitted)
    again = fitted.estimate("run", 0, queries)
    assert numbers(again) == numbers(first)
    assert [answer.probe_version for answer in again] == [1, 1]
    assert fitted.estimate("run", 1, queries)[0].probe_version == 2


def test_a_step_with_consumed_labels_is_rejected(fitted, make) -> None:
    fitted.learn(make.label(3, "g0"))
    with pytest.raises(LabelsConsumed, match=r"step 3 of run 'run'"):
        fitted.estimate("run", 3, [make.query("g1")])


def test_a_rejected_step_stays_rejected(fitted, make) -> None:
    """A rejected request must not pin its step."""
    fitted.learn(make.label(3))
    for _ in range(2):
        with pytest.raises(LabelsConsumed):
            fitted.estimate("run", 3, [make.query()])


def test_a_label_blocks_its_step_in_every_domain(fitted, make) -> None:
    fitted.learn(make.label(3, domain="new"))
    with pytest.raises(LabelsConsumed):
        fitted.estimate("run", 3, [make.query(domain="default")])


def test_a_rejected_request_computes_nothing(fitted, make, monkeypatch) -> None:
    fitted.learn(make.label(3))
    monkeypatch.setattr("poise.value.estimators.probe.model.FittedProbe.predict", lambda *_: pytest.fail("computed"))
    with pytest.raises(LabelsConsumed):
        fitted.estimate("run", 3, [make.query()])


def test_labels_of_another_run_do_not_block_a_step(fitted, make) -> None:
    fitted.learn(make.label(3, run_id="other"))
    assert fitted.estimate("run", 3, [make.query()])[0].values is not None


def test_labels_of_other_steps_do_not_block_a_step(fitted, make) -> None:
    for step in (5, 3):
        fitted.learn(make.label(step))
    refit(fitted)
    for step in (4, 0, 6):
        assert fitted.estimate("run", step, [make.query()])[0].probe_version == 2


def test_a_fit_between_two_requests_does_not_change_a_step(fitted, make) -> None:
    """A request in two parts; labels of the first part arrive before the second."""
    fitted.estimate("run", 0, [make.query("a")])
    fitted.learn(make.label(0, "a"))
    refit(fitted)
    assert fitted.estimate("run", 0, [make.query("b")])[0].probe_version == 1


def test_a_pin_covers_domains_requested_later(fitted, make) -> None:
    for step in range(4):
        fitted.learn(make.label(step, run_id="past", group_id="late", domain="late"))
    before = refit(fitted, "late")
    fitted.estimate("run", 0, [make.query()])  # no mention of "late"
    fitted.learn(make.label(0, domain="late"))
    refit(fitted, "late")
    assert fitted.estimate("run", 0, [make.query(domain="late")])[0].probe_version == before.version


def test_a_domain_pinned_without_a_probe_has_none_in_that_step(fitted, make) -> None:
    query = make.query(domain="new")
    assert fitted.estimate("run", 0, [query])[0].values is None
    for step in range(4):
        fitted.learn(make.label(step, domain="new"))
    refit(fitted, "new")
    assert fitted.estimate("run", 0, [query])[0].values is None
    assert fitted.estimate("run", 9, [query])[0].values is not None


def test_a_pin_survives_labels_refits_and_a_restart(fitted, config, make) -> None:
    queries = [make.query()]
    first = fitted.estimate("run", 0, queries)
    fitted.learn(make.label(0))
    refit(fitted)
    restarted = restart(fitted, config())
    assert numbers(restarted.estimate("run", 0, queries)) == numbers(first)
    assert restarted.estimate("run", 1, queries)[0].probe_version == 2


def test_a_restart_keeps_which_domains_are_behind(fitted, config, make) -> None:
    queries = [make.query(domain=domain) for domain in ("default", "behind")]
    fitted.estimate("run", 0, queries[:1], behind=frozenset({"behind"}))
    again = restart(fitted, config()).estimate("run", 0, queries, behind=None)
    assert [answer.up_to_date for answer in again] == [True, False]


def test_a_restart_does_not_unblock_a_step_with_labels(fitted, config, make) -> None:
    fitted.learn(make.label(0))
    with pytest.raises(LabelsConsumed):
        restart(fitted, config()).estimate("run", 0, [make.query()])


def test_a_label_after_a_restart_is_compared_with_its_pin(fitted, config, make) -> None:
    fitted.estimate("run", 0, [make.query()])
    restarted = restart(fitted, config())
    restarted.learn(make.label(0))
    assert len(restarted.domains["default"].diagnostics) == 2
    before = restarted.domains["default"].diagnostics.quality()
    assert restart(restarted, config()).domains["default"].diagnostics.quality() == before


def test_a_step_older_than_the_horizon_is_rejected(fitted, config, make) -> None:
    short = restart(fitted, config(horizon_steps=2))
    for step in (1, 4, 5, 6):
        short.learn(make.label(step))
    for step in (0, 1, 4):
        with pytest.raises(LabelsConsumed):
            short.estimate("run", step, [make.query()])


def test_a_dropped_pin_is_renewed_only_without_labels(config, make) -> None:
    state = ValueState(config(pinned_steps=2))
    for step in range(4):
        state.learn(make.label(step, run_id="past"))
    refit(state)
    for step in range(4):
        state.estimate("run", step, [make.query()])
    state.learn(make.label(0))
    with pytest.raises(LabelsConsumed):
        state.estimate("run", 0, [make.query()])
    assert state.estimate("run", 1, [make.query()])[0].values is not None


def test_a_dead_lettered_label_does_not_block_its_step(config, make) -> None:
    state = ValueState(config(horizon_steps=1))
    state.learn(make.label(7))
    assert state.learn(make.label(5)) is Admission.TOO_OLD
    assert state.estimate("run", 8, [make.query()])[0].values is None


@pytest.mark.parametrize("seed", range(8))
def test_no_interleaving_leaks_a_label_of_the_step(config, make, seed) -> None:
    """Random requests, labels, starts and ends of fits, and restarts, checked against what each probe has seen."""
    random = np.random.default_rng(seed)
    settings = config(pinned_steps=3, horizon_steps=6, max_runs=2)
    state = ValueState(settings)
    seen_by_version: dict[tuple[str, int], set[tuple[str, int]]] = {}
    versions: dict[str, int] = {}
    begun: list[tuple[str, tuple[Label, ...], int]] = []
    num_answers = num_refusals = 0
    queries = {domain: make.query(domain=domain) for domain in ("a", "b")}
    for turn in range(600):
        run, step, domain = (
            f"run{random.integers(2)}",
            turn // 60 + int(random.integers(4)),
            str(random.choice(["a", "b"])),
        )
        match random.choice(["ask", "learn", "begin fit", "end fit", "restart"], p=[0.4, 0.3, 0.14, 0.14, 0.02]):
            case "ask":
                try:
                    (answer,) = state.estimate(run, step, [queries[domain]])
                except LabelsConsumed:
                    num_refusals += 1
                    continue
                num_answers += answer.values is not None
                assert (run, step) not in seen_by_version.get((domain, answer.probe_version), set())
            case "learn":
                state.learn(make.label(step, f"g{turn}", run_id=run, domain=domain))
            case "begin fit":
                if domain in state.domains:
                    window = state.domains[domain].window
                    begun.append((domain, window.groups, window.num_added))
            case "end fit":
                if begun:
                    name, groups, num_added = begun.pop(0)
                    versions[name] = versions.get(name, 0) + 1
                    probe = FITTER.fit(*training_data(groups))
                    seen_by_version[name, versions[name]] = {(group.run_id, group.step) for group in groups}
                    state.install(name, VersionedProbe(versions[name], probe, num_added, 0.0))
            case "restart":
                state = restart(state, settings)
                begun.clear()
    assert num_answers > 10
    assert num_refusals > 10


# Values and baselines.


def test_baselines_are_the_mean_value_of_the_siblings(fitted, make) -> None:
    queries = [make.query("a", n=4), make.query("b", n=2)]
    for query, answer in zip(queries, fitted.estimate("run", 0, queries), strict=True):
        expected = fitted.probes["default"].probe.predict(query.features)
        np.testing.assert_array_equal(answer.values, expected)
        np.testing.assert_array_equal(answer.baselines, mean_of_others(expected))
        assert answer.group_id == query.group_id


def test_a_single_rollout_has_a_value_and_no_baseline(fitted, make) -> None:
    (answer,) = fitted.estimate("run", 0, [make.query(n=1)])
    assert answer.values.shape == (1,)
    assert answer.baselines is None


def test_each_domain_is_answered_by_its_own_probe_in_order(fitted, make) -> None:
    for step in range(4):
        fitted.learn(make.label(step, run_id="past", group_id="m", domain="math"))
    refit(fitted, "math")
    refit(fitted, "math")
    order = ["math", "default", "unknown", "math"]
    answers = fitted.estimate("run", 0, [make.query(str(i), domain=name) for i, name in enumerate(order)])
    assert [answer.group_id for answer in answers] == ["0", "1", "2", "3"]
    assert [answer.probe_version for answer in answers] == [2, 1, 0, 2]
    assert answers[2].values is None


def test_each_domain_is_predicted_once(fitted, make, monkeypatch) -> None:
    from poise.value.estimators.probe.model import FittedProbe

    sizes = []
    predict = FittedProbe.predict
    monkeypatch.setattr(FittedProbe, "predict", lambda self, rows: sizes.append(len(rows)) or predict(self, rows))
    fitted.estimate("run", 0, [make.query(str(i), n=3) for i in range(5)])
    assert sizes == [15]


def test_a_group_of_another_width_than_the_probe_is_named(fitted, make) -> None:
    with pytest.raises(InvalidRequest, match=r"groups\[1\].rollouts: .* width 9; .* needs 6"):
        fitted.estimate("run", 0, [make.query(), make.query(width=9)])


# The sibling's reward among the inputs.


def with_rewards(query: GroupQuery, rewards: np.ndarray) -> GroupQuery:
    return replace(query, features=replace(query.features, rewards=rewards.astype(np.float32)))


@pytest.fixture
def rewarded(config: Build, make) -> ValueState:
    """A state whose probe needs rewards; the probe of domain "plain" does not."""
    state = ValueState(config())
    for step in range(10):
        state.learn(make.label(step, run_id="past", n=3))
        state.learn(make.label(step, "p", run_id="past", domain="plain"))
    fitter = IncrementalFitter(("prompt_hidden", "response_hidden", "entropy", "sibling_reward"), 4, 4, 1.0)
    probe = fitter.fit(state.domains["default"].window.groups)
    state.install("default", VersionedProbe(1, probe, 10, 0.0))
    refit(state, "plain")
    return state


@pytest.mark.parametrize("n", [2, 3, 7])
def test_a_baseline_does_not_depend_on_the_rollouts_reward(rewarded, make, n) -> None:
    query = make.query(n=n)
    for own in range(n):
        rewards = make.rewards(n)
        (before,) = rewarded.estimate("run", 0, [with_rewards(query, rewards)])
        for changed in (0.0, 1.0, 1e-30, 1 - rewards[own]):
            rewards[own] = changed
            (after,) = rewarded.estimate("run", 0, [with_rewards(query, rewards)])
            assert after.baselines[own].tobytes() == before.baselines[own].tobytes()
            others = [i for i in range(n) if i != own]
            assert np.array_equal(after.values[others], before.values[others])
            assert after.values[own] != before.values[own]
            assert (after.baselines[others] != before.baselines[others]).all()


def test_a_request_without_required_rewards_is_rejected(rewarded, make) -> None:
    rich = with_rewards(make.query(), make.rewards())
    with pytest.raises(InvalidRequest) as caught:
        rewarded.estimate("run", 0, [make.query(domain="plain"), rich, make.query(), make.query(domain="new")])
    (violation,) = caught.value.violations
    assert violation.field == "groups[2].rewards"
    assert "sibling_reward among probe.inputs. Send each rollout's reward" in violation.description


def test_the_pinned_probe_says_whether_rewards_are_needed(fitted, rewarded, make) -> None:
    fitted.estimate("run", 0, [make.query()])
    fitted.install("default", replace(rewarded.probes["default"], version=2))
    assert fitted.estimate("run", 0, [make.query()])[0].probe_version == 1
    with pytest.raises(InvalidRequest, match=r"groups\[0\].rewards"):
        fitted.estimate("run", 1, [make.query()])


def test_rewards_that_are_not_inputs_change_nothing(rewarded, make) -> None:
    query = make.query(domain="plain")
    requested = [query, with_rewards(query, make.rewards()), with_rewards(query, make.rewards())]
    first, second, third = numbers(rewarded.estimate("run", 0, requested))
    assert first == second == third


def test_diagnostics_use_the_returned_values(rewarded, make) -> None:
    query = make.query(n=3)
    label = make.label(0, features=query.features)
    (answer,) = rewarded.estimate("run", 0, [with_rewards(query, label.rewards)])
    rewarded.learn(label)
    record = rewarded.domains["default"].diagnostics
    assert record.quality().brier == pytest.approx(float(np.mean((answer.values - label.targets) ** 2)), rel=1e-5)


# Prompts before any rollout.


def prompt(make, domain: str = "default", width: int = 6) -> PromptFeatures:
    return PromptFeatures(f"p{make.random.integers(1000)}", domain, make.features(1, width).prompt_hidden[0])


def test_each_prompt_is_scored_by_its_domains_probe_in_order(fitted, make) -> None:
    for step in range(4):
        fitted.learn(make.label(step, run_id="past", group_id="m", domain="math"))
    refit(fitted, "math")
    refit(fitted, "math")
    prompts = [prompt(make, domain) for domain in ("math", "default", "unknown", "math")]
    scores = fitted.score(prompts)
    assert [(score.group_id, score.probe_version) for score in scores] == [
        (requested.group_id, version) for requested, version in zip(prompts, (2, 1, 0, 2), strict=True)
    ]
    for requested, score in zip(prompts, scores, strict=True):
        if requested.domain == "unknown":
            assert score.value is None
        else:
            probe = fitted.probes[requested.domain].probe.prompt_only
            assert score.value == probe.predict(requested.prompt_hidden[None])[0]


def test_scores_tell_easy_prompts_from_hard_ones(config, make) -> None:
    """Rewards depend on the first number of the prompt's state, which siblings share."""
    state = ValueState(config())
    for step in range(100):
        rows = make.features(2)
        shared = replace(rows, prompt_hidden=np.repeat(rows.prompt_hidden[:1], 2, axis=0))
        state.learn(make.label(step, run_id="past", features=shared))
    refit(state)
    easy, hard = (replace(prompt(make), prompt_hidden=np.float32([x, 0, 0, 0, 0, 0])) for x in (2, -2))
    values = [score.value for score in state.score([easy, hard])]
    assert values[0] > 0.75 > 0.25 > values[1]


def test_scoring_pins_nothing_and_uses_the_current_probe(fitted, make) -> None:
    requested = prompt(make)
    fitted.estimate("run", 0, [make.query()])
    (first,) = fitted.score([requested])
    fitted.learn(make.label(0))
    refit(fitted)
    (second,) = fitted.score([requested])
    assert (first.probe_version, second.probe_version) == (1, 2)
    assert fitted.estimate("run", 0, [make.query()])[0].probe_version == 1
    fitted.learn(make.label(5))
    with pytest.raises(LabelsConsumed):
        fitted.estimate("run", 5, [make.query()])


def test_scores_survive_a_restart_to_the_last_bit(fitted, config, make) -> None:
    requested = [prompt(make) for _ in range(5)]
    assert restart(fitted, config()).score(requested) == fitted.score(requested)


def test_prompts_of_another_width_are_named(fitted, make) -> None:
    with pytest.raises(InvalidRequest, match=r"^prompts\[1\].prompt_hidden: has width 9; .* needs 6$"):
        fitted.score([prompt(make), prompt(make, width=9), prompt(make, "unknown", width=9)])


def test_prompts_need_prompt_hidden_among_the_inputs(fitted, config, make) -> None:
    blind = restart(fitted, config(probe={"inputs": ["response_hidden", "entropy"]}))
    with pytest.raises(InvalidRequest, match=r"probe.inputs is response_hidden, entropy, without prompt_hidden") as e:
        blind.score([prompt(make)])
    assert e.value.remedy == "Add prompt_hidden to probe.inputs of the value service."


def test_a_probe_fitted_without_prompts_gives_no_score_yet(fitted, make) -> None:
    fitter = IncrementalFitter(("response_hidden",), 4, 4, 1.0)
    probe = fitter.fit(fitted.domains["default"].window.groups)
    fitted.install("default", VersionedProbe(2, probe, 10, 0.0))
    assert fitted.score([prompt(make)])[0].value is None


# Learning.


def test_a_label_is_learnt_once_despite_redelivery_and_restart(config, make) -> None:
    state, label = ValueState(config()), make.label(0)
    assert state.learn(label) is Admission.NEW
    assert state.learn(label) is Admission.DUPLICATE
    restarted = restart(state, config())
    assert restarted.learn(label) is Admission.DUPLICATE
    assert (restarted.num_groups_consumed, restarted.num_duplicates) == (1, 2)
    assert restarted.domains["default"].window.num_rows == 2


def test_the_first_fit_waits_for_distinct_steps_and_rows(config, make) -> None:
    state = ValueState(config(probe={"warmup_steps": 3, "min_rows": 10}))
    due = []
    for step, group in [(0, "a"), (0, "b"), (0, "c"), (1, "a"), (1, "b"), (2, "a")]:
        state.learn(make.label(step, group))
        due.append(state.is_due("default"))
    assert due == [False] * 5 + [True]
    few_rows = ValueState(config(probe={"warmup_steps": 1, "min_rows": 4}))
    few_rows.learn(make.label(0))
    assert not few_rows.is_due("default")
    few_rows.learn(make.label(0, "b"))
    assert few_rows.is_due("default")


def test_the_same_step_of_two_runs_are_two_steps(config, make) -> None:
    state = ValueState(config())
    state.learn(make.label(0, run_id="one"))
    state.learn(make.label(0, run_id="two"))
    assert state.domains["default"].num_steps_seen == 2


def test_domains_warm_up_apart(config, make) -> None:
    state = ValueState(config())
    for step in range(2):
        state.learn(make.label(step, domain="math"))
    state.learn(make.label(0, "x", domain="code"))
    assert state.is_due("math")
    assert not state.is_due("code")


def test_a_fitted_domain_is_due_again_only_after_new_labels(fitted, config, make) -> None:
    assert not fitted.is_due("default")
    fitted.learn(make.label(0))
    assert fitted.is_due("default")
    assert restart(fitted, config()).is_due("default")
    refit(fitted)
    assert not restart(fitted, config()).is_due("default")


def taken(state: ValueState, label: Label) -> bool:
    """Learn a label as the updater does; return whether it was accepted."""
    rejection = state.rejection(label.domain, label.features.width) or state.width_vote(label)
    if rejection is None:
        state.learn(label)
    return rejection is None


def test_a_first_label_of_the_wrong_width_is_outvoted(config: Build, make) -> None:
    state = ValueState(config())
    assert taken(state, make.label(0, "wrong", width=9))
    assert taken(state, make.label(0))
    window = state.domains["default"].window
    assert (window.width, [group.group_id for group in window.groups], window.num_added) == (6, ["g0"], 2)
    assert state.learn(make.label(0, "wrong", width=9)) is Admission.DUPLICATE  # it was learnt, once


def test_the_width_of_the_majority_wins(config: Build, make) -> None:
    state = ValueState(config())
    widths = [9, 9, 6, 6, 6, 6, 6, 9, 6, 9, 6]
    accepted = [taken(state, make.label(step, width=width)) for step, width in enumerate(widths)]
    assert accepted == [True, True, False, True, True, True, True, False, True, False, True]
    window = state.domains["default"].window
    assert {group.features.width for group in window.groups} == {6}
    assert window.num_rows == 2 * 6


def test_a_probe_fixes_the_width(fitted, make) -> None:
    for step in range(30):
        assert not taken(fitted, make.label(step, width=9))
    assert fitted.domains["default"].window.width == 6


def test_labels_of_another_width_are_rejected_per_domain(fitted) -> None:
    assert fitted.rejection("default", 6) is None
    rejection = fitted.rejection("default", 9)
    assert rejection.field == "rollouts"
    assert "width 9" in rejection.description
    assert fitted.rejection("another", 9) is None


def test_the_number_of_domains_is_bounded(config, make) -> None:
    state = ValueState(config(probe={"max_domains": 1}))
    state.learn(make.label(0, domain="one"))
    assert state.rejection("one", 6) is None
    rejection = state.rejection("two", 6)
    assert rejection.field == "domain"
    assert "max_domains = 1" in rejection.description


def test_each_domain_has_its_own_window_size(config, make) -> None:
    probe = {"window_rows": 4, "window_rows_by_domain": {"math": 8}}
    state = ValueState(config(probe=probe))
    for step in range(10):
        state.learn(make.label(step, "a", domain="math"))
        state.learn(make.label(step, "b"))
    assert state.domains["math"].window.num_rows == 8
    assert state.domains["default"].window.num_rows == 4


# Diagnostics.


def test_diagnostics_compare_pinned_values_with_later_labels(fitted, make) -> None:
    query = make.query(n=4)
    (answer,) = fitted.estimate("run", 0, [query])
    refit(fitted)
    label = make.label(0, features=query.features)
    assert math.isnan(fitted.domains["default"].diagnostics.quality().brier)
    fitted.learn(label)
    record = fitted.domains["default"].diagnostics
    assert record.quality().brier == pytest.approx(float(np.mean((answer.values - label.targets) ** 2)), rel=1e-5)
    assert record.quality().pearson == pytest.approx(float(np.corrcoef(answer.values, label.targets)[0, 1]), rel=1e-4)


def test_diagnostics_ignore_unpinned_steps_and_duplicates(fitted, make) -> None:
    fitted.learn(make.label(0))
    fitted.estimate("run", 1, [make.query()])
    label = make.label(1)
    fitted.learn(label)
    fitted.learn(label)
    assert len(fitted.domains["default"].diagnostics) == 2
