"""The three files of a comparison."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from poise.report.comparison import ComparedRun, Comparison, write_comparison

Make = Callable[..., ComparedRun]
Compare = Callable[..., Comparison]


def row(markdown: str, title: str, name: str) -> list[str]:
    """Return the cells of a run's row in the table of that title."""
    section = markdown.split(f"## {title}\n")[1].split("\n## ")[0]
    line = next(line for line in section.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_tables_have_rewards_costs_and_ratios(make_run: Make, compare: Compare, tmp_path: Path) -> None:
    comparison = compare(
        make_run("rloo", 0, [0.0, 0.2, 0.4], variance=0.6),
        make_run("rloo", 1, [0.0, 0.4, 0.8], variance=0.6),
        make_run("poise", 0, [0.0, 0.6, 0.8], variance=0.3, zero_share=0.25),
        make_run("poise", 1, [0.0, 0.6, 0.6], variance=0.3, zero_share=0.75),
        levels=[0.3, 0.65, 0.9],
    )
    write_comparison(comparison, tmp_path)
    text = (tmp_path / "comparison.md").read_text()
    assert "Budget of each run: 200 response tokens." in text
    reached = row(text, "Tokens to reach a held-out reward", "poise")
    assert reached == ["poise", "50 ×0.50 (50 to 50)", "150 (125 to 125, 1 of 2)", "not reached (0 of 2)"]
    assert row(text, "Seconds to reach a held-out reward", "poise")[1] == "1.0 s ×0.50 (1.0 s to 1.0 s)"
    final = row(text, "Final held-out reward", "poise")
    assert final[2:5] == ["0.700", "0.600 to 0.800", "minimum and maximum of 2 seeds"]
    gradients = row(text, "Advantages and gradients", "poise")
    assert gradients[2:] == ["0.3 ×0.50 (0.3 to 0.3)", "30 ×0.50 (30 to 30)", "50 %"]
    assert row(text, "Runs", "rloo")[1:4] == ["0", "finished", "2"]
    tree = json.loads((tmp_path / "comparison.json").read_text())
    assert tree["runs"]["poise"]["to_reach"]["tokens"][0]["ratio"] == pytest.approx(0.5)


def test_the_page_is_self_contained(make_run: Make, compare: Compare, tmp_path: Path) -> None:
    runs = [make_run("rloo", 0, [0.0, 0.2, 0.4]), make_run("poise", 0, [0.0, 0.6, 0.8])]
    write_comparison(compare(*runs, name="a <b> trial"), tmp_path)
    page = (tmp_path / "comparison.html").read_text()
    assert page.count("<svg") == 3
    assert "a &lt;b&gt; trial" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "not reached" not in page
    assert "one seed, no interval" in page
    assert row((tmp_path / "comparison.md").read_text(), "Advantages and gradients", "poise")[1] == "0.2 ×1.00"


def test_the_terminal_summary_is_aligned(make_run: Make, compare: Compare, tmp_path: Path) -> None:
    runs = [make_run("rloo", 0, [0.0, 0.2, 0.4]), make_run("poise", 0, [0.0, 0.6, 0.8])]
    text = write_comparison(compare(*runs, levels=[0.4]), tmp_path).splitlines()
    assert text[0] == "Budget of each run: 200 response tokens."
    header = text[text.index("Tokens to reach a held-out reward") + 1]
    assert header.split() == ["run", "0.400"]
    assert text[-3].index("67 ×0.33") == header.index("0.400")
    assert text[-1] == f"report: {tmp_path / 'comparison.html'}"


def test_equal_folders_give_equal_pages(make_run: Make, compare: Compare, tmp_path: Path) -> None:
    comparison = compare(make_run("rloo", 0, [0.0, 0.2, 0.4]))
    write_comparison(comparison, tmp_path)
    first = (tmp_path / "comparison.html").read_bytes()
    write_comparison(comparison, tmp_path)
    assert (tmp_path / "comparison.html").read_bytes() == first


def test_a_comparison_without_runs_has_a_report(compare: Compare, tmp_path: Path) -> None:
    run = ComparedRun("rloo", 0, "rloo", tmp_path / "nowhere", "not begun")
    write_comparison(compare(run), tmp_path)
    page = (tmp_path / "comparison.html").read_text()
    assert "No run has been evaluated yet." in page
    assert "Preliminary: 0 of 1 runs are finished." in page
    assert "not begun" in (tmp_path / "comparison.md").read_text()
