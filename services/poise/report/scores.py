"""Scores of an evaluation: avg@n and pass@k with intervals, overall, by domain and by task.

Shapes: P prompts, n rollouts of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from poise.algorithms.pass_at_k import pass_at_k, reported_ks
from poise.report.statistics import mean_interval

Floats = NDArray[np.float32]


def score_table(
    rewards_Pn: ArrayLike, domains: Sequence[str], tasks: Sequence[str], pass_threshold: float
) -> dict[str, Any]:
    """Return `{"overall": s, "by_domain": {name: s}, "by_task": {name: s}}`. `domains` and `tasks` are by prompt.

    s is `{"num_prompts", "avg@n", "pass@1", "pass@2", "pass@4", …}`. Each score is `{"mean", "low", "high"}`, with the
    bounds of a 95 % bootstrap interval over prompts. avg@n is the mean reward. A rollout passes if its reward is at
    least `pass_threshold`.
    """
    rewards = np.asarray(rewards_Pn, np.float32)
    return {
        "overall": _scores(rewards, pass_threshold),
        "by_domain": _grouped(rewards, domains, pass_threshold),
        "by_task": _grouped(rewards, tasks, pass_threshold),
    }


def score_names(scores: Mapping[str, Any]) -> list[str]:
    """Return the names of the scores in one entry of the table: "avg@4", "pass@1", …"""
    return [name for name in scores if "@" in name]


def score_rows(table: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return a table's entries with display names: "overall", "task …", "domain …"."""
    return [
        ("overall", table["overall"]),
        *((f"task {name}", scores) for name, scores in table["by_task"].items()),
        *((f"domain {name}", scores) for name, scores in table["by_domain"].items()),
    ]


def read_table(found: object) -> dict[str, Any] | None:
    """Return a table read from a file; None if it is invalid, or missing as in older releases."""
    if not isinstance(found, dict) or not _is_entry(found.get("overall")):
        return None
    groups = {kind: found.get(kind) for kind in ("by_domain", "by_task")}
    if not all(isinstance(group, dict) and all(map(_is_entry, group.values())) for group in groups.values()):
        return None
    return {"overall": found["overall"], **groups}


def _is_entry(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("num_prompts"), int)
        and all(
            isinstance(entry[name], dict)
            and all(isinstance(entry[name].get(bound), (int, float)) for bound in ("mean", "low", "high"))
            for name in score_names(entry)
        )
    )


def _grouped(rewards_Pn: Floats, names: Sequence[str], pass_threshold: float) -> dict[str, Any]:
    names_P = np.array(names)
    return {name: _scores(rewards_Pn[names_P == name], pass_threshold) for name in sorted(set(names))}


def _scores(rewards_Pn: Floats, pass_threshold: float) -> dict[str, Any]:
    num_prompts, num_rollouts = rewards_Pn.shape
    passed = rewards_Pn >= np.float32(pass_threshold)  # as float32, like the rewards: 0.9 becomes 0.89999998
    by_prompt = {f"avg@{num_rollouts}": rewards_Pn.mean(axis=1, dtype=np.float64)}
    by_prompt |= {f"pass@{k}": pass_at_k(passed, k) for k in reported_ks(num_rollouts)}
    return {"num_prompts": num_prompts} | {
        name: asdict(mean_interval(scores_P)) for name, scores_P in by_prompt.items()
    }
