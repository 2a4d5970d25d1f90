"""The metrics of a step: its line of metrics.jsonl.

Shapes: n rollouts of one prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from poise.algorithms.baselines import batch_mean, mean_of_others
from poise.algorithms.prediction_quality import bias, brier_skill, mean_squared_error, pearson
from poise.algorithms.score_weighted import squared_score_norms
from poise.orchestrator.sampling.scored_groups import ScoredGroup, StepBaselines, rewards_of
from poise.runtime.files.atomic import without_nan
from poise_client.types import Floats, StepResult

_ROUNDING = 1e-6
"""Advantages up to this size count as zero."""


def sampling_metrics(
    sampled: Sequence[ScoredGroup], kept: Sequence[ScoredGroup], baselines: StepBaselines, policy_version: int
) -> dict[str, Any]:
    """Return the metrics of a step's rollouts. They were requested at `policy_version`.

    Rewards, tokens and staleness cover all `sampled` groups; baselines and advantages cover the `kept` groups.
    """
    rollouts = [rollout for item in sampled for rollout in item.group.rollouts]
    lengths = [rollout.token_ids.size for rollout in rollouts]
    ages = [policy_version - min(span.policy_version for span in rollout.version_spans) for rollout in rollouts]
    pairs = predictions(kept, baselines)
    metrics: dict[str, Any] = {
        "reward": {"mean": float(np.concatenate(rewards_of(sampled)).mean()), "by_domain": _mean_by_domain(sampled)},
        "baseline": {
            "source": baselines.source,
            "probe_share": _estimated_share(kept, baselines),
            "estimator": dict(baselines.estimators),
            "probe_version": dict(baselines.probe_versions),
            "probe_up_to_date": baselines.up_to_date,
            **_quality(pairs["predicted"], pairs["realised"]),
            "by_domain": {domain: _quality(*_of_domain(pairs, domain)) for domain in sorted(set(pairs["domain"]))},
        },
        **_advantage_variances(kept, baselines),
        "zero_advantage_share": _zero_advantage_share(kept, baselines),
        "response_tokens": {"mean": float(np.mean(lengths)), "max": max(lengths), "total": sum(lengths)},
        "staleness": {"mean": float(np.mean(ages)), "max": max(ages)},
        "num_groups": len(sampled),
        "num_kept_groups": len(kept),
        "num_rollouts": len(rollouts),
    }
    return metrics


def learner_metrics(result: StepResult) -> dict[str, Any]:
    """Return the metrics of a step's training."""
    learner = {name: getattr(result.metrics, name) for name in type(result.metrics).__dataclass_fields__}
    learner["staleness"] = {str(age): count for age, count in result.metrics.staleness.items()}
    metrics = {
        "policy_version": result.policy_version,
        "num_rejected": dict(Counter(reason for _, reason in result.rejected)),
        "learner": without_nan(learner),
    }
    if ages := result.metrics.staleness:  # at training time: the policy may have advanced since sampling
        mean = sum(age * count for age, count in ages.items()) / sum(ages.values())
        metrics["staleness"] = {"mean": mean, "max": max(ages)}
    return metrics


def predictions(kept: Sequence[ScoredGroup], baselines: StepBaselines) -> dict[str, list[Any]]:
    """Return the value, the reward to compare it with, and the domain of every rollout with a value.

    A value of the probe may depend on the rollout's own reward, and is compared with the mean reward of the siblings.
    Values of score-weighted estimators do not, and are compared with the own reward.
    """
    pairs: dict[str, list[Any]] = {"predicted": [], "realised": [], "domain": []}
    for index, item in enumerate(kept):
        values_n = baselines.value(index)
        if values_n is None:
            continue
        if baselines.estimators.get(item.domain, "").startswith("score_"):
            realised_n = item.rewards
        elif item.rewards.size > 1:
            realised_n = mean_of_others(item.rewards)
        else:
            continue
        pairs["predicted"] += values_n.tolist()
        pairs["realised"] += realised_n.tolist()
        pairs["domain"] += [item.domain] * len(values_n)
    return pairs


def _of_domain(pairs: dict[str, list[Any]], domain: str) -> tuple[list[float], list[float]]:
    inside = [index for index, name in enumerate(pairs["domain"]) if name == domain]
    return [pairs["predicted"][index] for index in inside], [pairs["realised"][index] for index in inside]


def _quality(predicted: Sequence[float], realised: Sequence[float]) -> dict[str, float | None]:
    quality: dict[str, float | None] = without_nan(
        {
            "pearson": pearson(predicted, realised),
            "brier": mean_squared_error(predicted, realised),
            "brier_skill": brier_skill(predicted, realised),
            "bias": bias(predicted, realised),
        }
    )
    return quality


def _advantage_variances(kept: Sequence[ScoredGroup], baselines: StepBaselines) -> dict[str, Any]:
    """Return `advantage_variance`, the mean of (r − b)², and `weighted_advantage_variance`, Σ ω(r − b)² / Σ ω.

    Both are given for the baselines used and for other baselines on the same rewards; for all groups, and for each
    domain with values. `batch_mean` always averages over all prompts of the step. ω is the squared score norm of a
    token; without token statistics the weighted variances are None.
    """
    rewards = rewards_of(kept)
    have_siblings = all(r.size > 1 for r in rewards)
    compared: dict[str, Sequence[Floats] | None] = {
        "used": None if baselines.uses_critic else baselines.baselines,
        "none": [np.zeros_like(r) for r in rewards],
        "rloo": [mean_of_others(r) for r in rewards] if have_siblings else None,
        "batch_mean": batch_mean(rewards) if have_siblings or len(rewards) > 1 else None,
    }
    squares = {
        name: [(r - b) ** 2 for r, b in zip(rewards, each, strict=True)]
        for name, each in compared.items()
        if each is not None
    }
    norms = [_score_norms(item) for item in kept]
    are_weighted = all(norms_n is not None for norms_n in norms)
    weights = [np.array([norms_t.sum(dtype=np.float64) for norms_t in norms_n or ()]) for norms_n in norms]
    weighted = {
        name: [w * s for w, s in zip(weights, each, strict=True)] for name, each in squares.items() if are_weighted
    }
    for index, item in enumerate(kept if are_weighted else ()):
        if (tokens := baselines.tokens(index)) is not None:
            triples = zip(norms[index] or (), item.rewards, tokens, strict=True)
            weighted["used"][index] = np.array(
                [float(norms_t @ (reward - b_t) ** 2) for norms_t, reward, b_t in triples]
            )

    def plain(indices: Sequence[int]) -> dict[str, float | None]:
        return {name: _mean([squares[name][i] for i in indices]) if name in squares else None for name in compared}

    def by_weight(indices: Sequence[int]) -> dict[str, float | None]:
        total = sum(float(weights[i].sum()) for i in indices)
        return {
            name: sum(float(weighted[name][i].sum()) for i in indices) / total if name in weighted and total else None
            for name in compared
        }

    everything = range(len(kept))
    domains = sorted({item.domain for index, item in enumerate(kept) if baselines.value(index) is not None})
    inside = {domain: [i for i in everything if kept[i].domain == domain] for domain in domains}
    return {
        name: of(everything) | {"by_domain": {domain: of(indices) for domain, indices in inside.items()}}
        for name, of in (("advantage_variance", plain), ("weighted_advantage_variance", by_weight))
    }


def _score_norms(item: ScoredGroup) -> list[Floats] | None:
    """Return ω of each rollout's tokens, [T] each; None without token statistics."""
    rollouts = item.group.rollouts
    if any(each.sum_squared_probs.size != each.token_ids.size for each in rollouts):
        return None
    return [squared_score_norms(each.logprobs, each.sum_squared_probs) for each in rollouts]


def _estimated_share(kept: Sequence[ScoredGroup], baselines: StepBaselines) -> float:
    """Return the share of rollouts in groups with values."""
    num_estimated = sum(item.rewards.size for i, item in enumerate(kept) if baselines.value(i) is not None)
    return num_estimated / sum(item.rewards.size for item in kept)


def _zero_advantage_share(kept: Sequence[ScoredGroup], baselines: StepBaselines) -> float | None:
    """Return the share of groups whose advantages are all zero; None if a critic computes advantages."""
    if baselines.uses_critic:
        return None
    nonzero = [
        np.abs(
            np.concatenate(baselines.token_advantages(i, item.rewards) or [baselines.advantages(i, item.rewards)])
        ).max()
        > _ROUNDING
        for i, item in enumerate(kept)
    ]
    return 1 - float(np.mean(nonzero))


def _mean(arrays: Sequence[Floats]) -> float:
    return float(np.mean(np.concatenate(arrays), dtype=np.float64))


def _mean_by_domain(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    by_domain: dict[str, list[Floats]] = {}
    for item in groups:
        by_domain.setdefault(item.domain, []).append(item.rewards)
    return {domain: float(np.concatenate(rewards).mean()) for domain, rewards in sorted(by_domain.items())}
