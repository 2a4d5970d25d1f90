"""The progress of a run, read from its files."""

from __future__ import annotations

import json
from pathlib import Path

from poise.local.comparison.follower import Tail, describe_evaluation


def test_each_complete_row_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    tail = Tail(path)
    assert tail.read() == []
    path.write_text('{"step": 0}\n{"step": 1}\n{"st')
    assert tail.read() == [{"step": 0}, {"step": 1}]
    assert tail.read() == []
    with path.open("a") as file:
        file.write('ep": 2}\n')
    assert tail.read() == [{"step": 2}]


def test_file_rewritten_by_a_resumed_run_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(4)))
    tail = Tail(path)
    assert len(tail.read()) == 4
    path.write_text('{"step": 0}\n')
    assert tail.read() == []
    with path.open("a") as file:
        file.write('{"step": 1}\n')
    assert tail.read() == [{"step": 1}]


def test_evaluation_is_described_with_its_cost() -> None:
    row = {"step": 3, "tokens": 840, "wall_s": 65.0, "rewards": [[1.0, 0.0], [0.0, 0.0]]}
    assert describe_evaluation(row) == "held-out reward 0.250 after 3 steps, 840 tokens, 1m05s"
