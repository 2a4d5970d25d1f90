"""The state of the value service: windows, fitted estimators and consumed ids. Answers requests and learns labels.

Every method runs on the event loop without yielding. So a request never sees a label whose id is not yet recorded as
consumed. This module has no I/O and no threads.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from poise.errors import FieldViolation, InvalidRequest
from poise.value.config import ValueConfig
from poise.value.dedup import Admission, ConsumedLabels
from poise.value.estimators.diagnostics import Diagnostics
from poise.value.estimators.features import GroupQuery, Label
from poise.value.estimators.interface import Answer
from poise.value.estimators.probe.model import FittedProbe, PromptProbe
from poise.value.estimators.step_probes import Probes, StepProbes, VersionedProbe
from poise.value.estimators.window import Window
from poise.value.store import DomainSnapshot, Snapshot
from poise_client.types import Estimator, EstimatorError, GroupBaselines, ProbeStatus, PromptFeatures, PromptScore


@dataclass(eq=False)
class Domain:
    """The state of one domain, except its current probe."""

    window: Window
    diagnostics: Diagnostics
    num_steps_seen: int = 0
    num_estimated_rows: int = 0
    restored_version: int = 0
    """The newest version at the start of the process, also if the domain has another estimator now."""
    label_lag_s: float = math.nan
    """Seconds from publishing the newest learnt label to saving it."""


class ValueState:
    """Windows, consumed ids, fitted estimators and pinned steps of all domains, kept consistent."""

    def __init__(self, config: ValueConfig, saved: Snapshot | None = None) -> None:
        self._config = config
        self.instance_id = saved.instance_id if saved else uuid.uuid4().hex
        self._consumed = ConsumedLabels(config.horizon_steps, config.max_runs, saved.consumed if saved else None)
        self._step_probes = StepProbes(config.pinned_steps, config.max_runs, saved.pins if saved else ())
        self.domains: dict[str, Domain] = {}
        """The domains by name."""
        saved_domains = saved.domains if saved else ()
        self.probes: Probes = {
            domain.domain: domain.probe
            for domain in saved_domains
            if domain.probe and self._is_selected(domain.probe.probe.estimator, domain.domain)
        }
        """The current probe of each domain. Replaced, never changed in place: pins keep references."""
        self.num_groups_consumed = saved.num_groups_consumed if saved else 0
        self.num_duplicates = saved.num_duplicates if saved else 0
        self.newest_entry = saved.newest_entry if saved else ""
        """Id of the newest queue entry whose label is in the state."""
        for domain in saved_domains:
            self._restore(domain)

    def _restore(self, saved: DomainSnapshot) -> None:
        """Add a saved domain, without labels that lack the inputs of an estimator that is now configured."""
        name, max_rows = saved.domain, self._config.probe.rows_of(saved.domain)
        self.domains[name] = Domain(
            Window(max_rows, saved.groups, saved.num_added),
            Diagnostics(max_rows, saved.valued, saved.num_valued),
            saved.num_steps_seen,
            restored_version=saved.newest_version,
        )
        uses_probe = self._uses_probe(name)
        self.remove(name, [group for group in saved.groups if (group.moments is None) != uses_probe])

    def would_pin(self, run_id: str, step: int) -> bool:
        """Whether a request about the step would pin it now."""
        return self._step_probes.get(run_id, step) is None and not self._consumed.may_have_labels_of(run_id, step)

    def estimate(
        self, run_id: str, step: int, groups: Sequence[GroupQuery], *, behind: frozenset[str] | None = None
    ) -> list[GroupBaselines]:
        """Return the baselines of groups of one step, from the probes pinned for it, in the order of the request.

        If this request pins the step, it also stores `behind`: the domains whose estimators lack a published label, or
        None if unknown.

        Raises:
            LabelsConsumed: the step is not pinned and its labels were consumed, or may have been.
            InvalidRequest: hidden states do not have the probe's width, or rewards that the probe needs are missing.
        """
        labels_consumed = self._consumed.may_have_labels_of(run_id, step)
        pin = self._step_probes.get_or_pin(run_id, step, self.probes, labels_consumed=labels_consumed, behind=behind)
        probes = pin.probes
        _check_inputs(groups, probes)
        found = _answers(groups, probes)
        answers = []
        for index, group in enumerate(groups):
            up_to_date = pin.is_up_to_date(group.domain)
            if index not in found:
                answers.append(GroupBaselines(group.group_id, 0, None, None, up_to_date))
                continue
            values, baselines, token_baselines = found[index]
            fitted = probes[group.domain]
            answers.append(
                GroupBaselines(
                    group.group_id,
                    fitted.version,
                    values,
                    baselines,
                    up_to_date,
                    fitted.probe.estimator,
                    token_baselines,
                )
            )
            if group.domain in self.domains:
                self.domains[group.domain].num_estimated_rows += len(group.features)
        return answers

    def score(self, prompts: Sequence[PromptFeatures]) -> list[PromptScore]:
        """Return the expected rewards of prompts, from the current probes, in the order of the request.

        Pins no estimator. Scores may depend on any label, because they are never baselines.

        Raises:
            InvalidRequest: `prompt_hidden` is not among the probe's inputs, or states do not have the probe's width.
        """
        if "prompt_hidden" not in self._config.probe.inputs:
            raise InvalidRequest.field(
                "prompts",
                f"cannot be scored: probe.inputs is {', '.join(self._config.probe.inputs)}, without prompt_hidden",
                remedy="Add prompt_hidden to probe.inputs of the value service.",
            )
        # A probe fitted while prompt_hidden was not an input has no prompt-only probe until the next fit.
        probes = {
            name: fitted.probe.prompt_only
            for name, fitted in self.probes.items()
            if isinstance(fitted.probe, FittedProbe) and fitted.probe.prompt_only is not None
        }
        _check_prompt_widths(prompts, probes)
        scores = [PromptScore(prompt.group_id, 0, None) for prompt in prompts]
        for name in {prompt.domain for prompt in prompts} & probes.keys():
            indices = [index for index, prompt in enumerate(prompts) if prompt.domain == name]
            values = probes[name].predict(np.stack([prompts[index].prompt_hidden for index in indices]))
            for index, value in zip(indices, values.tolist(), strict=True):
                scores[index] = PromptScore(prompts[index].group_id, self.probes[name].version, value)
        return scores

    def configured(self, domain: str) -> Estimator:
        """Return the configured estimator of a domain."""
        return self._config.estimator_of(domain)

    def estimators_of_step(self, run_id: str, step: int) -> Callable[[str], Estimator]:
        """Return which estimator a step uses by domain: the pinned one, which a restart with other settings keeps.

        The returned function may be called in another thread.
        """
        pin = self._step_probes.get(run_id, step)
        pinned = pin.probes if pin else {}

        def estimator_of(domain: str) -> Estimator:
            return pinned[domain].probe.estimator if domain in pinned else self.configured(domain)

        return estimator_of

    def rejection(self, domain: str, width: int) -> FieldViolation | None:
        """Return why a label cannot be learnt; None if it can, or if only `width_vote` decides."""
        known = self.domains.get(domain)
        if known is None:
            limit = self._config.probe.max_domains
            if len(self.domains) < limit:
                return None
            return FieldViolation("domain", f"{domain!r} would exceed probe.max_domains = {limit}")
        return self._width_rejection(domain, known, width) if domain in self.probes else None

    def width_vote(self, label: Label) -> FieldViolation | None:
        """Count a label's width. Return why the label is rejected, or None. Only a domain without a fit votes.

        The first label of a domain may have the wrong width, so a label of another width is rejected but counts
        against the window. Once such labels are the majority, the window is emptied. Dropped labels still count as
        consumed.
        """
        known = self.domains.get(label.domain)
        width = label.features.width
        if known is None or label.domain in self.probes or _agree(width, known.window.width):
            return None
        if not known.window.vote_against_width():
            return self._width_rejection(label.domain, known, width)
        known.window = Window(self._config.probe.rows_of(label.domain), (), known.window.num_added)
        return None

    @staticmethod
    def _width_rejection(name: str, domain: Domain, width: int) -> FieldViolation | None:
        expected = domain.window.width
        if _agree(width, expected):
            return None
        return FieldViolation(
            "rollouts",
            f"hidden states have width {width}, but those of domain {name!r} have {expected}; "
            "use another domain for labels of another model",
        )

    def learn(self, label: Label) -> Admission:
        """Add a group to its window, at most once ever. Call `rejection` and `width_vote` first."""
        is_first_of_step = not self._consumed.has_domain_in(label.run_id, label.step, label.domain)
        admission = self._consumed.admit(label.run_id, label.step, label.group_id, label.domain)
        if admission is Admission.DUPLICATE:
            self.num_duplicates += 1
        if admission is not Admission.NEW:
            return admission
        domain = self.domains.get(label.domain)
        if domain is None:
            max_rows = self._config.probe.rows_of(label.domain)
            domain = self.domains[label.domain] = Domain(Window(max_rows), Diagnostics(max_rows))
        domain.num_steps_seen += is_first_of_step
        domain.window.add(label.reduced())
        self.num_groups_consumed += 1
        pin = self._step_probes.get(label.run_id, label.step)
        if pin is not None and label.domain in pin.probes:
            valued = pin.probes[label.domain].probe.compare(label)
            if valued is not None:
                domain.diagnostics.add(valued)
        return admission

    def remove(self, name: str, groups: Sequence[Label]) -> None:
        """Remove learnt groups from a domain's window. They still count as consumed."""
        domain = self.domains[name]
        if groups:
            domain.window = domain.window.without(groups)

    def is_due(self, name: str, num_added: int | None = None) -> bool:
        """Whether a domain is past its warm-up and its probe has not seen all its labels.

        With `num_added`, consider only the first `num_added` labels ever added to the window.
        """
        domain, probe, config = self.domains[name], self.probes.get(name), self._config.probe
        warm = domain.num_steps_seen >= self._warmup_steps(name) and (
            domain.window.num_rows >= (config.min_rows if self._uses_probe(name) else 1)
        )
        wanted = domain.window.num_added if num_added is None else num_added
        return (probe is not None or warm) and wanted > (probe.num_added if probe else 0)

    def probe_status(self, name: str) -> ProbeStatus:
        """Return the status of one domain's probe."""
        domain, probe = self.domains[name], self.probes.get(name)
        return ProbeStatus(
            domain=name,
            probe_version=probe.version if probe else 0,
            num_groups=len(domain.window.groups),
            num_rows=domain.window.num_rows,
            num_steps_seen=domain.num_steps_seen,
            warmup_steps=self._warmup_steps(name),
            last_fit_s=probe.fit_s if probe else 0.0,
            label_lag_s=domain.label_lag_s,
            quality=domain.diagnostics.quality(),
            configured=self.configured(name),
            estimator=probe.probe.estimator if probe else "",
            errors=tuple(EstimatorError(*item) for item in probe.probe.errors.items()) if probe else (),
        )

    def _warmup_steps(self, name: str) -> int:
        """Only the probe has a warm-up: a score-weighted estimator is useful from its first label on."""
        return self._config.probe.warmup_steps if self._uses_probe(name) else 1

    def _uses_probe(self, name: str) -> bool:
        return self.configured(name) == "probe"

    def _is_selected(self, estimator: Estimator, name: str) -> bool:
        """Whether a fitted estimator is of the kind that the configuration selects."""
        selected = self.configured(name)
        return estimator == selected or (selected == "auto" and estimator != "probe")

    def domains_of_run(self, run_id: str) -> list[str]:
        """Return the domains whose windows contain labels of a run."""
        return [
            name
            for name, domain in self.domains.items()
            if any(group.run_id == run_id for group in domain.window.groups)
        ]

    def next_version(self, name: str) -> int:
        """Return the version of a domain's next fitted estimator."""
        return self._newest_version(name, self.probes) + 1

    def _newest_version(self, name: str, probes: Probes) -> int:
        return max(self.domains[name].restored_version, probes[name].version if name in probes else 0)

    def install(self, name: str, probe: VersionedProbe) -> None:
        """Use a probe for steps that are not pinned yet."""
        self.probes = {**self.probes, name: probe}

    def snapshot(self, fitted: tuple[str, VersionedProbe] | None = None) -> Snapshot:
        """Return the current state. A `fitted` probe replaces the current one of its domain."""
        probes = {**self.probes, **dict([fitted] if fitted else [])}
        return Snapshot(
            self.instance_id,
            tuple(
                DomainSnapshot(
                    name,
                    domain.window.groups,
                    domain.window.num_added,
                    domain.num_steps_seen,
                    probes.get(name),
                    domain.diagnostics.groups,
                    domain.diagnostics.num_added,
                    self._newest_version(name, probes),
                )
                for name, domain in self.domains.items()
            ),
            self._consumed.snapshot(),
            self._step_probes.all(),
            self.num_groups_consumed,
            self.num_duplicates,
            self.newest_entry,
        )


def _agree(width: int, other: int) -> bool:
    """Whether labels with hidden states of these widths can have one fit. 0 means that there are none."""
    return 0 in (width, other) or width == other


def _check_inputs(groups: Sequence[GroupQuery], probes: Probes) -> None:
    violations = [
        FieldViolation(f"groups[{index}].{field}", description)
        for index, group in enumerate(groups)
        if group.domain in probes
        for field, description in probes[group.domain].probe.problems(group)
    ]
    if violations:
        raise InvalidRequest(violations)


def _check_prompt_widths(prompts: Sequence[PromptFeatures], probes: Mapping[str, PromptProbe]) -> None:
    violations = [
        FieldViolation(
            f"prompts[{index}].prompt_hidden",
            f"has width {prompt.prompt_hidden.size}; the probe of domain {prompt.domain!r} needs "
            f"{probes[prompt.domain].weights_d.size}",
        )
        for index, prompt in enumerate(prompts)
        if prompt.domain in probes and prompt.prompt_hidden.size != probes[prompt.domain].weights_d.size
    ]
    if violations:
        raise InvalidRequest(violations)


def _answers(groups: Sequence[GroupQuery], probes: Probes) -> dict[int, Answer]:
    """Return the answers to the groups that have a probe, by index. One call per domain."""
    answers: dict[int, Answer] = {}
    for name in {group.domain for group in groups} & probes.keys():
        indices = [index for index, group in enumerate(groups) if group.domain == name]
        answers |= zip(indices, probes[name].probe.answer([groups[index] for index in indices]), strict=True)
    return answers
