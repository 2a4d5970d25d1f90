"""The estimators of `probe_ablation`: the probe with various inputs, and its rivals.

Shapes: P prompts of a domain's split, n rollouts of each, S sums.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import critic
import numpy as np
from critic import Floats
from probe_ablation_data import MODEL, Domain, digest
from probe_ablation_metrics import Doubles, beta_moments, others, row_sums

from poise.algorithms.baselines import batch_mean
from poise.algorithms.spo_tracker import BetaTracker
from poise.local.models.catalog import make_model
from poise.runtime.files.atomic import write_file
from poise.value.config import ProbeConfig
from poise.value.estimators.features import FeatureMatrix, Label
from poise.value.estimators.probe.incremental import IncrementalFitter
from poise.value.estimators.probe.model import FittedProbe, ProbeInput

PAPER: tuple[ProbeInput, ...] = ("prompt_hidden", "response_hidden", "entropy")
REFERENCE = "probe: the paper's three"
WITH_REWARD = "probe: three + sibling's reward"
INPUTS: dict[str, tuple[ProbeInput, ...]] = {
    "probe: sibling's reward": ("sibling_reward",),
    "probe: entropy": ("entropy",),
    "probe: entropy + sibling's reward": ("entropy", "sibling_reward"),
    "probe: response": ("response_hidden",),
    "probe: prompt": ("prompt_hidden",),
    REFERENCE: PAPER,
    WITH_REWARD: (*PAPER, "sibling_reward"),
}
ROWS_PER_COMPONENT = ProbeConfig().rows_per_component
FRUGAL = {name: f"{name}, {ROWS_PER_COMPONENT} rows a dimension" for name in (REFERENCE, WITH_REWARD)}
"""Inputs that are also tried with the default number of dimensions, and the name of that estimator."""
COMPONENTS = (32, 64)
ALPHA = 100.0

CONSTANT = "constant"
RLOO = "sibling's reward (RLOO of 2)"
SEEN = "probe, past in its window"

DISCOUNTS = (1.0, 0.875)
"""Half-lives of the tracker: none, which is best for a fixed policy, and 8 visits."""
TRACKER = f"tracker, discount {DISCOUNTS[0]:g}"
PASSES = (0, 1, 2, 4)
"""Numbers of earlier passes over a prompt, with two rollouts each."""

CRITIC_EPOCHS = 2
CRITIC = f"critic, epoch {CRITIC_EPOCHS}"


def fitted(
    groups: Sequence[Label],
    inputs: tuple[ProbeInput, ...] = PAPER,
    components: tuple[int, int] = COMPONENTS,
    alpha: float = ALPHA,
    rows_per_component: int = 1,
) -> FittedProbe:
    return IncrementalFitter(inputs, *components, alpha, rows_per_component).fit(groups)


def asked(probe: FittedProbe, groups: Sequence[Label]) -> Floats:
    """Return the probe's values of groups of equal size, [P, n]."""
    return probe.predict(FeatureMatrix.concatenate([group.inputs for group in groups])).reshape(len(groups), -1)


def part(group: Label, start: int, end: int) -> Label:
    return replace(group, features=group.features.part(start, end), rewards=group.rewards[start:end])


def repeated(values_P: Floats, num_rollouts: int) -> Floats:
    return np.repeat(values_P.astype(np.float32)[:, None], num_rollouts, axis=1)


def half_means(rewards_Pn: Floats) -> Floats:
    """Return for each row the mean of its own half, [P, n]."""
    halves = np.split(rewards_Pn, 2, axis=1)
    return np.concatenate([repeated(half.mean(axis=1), half.shape[1]) for half in halves], axis=1)


def batch_means(domains: Sequence[Domain]) -> list[Floats]:
    """Return batch-mean baselines, with all held-out prompts as one step and two rollouts at a time."""
    rewards = np.concatenate([domain.held_out.rewards for domain in domains])
    means = np.empty_like(rewards)
    for start in range(0, rewards.shape[1], 2):
        means[:, start : start + 2] = np.stack(batch_mean([*rewards[:, start : start + 2]]))
    return np.split(means, np.cumsum([len(domain.held_out.groups) for domain in domains])[:-1])


def critic_values(domains: Sequence[Domain], folder: Path) -> tuple[list[list[Floats]], list[float]]:
    """Return the critic's values of each domain's held-out prompts, [P], after each epoch, and the seconds until then.

    It is trained once; its values are saved in the folder.
    """
    settings = {**critic.SETTINGS, "epochs": CRITIC_EPOCHS, "rollouts": digest(domains)}
    path = folder / "critic.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    if kept.get("settings") != settings:
        trained = critic.train(
            str(make_model(MODEL)),
            [ids for domain in domains for ids in domain.training.token_ids],
            np.concatenate([domain.training.rewards.mean(axis=1) for domain in domains]),
            [ids for domain in domains for ids in domain.held_out.token_ids],
            CRITIC_EPOCHS,
        )
        values = [values.tolist() for values in trained.values]
        kept = {"settings": settings, "seconds": trained.seconds, "values": values}
        write_file(path, json.dumps(kept).encode())
    ends = np.cumsum([len(domain.held_out.groups) for domain in domains])[:-1]
    return [np.split(np.array(values, np.float32), ends) for values in kept["values"]], kept["seconds"]


def on_new_prompts(domains: Sequence[Domain], folder: Path) -> tuple[dict[str, list[Floats]], dict[str, float]]:
    """Return every estimator's values, [P, n] a domain, and the training seconds of probe and critic."""
    rewards = [domain.held_out.rewards for domain in domains]
    means = [float(domain.training.rewards.mean()) for domain in domains]
    values = {
        "no baseline": [np.zeros_like(r) for r in rewards],
        RLOO: rewards,
        "tracker, prior alone": [np.full_like(r, BetaTracker.prior(0.5, 2).value) for r in rewards],
        "batch mean": batch_means(domains),
        CONSTANT: [np.full_like(r, mean) for r, mean in zip(rewards, means, strict=True)],
    }
    probe_s = 0.0
    for name, inputs in INPUTS.items():
        started_s = time.perf_counter()
        probes = [fitted(domain.training.groups, inputs) for domain in domains]
        if name == REFERENCE:
            probe_s = time.perf_counter() - started_s
        values[name] = [asked(p, domain.held_out.groups) for p, domain in zip(probes, domains, strict=True)]
    for name, frugal in FRUGAL.items():
        probes = [fitted(d.training.groups, INPUTS[name], rows_per_component=ROWS_PER_COMPONENT) for d in domains]
        values[frugal] = [asked(p, domain.held_out.groups) for p, domain in zip(probes, domains, strict=True)]
    by_epoch, critic_s = critic_values(domains, folder)
    for epoch, by_domain in enumerate(by_epoch, 1):
        values[f"critic, epoch {epoch}"] = [repeated(v, r.shape[1]) for v, r in zip(by_domain, rewards, strict=True)]
    values["mean of 8 other rollouts"] = [half_means(r) for r in rewards]
    return values, {"probe": probe_s, "critic": critic_s[-1]}


def on_prompts_again(domains: Sequence[Domain]) -> dict[int, dict[str, list[Doubles]]]:
    """Return sums, [P, S] a domain, by number of passes and estimator; each half is the past once."""
    sums: dict[int, dict[str, list[Doubles]]] = {passes: {} for passes in PASSES}
    for domain in domains:
        prior = BetaTracker.prior(*beta_moments(domain.training.rewards))
        half = domain.held_out.rewards.shape[1] // 2
        for passes in PASSES:
            folds = [
                _again(domain, prior, range(start, start + 2 * passes, 2), range(half - start, 2 * half - start))
                for start in (0, half)
            ]
            for name in folds[0]:
                sums[passes].setdefault(name, []).append(sum(fold[name] for fold in folds))
    return sums


def _again(domain: Domain, prior: BetaTracker, past: range, new: range) -> dict[str, Doubles]:
    """Return the sums on the rollouts `new` of the held-out prompts, after the pairs that start at `past`."""
    visits = [[part(group, start, start + 2) for start in past] for group in domain.held_out.groups]
    groups = [part(group, new.start, new.stop) for group in domain.held_out.groups]
    rewards = np.stack([group.rewards for group in groups])
    probe = fitted([*domain.training.groups, *(visit for of_prompt in visits for visit in of_prompt)])
    values = {SEEN: asked(probe, groups), RLOO: rewards}
    for discount in DISCOUNTS:
        tracked = np.array([_tracked(prior, of_prompt, discount) for of_prompt in visits])
        values[f"tracker, discount {discount:g}"] = repeated(tracked, len(new))
    return {name: row_sums(each, rewards, others(len(new))) for name, each in values.items()}


def _tracked(prior: BetaTracker, visits: Sequence[Label], discount: float) -> float:
    tracker = prior
    for visit in visits:
        tracker = tracker.after(visit.rewards, discount)
    return tracker.value
