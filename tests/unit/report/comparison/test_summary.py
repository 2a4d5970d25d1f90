"""Summaries of several run folders, against numbers calculated by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from poise.report.comparison import ComparedRun, Comparison
from poise.report.comparison.summary import summarise_comparison

Make = Callable[..., ComparedRun]
Compare = Callable[..., Comparison]


def test_tokens_to_reach_a_level_are_interpolated(make_run: Make, compare: Compare) -> None:
    tree = summarise_comparison(
        compare(
            make_run("rloo", 0, [0.0, 0.2, 0.4]),
            make_run("rloo", 1, [0.0, 0.4, 0.8]),  # mean 0, 0.3, 0.6
            make_run("poise", 0, [0.0, 0.6, 0.8]),
            make_run("poise", 1, [0.0, 0.6, 0.6]),  # mean 0, 0.6, 0.7
            levels=[0.3, 0.5, 0.65],
        )
    )
    reaches = {name: run["to_reach"]["tokens"] for name, run in tree["runs"].items()}
    assert [one["on_mean_curve"] for one in reaches["rloo"]] == pytest.approx([100, 100 + 200 / 3, None])
    assert [one["on_mean_curve"] for one in reaches["poise"]] == pytest.approx([50, 250 / 3, 150])
    assert [one["ratio"] for one in reaches["poise"]] == pytest.approx([0.5, 0.5, None])
    assert [one["ratio"] for one in reaches["rloo"]] == pytest.approx([1, 1, None])
    assert reaches["rloo"][1]["by_seed"] == {"0": None, "1": pytest.approx(125)}
    assert reaches["poise"][0]["by_seed"] == {"0": pytest.approx(50), "1": pytest.approx(50)}
    assert reaches["poise"][0]["ratio_by_seed"] == {"0": pytest.approx(50 / 150), "1": pytest.approx(50 / 75)}
    # A step takes two seconds.
    assert tree["runs"]["poise"]["to_reach"]["seconds"][0]["on_mean_curve"] == pytest.approx(1.0)
    assert (tree["levels"], tree["levels_from"], tree["is_complete"]) == ([0.3, 0.5, 0.65], "settings", True)


def test_default_levels_come_from_the_mean_curves(make_run: Make, compare: Compare) -> None:
    tree = summarise_comparison(compare(make_run("rloo", 0, [0.0, 0.2, 0.5]), make_run("poise", 0, [0.0, 0.6, 0.8])))
    assert tree["levels"] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5], abs=0.001)
    assert tree["levels_from"] == "curves"


def test_seed_without_a_reference_run_has_no_ratio(make_run: Make, compare: Compare) -> None:
    runs = [make_run("rloo", 0, [0.0, 0.2, 0.4]), *(make_run("poise", seed, [0.0, 0.6, 0.8]) for seed in (0, 1))]
    tree = summarise_comparison(compare(*runs, levels=[0.3]))
    assert tree["runs"]["poise"]["to_reach"]["tokens"][0]["ratio_by_seed"] == {"0": pytest.approx(50 / 150)}


def test_pass_at_k_and_entropy_are_those_at_the_end(make_run: Make, compare: Compare) -> None:
    runs = [make_run("rloo", seed, [0.0, 0.5, 0.5]) for seed in (0, 1)]
    for run, score in zip(runs, (0.5, 0.7), strict=True):
        path = run.folder / "evaluations.jsonl"
        *earlier, last = map(json.loads, path.read_text().splitlines())
        entry = {"mean": score, "low": 0.0, "high": 1.0}
        last["scores"] = {
            "overall": {"num_prompts": 2, "pass@1": entry, "pass@8": entry},
            "by_domain": {},
            "by_task": {},
        }
        path.write_text("".join(json.dumps(line) + "\n" for line in (*earlier, last)))
        rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
        rows = [row | {"learner": {"entropy": score + 1 - index}} for index, row in enumerate(rows)]
        (run.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = summarise_comparison(compare(*runs))["runs"]["rloo"]
    assert list(tree["final_pass_at_k"]) == ["pass@1", "pass@8"]
    assert tree["final_pass_at_k"]["pass@8"]["mean"] == pytest.approx(0.6)
    assert tree["final_token_entropy"]["mean"] == pytest.approx(0.6)


def test_the_final_reward_has_its_spread_over_seeds(make_run: Make, compare: Compare) -> None:
    tree = summarise_comparison(
        compare(
            make_run("rloo", 0, [0.0, 0.9, 0.3]),
            make_run("rloo", 1, [0.0, 0.9, 0.4]),
            make_run("rloo", 2, [0.0, 0.9, 0.5]),
        )
    )
    final = tree["runs"]["rloo"]["final"]
    assert (final["mean"], final["low"], final["high"]) == pytest.approx((0.4, 0.15159, 0.64841), abs=1e-5)
    assert "3 seeds" in final["interval"]


def test_a_single_seed_has_its_interval_over_prompts(make_run: Make, compare: Compare) -> None:
    run = make_run("rloo", 0, [0.0, 0.5])
    line = {"when": "after", "step": 2, "tokens": 200, "wall_s": 4.0, "rewards": [[0.0], [1.0]] * 50}
    with (run.folder / "evaluations.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    final = summarise_comparison(compare(run))["runs"]["rloo"]["final"]
    assert final["mean"] == 0.5
    assert 0.35 < final["low"] < 0.45 < 0.55 < final["high"] < 0.65  # ± 1.96·0.05
    assert "prompts" in final["interval"]


def test_gradient_variance_is_scaled_by_tokens(make_run: Make, compare: Compare) -> None:
    tree = summarise_comparison(
        compare(
            make_run("rloo", 0, [0, 0.1, 0.2], tokens=100, variance=0.6, used=0.2),
            make_run("grpo", 0, [0, 0.1, 0.2], tokens=400, variance=0.3, used=0.3),
        )
    )
    grpo = tree["runs"]["grpo"]
    assert (grpo["gradient_variance"]["mean"], grpo["gradient_variance"]["ratio"]) == pytest.approx((0.3, 0.5))
    # 0.3·400 against 0.6·100: for its tokens it has twice the variance.
    at_equal = grpo["gradient_variance_at_equal_tokens"]
    assert (at_equal["mean"], at_equal["ratio"]) == pytest.approx((120, 2.0))
    assert grpo["mean_squared_advantage"]["ratio"] == pytest.approx(1.5)
    assert grpo["weighted_squared_advantage"]["mean"] == pytest.approx(0.3)
    assert grpo["weighted_squared_advantage"]["ratio"] == pytest.approx(1.5)


def test_missing_sections_are_left_out(make_run: Make, compare: Compare) -> None:
    tree = summarise_comparison(
        compare(make_run("rloo", 0, [0, 0.1, 0.2]), make_run("poise", 0, [0, 0.1, 0.2], zero_share=0.25))
    )
    rloo, poise = tree["runs"]["rloo"], tree["runs"]["poise"]
    assert rloo["gradient_variance"] is rloo["gradient_variance_at_equal_tokens"] is None  # 0 throughout
    assert rloo["zero_advantage_share"] is None
    assert poise["zero_advantage_share"]["mean"] == 0.25
    json.dumps(tree, allow_nan=False)


def test_time_is_reported_by_phase(make_run: Make, compare: Compare) -> None:
    run = summarise_comparison(compare(make_run("rloo", 0, [0, 0.1, 0.2])))["runs"]["rloo"]
    assert {name: one["mean"] for name, one in run["time_s"].items() if one["mean"]} == {
        "generate": 3.0,
        "train": 1.0,
        "total": 4.0,
    }
    assert (run["num_steps"]["mean"], run["tokens"]["mean"], run["wall_s"]["mean"]) == (2, 200, 4.0)


def test_an_unfinished_comparison_is_reported(make_run: Make, compare: Compare, tmp_path: Path) -> None:
    tree = summarise_comparison(
        compare(
            ComparedRun("rloo", 0, "rloo", tmp_path / "nowhere", "not begun"),
            make_run("poise", 0, [0.1], state="failed"),
            make_run("grpo", 0, [0.1, 0.2], state="unfinished"),
        )
    )
    assert not tree["is_complete"]
    states = {name: run["seeds"]["0"]["state"] for name, run in tree["runs"].items()}
    assert states == {"rloo": "not begun", "poise": "failed", "grpo": "unfinished"}
    rloo: dict[str, Any] = tree["runs"]["rloo"]
    assert rloo["final"] is rloo["tokens"] is rloo["curves"]["tokens"] is None
    assert tree["runs"]["poise"]["final"]["mean"] == pytest.approx(0.1)
    assert all(one["ratio"] is None for one in tree["runs"]["grpo"]["to_reach"]["tokens"])
    json.dumps(tree, allow_nan=False)
