from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from poise.report.html import write_report
from poise.report.scores import score_table
from poise.report.summary import summarise

Evaluation = Callable[..., dict[str, Any]]

_VOID = {"meta", "br", "hr", "img", "link"}


class _Page(HTMLParser):
    """Checks that tags are balanced, and keeps text by the tag it is in."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.texts.setdefault(self.open[-1], []).append(" ".join(data.split()))


def read(run_dir: Path) -> tuple[str, _Page]:
    text = write_report(run_dir).read_text(encoding="utf-8")
    return text, _Page(text)


def test_a_full_run_is_reported_on_one_page(make_run: Callable[..., Path], new_evaluation: Evaluation) -> None:
    before, after = new_evaluation("before", 0, [[0.0], [0.5]] * 20), new_evaluation("after", 30, [[1.0], [0.9]] * 20)
    text, page = read(make_run(30, evaluations=[before, after]))
    assert page.tags.count("svg") == 5
    assert page.texts["b"] == ["0.250", "0.950"]
    assert page.texts["strong"] == ["+0.700"]
    assert "Held-out reward rose; the 95 % intervals do not overlap." in text
    assert page.texts["h1"] == ["my-run"]
    assert "poise · 30 steps in 1 min" in text


def test_scores_before_and_after_are_shown_by_task_and_domain(
    make_run: Callable[..., Path], new_evaluation: Evaluation
) -> None:
    hostile = "<b>&"
    evaluations = []
    for when, step, rewards in (("before", 0, [[0.0, 0.0], [1.0, 0.0]]), ("after", 6, [[1.0, 0.0], [1.0, 1.0]])):
        table = score_table(rewards, ["d", "d"], ["one", hostile], 1.0)
        evaluations.append(new_evaluation(when, step, rewards) | {"scores": table})
    text, page = read(make_run(evaluations=evaluations))
    assert [name for name in page.texts["th"] if "@" in name] == ["avg@2", "pass@1", "pass@2"]
    rows = dict(re.findall(r"<tr><td>((?:task|overall|domain)[^<]*)</td>(.*?)</tr>", text))
    assert list(rows) == ["overall", "task &lt;b&gt;&amp;", "task one", "domain d"]
    shown = {group: re.findall(r'<td class="n">([^<]+)<br>', cells) for group, cells in rows.items()}
    assert shown["overall"] == shown["domain d"] == ["0.250 → 0.750", "0.250 → 0.750", "0.500 → 1.000"]
    assert shown["task one"] == ["0.000 → 0.500", "0.000 → 0.500", "0.000 → 1.000"]
    assert "Before</th>" not in text  # the table of domains, for runs without scores


def test_quality_is_reported_for_every_domain(make_run: Callable[..., Path]) -> None:
    page = write_report(make_run(6)).read_text(encoding="utf-8")
    rows = re.findall(r"<tr><td>(math|code &lt;x&gt;)</td>(.*?)</tr>", page[page.index("Brier skill") :])
    assert [(domain, re.findall(r">([^<]*)</td>", cells)) for domain, cells in rows] == [
        ("code &lt;x&gt;", ["probe", "4", "–", "0.085", "–", "−0.250", "0.00", "–", "–", "–", "0.60→1.00, 0.90→1.00"]),
        ("math", ["probe", "4", "–", "0.085", "–", "+0.250", "0.00", "–", "–", "–", "0.10→0.00, 0.40→0.00"]),
    ]


PROBE: dict[str, Any] = {
    **{"domain": "algebra", "probe_version": 7, "num_rows": 2048, "num_groups": 1024, "num_steps_seen": 16},
    **{"last_fit_s": 0.125, "label_lag_s": None, "quality": {"pearson": 0.625, "brier": None}},
}


def test_probes_at_the_end_are_shown(make_run: Callable[..., Path]) -> None:
    run_dir = make_run(4)
    assert "Estimators at the end of the run" not in read(run_dir)[0]
    (run_dir / "probes.json").write_text(json.dumps([PROBE]))
    _, page = read(run_dir)
    assert "Estimators at the end of the run" in page.texts["h2"]
    row = page.texts["td"][page.texts["td"].index("algebra") :][:10]
    assert row[:6] == ["algebra", "probe", "7", "2 048", "1 024", "16"]
    assert row[6:] == ["0.125", "–", "0.62", "–"]
    (run_dir / "probes.json").write_text("[{")
    assert "Estimators at the end of the run" not in read(run_dir)[0]


def test_score_weighted_runs_are_explained(make_run: Callable[..., Path]) -> None:
    run_dir = make_run(4)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    weighted = {"used": 0.01, "none": 0.08, "rloo": None, "batch_mean": 0.04}
    for row in rows:
        row["weighted_advantage_variance"] = weighted | {"by_domain": {"math": weighted}}
        row["baseline"]["estimator"] = {"math": "score_prefix"}
        row["biases"] = ["token_mean"]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    errors = [
        {"estimator": "score_mean", "weighted_error": 0.25},
        {"estimator": "score_prefix", "weighted_error": 0.125},
    ]
    probe = PROBE | {"domain": "math", "configured": "auto", "estimator": "score_prefix", "errors": errors}
    (run_dir / "probes.json").write_text(json.dumps([probe]))
    page = write_report(run_dir).read_text(encoding="utf-8")
    (math,) = re.findall(r"<tr><td>math</td><td>score_prefix</td>(.*?)</tr>", page[page.index("Brier skill") :])
    assert re.findall(r">([^<]*)</td>", math)[6:9] == ["0.12", "–", "0.25"]
    assert re.findall(r"<tr><td>weighted</td><td>all steps \(4\)</td>(.*?)</tr>", page)
    assert "score_mean 0.250, score_prefix 0.125. auto chose score_prefix." in page
    assert "The gradient is biased: the loss is divided by the number of sampled tokens" in page
    summary = summarise(run_dir)
    assert summary["weighted_advantage_variance"]["all_steps"]["used_relative_to"]["none"] == pytest.approx(0.125)


def test_the_page_is_self_contained(make_run: Callable[..., Path], new_evaluation: Evaluation) -> None:
    text, page = read(make_run(evaluations=[new_evaluation("before", 0, [[0.0]])]))
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert all(value and value.startswith("#") for name, value in page.attributes if name in ("href", "xlink:href"))
    assert "//" not in text
    assert "@import" not in text
    assert all(reference.startswith("#") for reference in re.findall(r"url\(([^)]*)\)", text))


def test_figures_are_well_formed(make_run: Callable[..., Path]) -> None:
    text, _ = read(make_run())
    identifiers: list[str] = []
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        root = ElementTree.fromstring(svg.replace("<svg", '<svg xmlns:xlink="x"', 1))
        own = [element.get("id") for element in root.iter() if element.get("id")]
        references = re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', svg)
        assert {one or other for one, other in references} <= set(own)
        identifiers += [name for name in own if name]
    assert len(identifiers) == len(set(identifiers))


def test_every_colour_follows_the_theme(make_run: Callable[..., Path], new_evaluation: Evaluation) -> None:
    text, _ = read(make_run(30, evaluations=[new_evaluation("before", 0, [[0.0]])]))
    drawings = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert re.findall(r"#[0-9a-f]{6}\b", re.sub(r'(id|href)="[^"]*"|url\([^)]*\)', "", drawings)) == []
    variables = set(re.findall(r"var\((--[a-z0-9-]+)\)", drawings))
    for theme in re.findall(r":root \{.*?\n *\}", text, re.DOTALL):
        assert variables <= set(re.findall(r"(--[a-z0-9-]+):", theme))


def test_equal_runs_give_equal_bytes(make_run: Callable[..., Path]) -> None:
    run_dir = make_run(30)
    assert write_report(run_dir).read_bytes() == write_report(run_dir).read_bytes()


@pytest.mark.parametrize("num_steps", [0, 1, 2])
def test_short_run_without_evaluations_is_reported(make_run: Callable[..., Path], num_steps: int) -> None:
    text, page = read(make_run(num_steps, probe=False))
    assert "Held-out reward was not evaluated." in text
    assert ("No step has finished yet." in text) == (num_steps == 0)
    assert ("No baseline of this run came from the value service." in text) == (num_steps > 0)
    assert page.tags.count("svg") == (0 if num_steps == 0 else 4)
    assert "nan" not in str(page.texts).lower()


def test_a_step_without_metrics_is_reported(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    text, _ = read(tmp_path)
    assert "1 step in –" in text


@pytest.mark.parametrize(
    ("evaluations", "words"),
    [
        ([("before", 0)], "evaluated only before training"),
        ([("after", 6)], "its change is unknown"),
        ([("before", 0), ("step", 4)], "reward at step 4 did not change significantly."),
        ([("before", 0), ("after", 6)], "reward did not change significantly."),
    ],
)
def test_the_verdict_matches_the_evaluations(
    make_run: Callable[..., Path], new_evaluation: Evaluation, evaluations: list[tuple[str, int]], words: str
) -> None:
    text, _ = read(make_run(evaluations=[new_evaluation(*one, [[0.0], [1.0]]) for one in evaluations]))
    assert words in text


def test_texts_of_the_run_are_escaped(make_run: Callable[..., Path]) -> None:
    run_dir = make_run()
    hostile = "</pre><script>alert('x')</script>"
    prompt = [{"role": "user", "content": hostile}]
    row = {"step": 1, "domain": hostile, "prompt": prompt, "response": hostile, "answer": hostile}
    (run_dir / "rollouts.jsonl").write_text(json.dumps(row | {"reward": 1.0, "value": None, "advantage": -0.5}))
    (run_dir / "config.yaml").write_text(json.dumps({"run_id": hostile, "model": hostile}))
    text, page = read(run_dir)
    assert "script" not in page.tags
    assert page.texts["pre"] == [f"user: {hostile}", hostile]
    assert page.texts["h1"] == [hostile]
    assert f"Answer: {hostile}" in page.texts["p"]
    assert "advantage −0.50" in text


def test_a_lone_surrogate_is_replaced(make_run: Callable[..., Path]) -> None:
    run_dir = make_run()
    (run_dir / "rollouts.jsonl").write_text('{"step": 0, "prompt": "why", "response": "half \\ud83d"}')
    _, page = read(run_dir)
    assert page.texts["pre"] == ["why", "half ?"]


def test_long_texts_are_shortened_with_a_note(make_run: Callable[..., Path]) -> None:
    run_dir = make_run()
    (run_dir / "rollouts.jsonl").write_text(json.dumps({"step": 0, "prompt": "why", "response": "a" * 2500}))
    text, _ = read(run_dir)
    assert "a" * 2000 + "… (500 more characters)" in text
    assert "a" * 2001 not in text


def test_rollouts_are_from_the_beginning_and_the_end(make_run: Callable[..., Path]) -> None:
    run_dir = make_run()
    rows = [json.dumps({"step": step, "prompt": f"prompt-{step}", "response": ""}) for step in range(50)]
    (run_dir / "rollouts.jsonl").write_text("\n".join(rows))
    _, page = read(run_dir)
    assert page.texts["pre"] == [f"prompt-{step}" for step in (*range(6), *range(44, 50))]


def test_shown_settings_contain_no_secrets(make_run: Callable[..., Path]) -> None:
    run_dir = make_run()
    (run_dir / "config.yaml").write_text(
        "run: {name: sums}\n"
        "model: hub://me:hunter1@host/m\n"
        "learner: {replica_token: hunter2, optimizer: {learning_rate: 1.0e-4}}\n"
        "train: {token: hunter3, algorithm: poise, tasks: [{num_prompts: 7}]}\n"
        "value: {queue: {url: 'redis://:hunter4@h'}}\n"
    )
    text, page = read(run_dir)
    assert "hunter" not in text
    assert page.texts["h1"] == ["sums"]
    settings = dict(zip(page.texts["th"][-5:], page.texts["td"][-5:], strict=True))
    assert settings == {
        "run.name": "sums",
        "model": "hub://…@host/m",
        "learner.optimizer.learning_rate": "0.0001",
        "train.algorithm": "poise",
        "train.tasks.0.num_prompts": "7",
    }


@pytest.mark.parametrize("config", [b"a: [", b"- 1\n- 2\n", b"\xff\xfe\x00", b""])
def test_invalid_settings_are_left_out(make_run: Callable[..., Path], config: bytes) -> None:
    run_dir = make_run()
    (run_dir / "config.yaml").write_bytes(config)
    text, _ = read(run_dir)
    assert "Settings" not in text


def test_skipped_lines_are_reported(make_run: Callable[..., Path]) -> None:
    run_dir = make_run()
    (run_dir / "rollouts.jsonl").write_text("{")
    text, _ = read(run_dir)
    assert "1 line of the run's files is invalid and was skipped." in text


def test_imports_of_matplotlib_are_late(make_run: Callable[..., Path]) -> None:
    script = (
        "import sys, pathlib; from poise.report import html; assert 'matplotlib' not in sys.modules; "
        "assert 'tensorboard' not in sys.modules; assert 'jinja2' not in sys.modules; "
        "html.write_report(pathlib.Path(sys.argv[1])); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script, str(make_run())], check=True)
