"""What the service knows, and the two things it does with it: value rollouts, and learn from labels.

Owns windows, ledger, probes and pins, and keeps them consistent: every method here runs to its end without yielding, on
the event loop, so no question ever falls between a label's entering a window and its being on the ledger. Knows no
protobuf, no queue, no files and no threads.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from poise.algorithms.baselines import mean_of_others
from poise.errors import FieldViolation, InvalidRequest
from poise.value.config import ValueConfig
from poise.value.dedup import Admission, Ledger
from poise.value.probe.diagnostics import TrackRecord, ValuedGroup
from poise.value.probe.features import FeatureRows, Floats, LabelledRows
from poise.value.probe.model import PromptProbe
from poise.value.probe.window import Window
from poise.value.step_probes import Probes, StepPins, VersionedProbe
from poise.value.store.snapshot import DomainSnapshot, Snapshot
from poise_client.types import GroupBaselines, PromptFeatures, PromptScore


@dataclass(frozen=True, slots=True, eq=False)
class GroupRows:
    """One group to be valued."""

    group_id: str
    domain: str
    rows: FeatureRows
    """Their rewards are needed where the domain's probe takes them."""


@dataclass(eq=False)
class Domain:
    """What is known of one domain, its current probe apart."""

    window: Window
    record: TrackRecord
    num_steps_seen: int = 0
    num_estimated_rows: int = 0
    label_lag_s: float = math.nan
    """From publishing to the durable state, of the label learnt last."""


class BaselineEstimator:
    """The state of the service."""

    def __init__(self, config: ValueConfig, saved: Snapshot | None = None) -> None:
        self._config = config
        self.instance_id = saved.instance_id if saved else uuid.uuid4().hex
        self._ledger = Ledger(config.horizon_steps, config.max_runs)
        self._pins = StepPins(config.pinned_steps, config.max_runs, saved.pins if saved else ())
        self._domains: dict[str, Domain] = {}
        self.probes: Probes = {}
        self.num_groups_consumed = saved.num_groups_consumed if saved else 0
        self.num_duplicates = saved.num_duplicates if saved else 0
        self.newest_entry = saved.newest_entry if saved else ""
        """Id of the newest queue entry whose label is in the state."""
        if saved:
            self._restore(saved)

    def _restore(self, saved: Snapshot) -> None:
        self._ledger.restore(saved.ledger)
        for domain in saved.domains:
            window = Window(self._config.probe.rows_of(domain.domain), domain.groups, domain.num_added)
            record = TrackRecord(self._config.probe.rows_of(domain.domain), domain.record, domain.num_recorded)
            self._domains[domain.domain] = Domain(window, record, domain.num_steps_seen)
        self.probes = {domain.domain: domain.probe for domain in saved.domains if domain.probe is not None}

    def _add_domain(self, name: str) -> Domain:
        max_rows = self._config.probe.rows_of(name)
        domain = self._domains[name] = Domain(Window(max_rows), TrackRecord(max_rows))
        return domain

    @property
    def domains(self) -> Mapping[str, Domain]:
        """By name."""
        return self._domains

    def would_pin(self, run_id: str, step: int) -> bool:
        """Whether a question about the step now would be the one that pins it."""
        return self._pins.pinned(run_id, step) is None and not self._ledger.may_have_labels_of(run_id, step)

    def estimate(
        self, run_id: str, step: int, groups: Sequence[GroupRows], *, behind: frozenset[str] | None = None
    ) -> list[GroupBaselines]:
        """Value groups of one step with the probes pinned for it, in the order asked.

        `behind` are the domains whose probes of now have not seen every label published before the question, None where
        that is not known; it is told of the step from then on, if this question pins it.

        Raises:
            LabelsConsumed: the step is not pinned, and its labels have been consumed or that cannot be ruled out.
            InvalidRequest: hidden states of another width than the probe's, or no rewards for a probe that takes them.
        """
        labels_consumed = self._ledger.may_have_labels_of(run_id, step)
        pin = self._pins.answering(run_id, step, self.probes, labels_consumed=labels_consumed, behind=behind)
        probes = pin.probes
        _check_inputs(groups, probes)
        values = _values(groups, probes)
        answers = []
        for index, group in enumerate(groups):
            settled = pin.is_settled(group.domain)
            if index not in values:
                answers.append(GroupBaselines(group.group_id, 0, None, None, settled))
                continue
            baselines = mean_of_others(values[index]) if len(group.rows) > 1 else None
            version = probes[group.domain].version
            answers.append(GroupBaselines(group.group_id, version, values[index], baselines, settled))
            if group.domain in self._domains:
                self._domains[group.domain].num_estimated_rows += len(group.rows)
        return answers

    def score(self, prompts: Sequence[PromptFeatures]) -> list[PromptScore]:
        """Value prompts from their states alone with the current probes, in the order asked.

        Nothing is pinned: which prompts are sampled may depend on any label, and baselines are not made from this.

        Raises:
            InvalidRequest: probes do not see prompts here; or states of another width than the probe's.
        """
        if "prompt_hidden" not in self._config.probe.inputs:
            raise InvalidRequest.field(
                "prompts",
                f"cannot be valued: probe.inputs is {', '.join(self._config.probe.inputs)}, without prompt_hidden",
                remedy="Add prompt_hidden to probe.inputs of the value service.",
            )
        # None of a probe that was fitted when prompt_hidden was not among the inputs: the next fit brings one.
        probes = {
            name: fitted.probe.prompt_only
            for name, fitted in self.probes.items()
            if fitted.probe.prompt_only is not None
        }
        _check_prompt_widths(prompts, probes)
        scores = [PromptScore(prompt.group_id, 0, None) for prompt in prompts]
        for name in {prompt.domain for prompt in prompts} & probes.keys():
            indices = [index for index, prompt in enumerate(prompts) if prompt.domain == name]
            values = probes[name].predict(np.stack([prompts[index].prompt_hidden for index in indices]))
            for index, value in zip(indices, values.tolist(), strict=True):
                scores[index] = PromptScore(prompts[index].group_id, self.probes[name].version, value)
        return scores

    def refusal(self, domain: str, width: int) -> FieldViolation | None:
        """Why a label could not be learnt from, naming its field; None if it could, or `dissent` has to tell."""
        known = self._domains.get(domain)
        if known is None:
            limit = self._config.probe.max_domains
            if len(self._domains) < limit:
                return None
            return FieldViolation("domain", f"{domain!r} would be one more than probe.max_domains = {limit}")
        return self._width_refusal(domain, known, width) if domain in self.probes else None

    def dissent(self, label: LabelledRows) -> FieldViolation | None:
        """Let a label of another width than its domain's count against that width, as long as no probe has it.

        The first label of a domain may be the wrong one. Returns why this one is refused; None if it is not, which may
        have emptied the window for it. Labels that were learnt stay on the ledger.
        """
        known = self._domains.get(label.domain)
        if known is None or label.domain in self.probes or known.window.width in (None, label.rows.width):
            return None
        if not known.window.outvoted():
            return self._width_refusal(label.domain, known, label.rows.width)
        known.window = Window(self._config.probe.rows_of(label.domain), (), known.window.num_added)
        return None

    @staticmethod
    def _width_refusal(name: str, domain: Domain, width: int) -> FieldViolation | None:
        expected = domain.window.width
        if expected is None or expected == width:
            return None
        return FieldViolation(
            "rollouts",
            f"hidden states are {width} wide, but domain {name!r} holds {expected} wide ones; "
            "give another model's labels another domain",
        )

    def learn(self, label: LabelledRows) -> Admission:
        """Add a group to its window, at most once ever. Call `refusal` first."""
        is_first_of_step = not self._ledger.has_domain_in(label.run_id, label.step, label.domain)
        admission = self._ledger.admit(label.run_id, label.step, label.group_id, label.domain)
        if admission is Admission.DUPLICATE:
            self.num_duplicates += 1
        if admission is not Admission.NEW:
            return admission
        domain = self._domains.get(label.domain) or self._add_domain(label.domain)
        domain.num_steps_seen += is_first_of_step
        domain.window.add(label)
        self.num_groups_consumed += 1
        pin = self._pins.pinned(label.run_id, label.step)
        pinned = None if pin is None else pin.probes.get(label.domain)
        if pinned is not None:
            domain.record.add(ValuedGroup(label.run_id, label.step, pinned.probe.predict(label.inputs), label.rewards))
        return admission

    def expel(self, name: str, groups: Sequence[LabelledRows]) -> None:
        """Take learnt groups out of a domain's window. They stay on the ledger."""
        domain = self._domains[name]
        domain.window = domain.window.without(groups)

    def is_due(self, name: str, num_added: int | None = None) -> bool:
        """Whether a domain is past its warm-up and holds labels that its probe has not seen.

        Of the first `num_added` that its window was ever given, or of all.
        """
        domain, probe, config = self._domains[name], self.probes.get(name), self._config.probe
        warm = domain.num_steps_seen >= config.warmup_steps and domain.window.num_rows >= config.min_rows
        wanted = domain.window.num_added if num_added is None else num_added
        return (probe is not None or warm) and wanted > (probe.num_added if probe else 0)

    def taught_by(self, run_id: str) -> list[str]:
        """Return the domains whose windows hold labels of a run."""
        return [
            name
            for name, domain in self._domains.items()
            if any(group.run_id == run_id for group in domain.window.groups)
        ]

    def install(self, name: str, probe: VersionedProbe) -> None:
        """Let a probe answer for steps not pinned yet."""
        self.probes = {**self.probes, name: probe}

    def snapshot(self, fitted: Mapping[str, VersionedProbe] | None = None) -> Snapshot:
        """Return the state now, with `fitted` in place of the current probes of their domains."""
        probes = {**self.probes, **(fitted or {})}
        return Snapshot(
            self.instance_id,
            tuple(
                DomainSnapshot(
                    name,
                    domain.window.groups,
                    domain.window.num_added,
                    domain.num_steps_seen,
                    probes.get(name),
                    domain.record.groups,
                    domain.record.num_added,
                )
                for name, domain in self._domains.items()
            ),
            self._ledger.snapshot(),
            self._pins.all(),
            self.num_groups_consumed,
            self.num_duplicates,
            self.newest_entry,
        )


def _check_inputs(groups: Sequence[GroupRows], probes: Probes) -> None:
    violations = []
    for index, group in enumerate(groups):
        if group.domain not in probes:
            continue
        probe = probes[group.domain].probe
        if probe.width is not None and group.rows.width != probe.width:
            violations.append(
                FieldViolation(
                    f"groups[{index}].rollouts",
                    f"hidden states are {group.rows.width} wide; the probe of domain {group.domain!r} takes "
                    f"{probe.width}",
                )
            )
        if probe.needs_rewards and group.rows.rewards is None:
            violations.append(
                FieldViolation(
                    f"groups[{index}].rewards",
                    f"is unset, and the probe of domain {group.domain!r} was fitted with sibling_reward among "
                    "probe.inputs; send each rollout's reward, in [0, 1]",
                )
            )
    if violations:
        raise InvalidRequest(violations)


def _check_prompt_widths(prompts: Sequence[PromptFeatures], probes: Mapping[str, PromptProbe]) -> None:
    violations = [
        FieldViolation(
            f"prompts[{index}].prompt_hidden",
            f"is {prompt.prompt_hidden.size} wide; the probe of domain {prompt.domain!r} takes "
            f"{probes[prompt.domain].weights_d.size}",
        )
        for index, prompt in enumerate(prompts)
        if prompt.domain in probes and prompt.prompt_hidden.size != probes[prompt.domain].weights_d.size
    ]
    if violations:
        raise InvalidRequest(violations)


def _values(groups: Sequence[GroupRows], probes: Probes) -> dict[int, Floats]:
    """Return the values of the groups that have a probe, by index: one call a domain."""
    values: dict[int, Floats] = {}
    for name in {group.domain for group in groups} & probes.keys():
        indices = [index for index, group in enumerate(groups) if group.domain == name]
        batch = probes[name].probe.predict(FeatureRows.concatenate([groups[index].rows for index in indices]))
        start = 0
        for index in indices:
            end = start + len(groups[index].rows)
            values[index] = batch[start:end]
            start = end
    return values
