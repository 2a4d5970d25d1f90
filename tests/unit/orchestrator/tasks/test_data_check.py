"""Invalid rows are reported by file and line before the first step, or skipped."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from poise.orchestrator.config import OrchestratorConfig
from poise.orchestrator.storage.run_folder import RunFolder
from poise.orchestrator.tasks import data_check
from poise.orchestrator.tasks.data_check import check_data
from poise.orchestrator.tasks.mixture import Mixture
from poise.orchestrator.tasks.problem import TaskError
from poise.runtime.config.settings import ConfigError
from poise_client.types import Policy, PromptCheck, PromptContent


class Generation:
    """A fake service with a tokenizer that knows only some letters."""

    def __init__(self, max_model_len: int = 32, digest: bytes = b"letters") -> None:
        self.policy = Policy(
            "instance", "lineage", 1, b"", True, "", "torch", "model", 4, 1, max_model_len, 0, False, "", digest, 128
        )
        self.num_checked = 0

    async def generation_policy(self) -> Policy:
        return self.policy

    async def check_prompts(
        self, contents: Sequence[PromptContent], on_checked: Callable[[int], None]
    ) -> list[PromptCheck]:
        checks = []
        for index, content in enumerate(contents):
            text = content if isinstance(content, str) else "".join(str(turn) for turn in content)
            problem = "chat: the model's chat template refuses it: no" if "☠" in text else ""
            checks.append(PromptCheck(str(index), 0 if problem else len(text), problem))
            on_checked(index + 1)
        self.num_checked += len(contents)
        return checks


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POISE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prompts"


def write(path: Path, prompts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"prompt": prompt, "answer": "1"}) + "\n" for prompt in prompts))
    return path


@pytest.fixture
def task(tmp_path: Path) -> dict[str, Any]:
    """Return a task with 20 training rows (3, 7 and 12 are invalid) and 4 held-out rows (2 is invalid)."""
    rows = [f"q{i:02d}" for i in range(1, 21)]
    rows[2], rows[6], rows[11] = "x" * 30, "a☠b", "x" * 999
    held_out = [f"e{i}" for i in range(1, 5)]
    held_out[1] = "y" * 31
    return {
        "kind": "jsonl",
        "path": write(tmp_path / "own.jsonl", rows),
        "eval_path": write(tmp_path / "eval.jsonl", held_out),
    }


def settings(tmp_path: Path, *tasks: dict[str, Any], **values: Any) -> OrchestratorConfig:
    defaults = {"run_dir": tmp_path / "run", "tasks": tasks, "evaluation": {"num_prompts": 2}}
    return OrchestratorConfig(**(defaults | {"sampling": {"max_tokens": 4}} | values))


async def check(config: OrchestratorConfig, generation: Any = None) -> Mixture:
    mixture = Mixture(config.tasks, config.seed, config.on_bad_row)
    await check_data(config, mixture, generation or Generation(), lambda _: None)
    return mixture


async def test_invalid_rows_stop_the_run_by_file_and_line(tmp_path: Path, task: dict[str, Any]) -> None:
    with pytest.raises(TaskError) as caught:
        await check(settings(tmp_path, task))
    said = str(caught.value).splitlines()
    own, held_out = task["path"], task["eval_path"]
    rows = [*(f"{own}:{i}" for i in (3, 7, 12)), str(own), f"{held_out}:2", str(held_out)]
    assert [line.split(": ")[0] for line in said] == rows
    assert "prompt: has 30 tokens; 30 + 4 response tokens exceed max_model_len = 32. Shorten it" in said[0]
    assert said[1] == f"{own}:7: chat: the model's chat template refuses it: no"
    assert said[3] == f"{own}: 3 of 20 rows are invalid. Fix them, or set on_bad_row: skip to leave them out."
    assert said[5].startswith(f"{held_out}: 1 of 4 rows is invalid.")


async def test_bad_rows_are_skipped_and_counted(
    tmp_path: Path, task: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        mixture = await check(settings(tmp_path, task, on_bad_row="skip"))
    assert {problem.line for problem in mixture.problems(0, 17)} == set(range(1, 21)) - {3, 7, 12}
    assert {problem.line for problem in mixture.held_out(3)} == {1, 3, 4}
    assert f"{task['path']}: 3 of 20 rows are left out (on_bad_row: skip)" in caplog.text
    assert f"{task['path']}:7: chat: the model's chat template refuses it" in caplog.text
    assert f"{task['eval_path']}: 1 of 4 rows is left out" in caplog.text


async def test_invalid_json_and_long_rows_are_counted_together(
    tmp_path: Path, task: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    task["path"].write_text("{}\n" + task["path"].read_text() + "[]\n")
    await check(settings(tmp_path, task | {"on_bad_row": "skip"}))
    assert f"{task['path']}: 5 of 22 rows are left out" in caplog.text


@pytest.mark.parametrize(("num_tokens", "fits"), [(27, True), (28, True), (29, False), (31, False), (32, False)])
async def test_row_must_leave_room_for_a_response(tmp_path: Path, num_tokens: int, fits: bool) -> None:
    path = write(tmp_path / "own.jsonl", ["q" * num_tokens, *(f"q{i}" for i in range(20))])
    config = settings(tmp_path, {"kind": "jsonl", "path": path}, evaluation={"num_prompts": 0}, on_bad_row="skip")
    assert (await check(config)).files[0].bad.num == (not fits)


@pytest.mark.parametrize(("num_tokens", "fits"), [(28, True), (31, True), (32, False)])
@pytest.mark.parametrize("max_tokens", [32, 500])
async def test_max_tokens_beyond_the_model_needs_little_room(
    tmp_path: Path, max_tokens: int, num_tokens: int, fits: bool
) -> None:
    path = write(tmp_path / "own.jsonl", ["q" * num_tokens, *(f"q{i}" for i in range(20))])
    values = {"evaluation": {"num_prompts": 0}, "on_bad_row": "skip", "sampling": {"max_tokens": max_tokens}}
    assert (await check(settings(tmp_path, {"kind": "jsonl", "path": path}, **values))).files[0].bad.num == (not fits)


async def test_too_few_valid_held_out_rows_stop_the_run(tmp_path: Path, task: dict[str, Any]) -> None:
    with pytest.raises(TaskError, match="has 3 held-out problems, but its share of 4 is 4"):
        await check(settings(tmp_path, task, on_bad_row="skip", evaluation={"num_prompts": 4}))


async def test_a_file_without_valid_rows_stops_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "own.jsonl", [f"{i}☠" for i in range(9)])
    config = settings(tmp_path, {"kind": "jsonl", "path": path}, evaluation={"num_prompts": 0}, on_bad_row="skip")
    with pytest.raises(TaskError, match="none is left for training"):
        await check(config)
    assert f"{path}: 9 of 9 rows are left out (on_bad_row: skip), showing the first 5" in caplog.text
    assert f"{path}:1: chat: the model's chat template refuses it" in caplog.text


async def test_counts_are_cached_by_content_tokenizer_and_settings(tmp_path: Path, task: dict[str, Any]) -> None:
    first, again, other_tokenizer, unknown = Generation(), Generation(), Generation(digest=b"x"), Generation(digest=b"")
    config = settings(tmp_path, task, on_bad_row="skip")
    found = [
        (await check(config, generation)).files for generation in (first, again, other_tokenizer, unknown, unknown)
    ]
    assert [each.num_checked for each in (first, again, other_tokenizer, unknown)] == [24, 0, 24, 48]
    assert all(files == found[0] for files in found)

    longer = Generation(max_model_len=2000)  # a limit is no part of what is cached
    assert [file.bad.num for file in (await check(config, longer)).files] == [1, 0]
    assert longer.num_checked == 0

    with_system = Generation(max_model_len=2000)
    await check(settings(tmp_path, task | {"system": "Be brief."}, on_bad_row="skip"), with_system)
    task["path"].write_text(task["path"].read_text().replace("q01", "q99"))
    changed = Generation()
    await check(config, changed)
    assert (with_system.num_checked, changed.num_checked) == (24, 20)


@pytest.mark.parametrize("content", ["", "{", "[[1]]", "[]", '[["a", ""]]'])
async def test_a_damaged_cache_is_replaced(tmp_path: Path, cache: Path, task: dict[str, Any], content: str) -> None:
    config = settings(tmp_path, task, on_bad_row="skip")
    await check(config)
    for path in cache.iterdir():
        path.write_text(content)
    generation = Generation()
    assert (await check(config, generation)).files[0].bad.num == 3
    assert generation.num_checked == 24


async def test_an_unwritable_cache_is_ignored(
    tmp_path: Path, task: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("POISE_CACHE", str(tmp_path / "file"))
    assert (await check(settings(tmp_path, task, on_bad_row="skip"))).files[0].bad.num == 3


async def test_oldest_counts_are_dropped(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_check, "MAX_CACHED", 2)
    for index in range(5):
        path = write(tmp_path / "own.jsonl", [f"{index}/{i}" for i in range(20)])
        await check(settings(tmp_path, {"kind": "jsonl", "path": path}, evaluation={"num_prompts": 0}))
    assert len(list(cache.iterdir())) == 2


async def test_progress_of_long_checks_is_logged(
    tmp_path: Path, task: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_check, "LOG_EVERY_S", 0.0)
    said: list[str] = []
    config = settings(tmp_path, task, on_bad_row="skip")
    await check_data(config, Mixture(config.tasks, 0, "skip"), Generation(), said.append)  # type: ignore[arg-type]
    assert said[:2] == [f"{task['path']}: {n} of 20 prompts checked" for n in (1, 2)]
    assert said[20] == f"{task['path']}: 20 prompts checked in 0 s"


async def test_stop_tokens_beyond_the_vocabulary_are_rejected(tmp_path: Path) -> None:
    values = {"sampling": {"stop_token_ids": [127, 128]}}
    with pytest.raises(ConfigError, match=r"sampling\.stop_token_ids: contains 128; the model's ids are 0 to 127"):
        await check(settings(tmp_path, {"kind": "digits"}, **values))


async def test_tasks_without_files_call_no_service(tmp_path: Path) -> None:
    await check(settings(tmp_path, {"kind": "digits"}), object())


async def recorded(tmp_path: Path, task: dict[str, Any], next_step: int) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.open("run", {})
    try:
        folder.record_data((await check(settings(tmp_path, task, on_bad_row="skip"))).files, next_step)
    finally:
        folder.close()


@pytest.mark.parametrize("changed", ["path", "eval_path"])
async def test_data_that_changed_since_the_run_began_is_reported(
    tmp_path: Path, task: dict[str, Any], changed: str, caplog: pytest.LogCaptureFixture
) -> None:
    await recorded(tmp_path, task, 0)
    await recorded(tmp_path, task, 5)
    assert "changed since" not in caplog.text
    task[changed].write_text(task[changed].read_text() + '{"prompt": "new", "answer": "1"}\n')

    await recorded(tmp_path, task, 7)

    (told,) = [record.getMessage() for record in caplog.records if "changed since" in record.getMessage()]
    assert told.startswith(f"{task[changed]} changed since this run began, from ")
    assert "From step 7 the run uses the new rows" in told
    assert "Restore the file, or start a new run" in told


async def test_newly_skipped_rows_count_as_a_change(
    tmp_path: Path, task: dict[str, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    await recorded(tmp_path, task, 0)
    config = settings(tmp_path, task, on_bad_row="skip")
    folder = RunFolder(tmp_path / "run")
    folder.record_data((await check(config, Generation(max_model_len=2000))).files, 3)
    assert "from 20 rows, 17 used" in caplog.text
    assert "to 20 rows, 19 used" in caplog.text


async def test_data_may_change_before_the_first_step(
    tmp_path: Path, task: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    await recorded(tmp_path, task, 0)
    task["path"].write_text(task["path"].read_text() + '{"prompt": "new", "answer": "1"}\n')
    await recorded(tmp_path, task, 0)
    assert "changed since" not in caplog.text
