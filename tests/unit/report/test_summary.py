from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from poise.report.scores import score_table
from poise.report.summary import summarise, write_summary

Evaluation = Callable[..., dict[str, Any]]


def test_totals_and_means_of_the_steps(make_run: Callable[..., Path]) -> None:
    summary = summarise(make_run(6))
    assert (summary["num_steps"], summary["wall_s"], summary["policy_version"]) == (6, 12.0, 6)
    assert (summary["num_rollouts"], summary["num_response_tokens"], summary["tokens_per_s"]) == (48, 480, 40.0)
    assert summary["reward"] == {"first": 0.0, "last": 0.5, "num_steps_averaged": 1}
    assert summary["num_rejected"] == {"stale": 6}
    assert summary["num_verifier_errors"] == 12
    assert summary["staleness"] == {"mean": 0.5, "max": 1.0}
    assert summary["time_s"]["train"] == pytest.approx(3.0)
    assert summary["time_s"]["total"] == pytest.approx(12.0)


def test_skipped_rows_and_rejected_prompts_are_counted(make_run: Callable[..., Path]) -> None:
    run_dir = make_run(3)
    summary = summarise(run_dir)
    assert (summary["num_skipped_rows"], summary["num_rejected_prompts"]) == (0, 0)
    (run_dir / "data.json").write_text(json.dumps({"a.jsonl": {"num_bad": 3}, "b.jsonl": {"num_bad": 4}}))
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    lines = [json.dumps(row | {"num_rejected_prompts": 2}) + "\n" for row in rows]
    (run_dir / "metrics.jsonl").write_text("".join(lines))
    summary = summarise(run_dir)
    assert (summary["num_skipped_rows"], summary["num_rejected_prompts"]) == (7, 6)
    (run_dir / "data.json").write_text("[]")
    assert summarise(run_dir)["num_skipped_rows"] == 0


def test_advantage_variance_is_also_given_for_probe_steps(make_run: Callable[..., Path]) -> None:
    variance = summarise(make_run(6))["advantage_variance"]
    assert variance["all_steps"]["used"] == pytest.approx((2 * 0.4 + 4 * 0.2) / 6)
    assert (variance["probe_steps"]["num_steps"], variance["probe_steps"]["used"]) == (4, pytest.approx(0.2))
    assert variance["probe_steps"]["used_relative_to"] == {
        "none": pytest.approx(0.25),
        "rloo": pytest.approx(0.5),
        "batch_mean": pytest.approx(0.8),
    }


def test_probe_quality_covers_the_second_half(make_run: Callable[..., Path]) -> None:
    run_dir = make_run(6)
    early = '{"step": 2, "predicted": [0.0, 1.0], "realised": [1.0, 0.0], "domain": ["a", "a"]}'
    late = '{"step": 3, "predicted": [0.2, 0.7], "realised": [0.0, 1.0], "domain": ["b", "a"]}'
    (run_dir / "values.jsonl").write_text(f"{early}\n{late}\n")
    brier = (0.2**2 + 0.3**2) / 2
    ratios = {"none": 0.25, "rloo": 0.5, "batch_mean": 0.8}  # of "a", as the steps tell; of "b" they tell nothing
    alone = {"num_pairs": 1, "pearson": None, "brier_skill": None, "share_clipped": 0.0}
    assert summarise(run_dir)["probe"] == {
        "from_step": 3,
        "num_pairs": 2,
        "pearson": pytest.approx(1.0),
        "brier": pytest.approx(brier),
        "brier_skill": pytest.approx(1 - brier / 0.25),
        "bias": pytest.approx(-0.05),
        "share_clipped": 0.0,
        "brier_of_constant": 0.25,
        "by_domain": {
            "a": alone
            | {
                "brier": pytest.approx(0.09),
                "bias": pytest.approx(-0.3),
                "calibration": [{"predicted": 0.7, "realised": 1.0, "count": 1}],
                "estimator": None,
                "used_relative_to": {name: pytest.approx(ratio) for name, ratio in ratios.items()},
                "weighted_relative_to": dict.fromkeys(ratios),
            },
            "b": alone
            | {
                "brier": pytest.approx(0.04),
                "bias": pytest.approx(0.2),
                "calibration": [{"predicted": 0.2, "realised": 0.0, "count": 1}],
                "estimator": None,
                "used_relative_to": dict.fromkeys(ratios),
                "weighted_relative_to": dict.fromkeys(ratios),
            },
        },
    }


def test_run_without_a_probe_has_no_probe_quality(make_run: Callable[..., Path]) -> None:
    summary = summarise(make_run(3, probe=False))
    assert summary["probe"] is None
    assert summary["advantage_variance"]["probe_steps"]["num_steps"] == 0
    assert summary["advantage_variance"]["probe_steps"]["used"] is None


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        ([[0.0], [1.0]] * 50, [[1.0]] * 100, "rose_beyond_intervals"),
        ([[0.0], [1.0]] * 50, [[0.15], [1.15]] * 50, "rose"),
        ([[0.0], [1.0]] * 50, [[1.0], [0.0]] * 49 + [[1.0], [1.0]], "unclear"),
        ([[0.05], [1.05]] * 50, [[0.0], [1.0]] * 50, "fell"),
        ([[1.0]] * 100, [[0.0], [1.0]] * 50, "fell"),
    ],
)
def test_verdict_on_the_held_out_reward(
    make_run: Callable[..., Path], new_evaluation: Evaluation, before: Any, after: Any, verdict: str
) -> None:
    run_dir = make_run(evaluations=[new_evaluation("before", 0, before), new_evaluation("after", 6, after)])
    assert summarise(run_dir)["held_out"]["verdict"] == verdict


def test_held_out_numbers_come_from_the_evaluations(make_run: Callable[..., Path], new_evaluation: Evaluation) -> None:
    before, after = new_evaluation("before", 0, [[0.0, 1.0]] * 4), new_evaluation("after", 6, [[1.0, 1.0]] * 4)
    held_out = summarise(make_run(evaluations=[before, after]))["held_out"]
    assert held_out["before"]["mean"] == 0.5
    assert (held_out["after"]["mean"], held_out["after"]["num_prompts"], held_out["after"]["num_rollouts"]) == (1, 4, 8)
    assert held_out["after"]["by_domain"] == {"sums": 1.0, "words": 1.0}
    assert held_out["difference"] == {"mean": 0.5, "low": 0.5, "high": 0.5}


def test_different_prompts_are_not_paired(make_run: Callable[..., Path], new_evaluation: Evaluation) -> None:
    evaluations = [new_evaluation("before", 0, [[0.0]] * 3), new_evaluation("after", 6, [[1.0]] * 4)]
    held_out = summarise(make_run(evaluations=evaluations))["held_out"]
    assert held_out["difference"] is None
    assert held_out["verdict"] == "rose_beyond_intervals"


def test_summary_of_an_empty_folder_is_plain_json(tmp_path: Path) -> None:
    path = write_summary(tmp_path)
    summary = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert path == tmp_path / "summary.json"
    assert (summary["num_steps"], summary["held_out"], summary["probe"], summary["wall_s"]) == (0, None, None, None)


def test_writing_leaves_no_other_files(make_run: Callable[..., Path]) -> None:
    run_dir = make_run()
    names = {path.name for path in run_dir.iterdir()}
    write_summary(run_dir)
    write_summary(run_dir)
    assert {path.name for path in run_dir.iterdir()} == names | {"summary.json"}


def test_scores_are_summarised_if_present(make_run: Callable[..., Path], new_evaluation: Evaluation) -> None:
    table = score_table([[0.0, 1.0]] * 2, ["a", "b"], ["t", "t"], 1.0)
    before, after = new_evaluation("before", 0, [[0.0]] * 2), new_evaluation("after", 6, [[0.0, 1.0]] * 2)
    held_out = summarise(make_run(evaluations=[before, after | {"scores": table}]))["held_out"]
    assert held_out["before"]["scores"] is None
    assert held_out["after"]["scores"] == table
