"""report.html of a run: one self-contained file without scripts. All text from the run's files is escaped."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from poise.algorithms.baselines import BIASES
from poise.report import figures
from poise.report.curves import Row, RunRecord, load_run, number
from poise.report.page import render_page
from poise.report.scores import score_names, score_rows
from poise.report.summary import summarise_record
from poise.runtime.files.atomic import write_file

_SHOWN_SETTINGS = (
    "model",
    "engine",
    "dtype",
    "algorithm",
    "estimator",
    "bootstrap",
    "seed",
    "num_steps",
    "prompts_per_step",
    "rollouts_per_prompt",
    "name",
    "domain",
    "weight",
    "temperature",
    "top_p",
    "pass_threshold",
    "max_tokens",
    "num_prompts",
    "every_steps",
    "learning_rate",
    "weight_decay",
    "warmup_updates",
    "mini_batch_prompts",
    "max_staleness",
    "warmup_steps",
    "alpha",
    "inputs",
)
"""Names of the settings to show in the report. An allowlist keeps secrets out."""

_MAX_ROLLOUTS = 12
_MAX_TEXT = 2000
"""Maximum number of characters to show of a prompt or response."""


def write_report(run_dir: Path) -> Path:
    """Write report.html into the run folder, atomically, and return its path.

    Any folder is accepted. Sections without data are omitted, or state that they have none.
    """
    path = run_dir / "report.html"
    write_file(path, render_report(run_dir).encode(errors="replace"))  # JSON may contain lone surrogates
    return path


def render_report(run_dir: Path) -> str:
    """Return report.html as text."""
    from markupsafe import Markup

    record = load_run(run_dir)
    drawings = {
        "reward": figures.reward_figure(record),
        "calibration": figures.calibration_figure(record.values),
        "variance": figures.variance_figure(record.metrics),
        "time": figures.time_figure(record.metrics),
        "health": figures.health_figure(record.metrics),
    }
    summary = summarise_record(record)
    return render_page(
        files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8"),
        name=_run_name(run_dir),
        summary=summary,
        verdict=_verdict(summary["held_out"]),
        figures={name: Markup(svg) if svg else None for name, svg in drawings.items()},  # noqa: S704  (our own SVG)
        settings=_settings(run_dir / "config.yaml"),
        rollouts=_rollouts(record),
        domains=_domains(summary["held_out"]),
        scores=_scores(summary["held_out"]),
        probes=_probes(run_dir / "probes.json"),
        variances=_variances(summary),
        biases=[BIASES.get(name, name) for name in summary["biases"]],
    )


def _variances(summary: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """Return (weighting, steps averaged over, means) of the squared advantages that the run recorded."""
    return [
        (kind, label, row)
        for kind, name in (("weighted", "weighted_advantage_variance"), ("plain", "advantage_variance"))
        for label, steps in (("all steps", "all_steps"), ("steps with only estimated baselines", "probe_steps"))
        if (row := summary[name][steps])["num_steps"] and row["none"] is not None
    ]


def _verdict(held_out: dict[str, Any] | None) -> str:
    """Return the change of the held-out reward as a sentence."""
    if held_out is None:
        return "Held-out reward was not evaluated."
    if held_out["before"] is None:
        return "Held-out reward was not evaluated before training, so its change is unknown."
    if held_out["after"] is None:
        return "Held-out reward was evaluated only before training so far."
    so_far = "" if held_out["after"]["when"] == "after" else f" at step {held_out['after']['step']}"
    words = {
        "rose_beyond_intervals": "rose; the 95 % intervals do not overlap",
        "rose": "rose; the paired difference is above zero, although the intervals overlap",
        "fell": "fell",
        "unclear": "did not change significantly",
    }
    return f"Held-out reward{so_far} {words[held_out['verdict']]}."


def _domains(held_out: dict[str, Any] | None) -> list[tuple[str, float | None, float | None]]:
    """Return (domain, before, after) of every domain; empty if there is only one."""
    if held_out is None:
        return []
    before, after = (held_out[when]["by_domain"] if held_out[when] else {} for when in ("before", "after"))
    names = sorted({*before, *after})
    return [(name, before.get(name), after.get(name)) for name in names] if len(names) > 1 else []


def _scores(held_out: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the table of avg@n and pass@k. Each cell has the scores before and after. None without scores."""
    found = [one and one["scores"] for one in (held_out["before"], held_out["after"])] if held_out else []
    tables = [dict(score_rows(table)) for table in found if table]
    if not tables:
        return None
    names = score_names(tables[-1]["overall"])
    rows = [
        (
            group,
            scores["num_prompts"],
            [[table[group][name] for table in tables if name in table.get(group, {})] for name in names],
        )
        for group, scores in tables[-1].items()
    ]
    return {"names": names, "rows": rows}


def _probes(path: Path) -> list[dict[str, Any]]:
    """Return the value service's report on its probes at the end of the run; empty if there is none."""
    try:
        probes = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return []
    older = {"configured": "probe", "estimator": "probe", "errors": []}  # of runs before there were other estimators
    return [older | probe for probe in probes if isinstance(probe, dict)] if isinstance(probes, list) else []


def _rollouts(record: RunRecord) -> list[dict[str, Any]]:
    """Return the rollouts to show: half from the beginning of the run, half from its end."""
    rows = record.rollouts
    if len(rows) > _MAX_ROLLOUTS:
        half = _MAX_ROLLOUTS // 2
        rows = rows[:half] + rows[-half:]
    return [
        {
            "step": row.get("step"),
            "domain": row.get("domain"),
            "prompt": _shortened(_text(row.get("prompt"))),
            "response": _shortened(_text(row.get("response"))),
            "answer": _shortened(_text(row.get("answer"))),
            **{key: _finite(row, key) for key in ("reward", "value", "advantage")},
        }
        for row in rows
    ]


def _text(value: Any) -> str:
    """Return a prompt, either text or chat messages, as text."""
    if isinstance(value, list) and all(isinstance(message, dict) for message in value):
        return "\n".join(f"{message.get('role', '?')}: {message.get('content', '')}" for message in value)
    return "" if value is None else str(value)


def _shortened(text: str) -> str:
    if len(text) <= _MAX_TEXT:
        return text
    return f"{text[:_MAX_TEXT]}… ({len(text) - _MAX_TEXT} more characters)"


def _finite(row: Row, key: str) -> float | None:
    value = number(row, key)
    return value if abs(value) < float("inf") else None


def _config(path: Path) -> dict[str, Any]:
    """Return a YAML mapping; empty if the file is missing or invalid."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _run_name(run_dir: Path) -> str:
    config = _config(run_dir / "config.yaml")
    run = config.get("run")
    name = config.get("run_id") or (run.get("name") if isinstance(run, dict) else None)
    return str(name or run_dir.resolve().name)


def _settings(path: Path) -> list[tuple[str, str]]:
    """Return the settings to show as (dotted path, value)."""
    return [(name, value) for name, value in _leaves(_config(path)) if name.rpartition(".")[2] in _SHOWN_SETTINGS]


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(tree, list) and any(isinstance(item, (dict, list)) for item in tree):
        for index, item in enumerate(tree):
            yield from _leaves(item, f"{prefix}.{index}")
    elif isinstance(tree, list):
        yield prefix, ", ".join(map(str, tree))
    elif tree is not None:
        yield prefix, re.sub(r"://[^/@\s]*@", "://…@", str(tree))
