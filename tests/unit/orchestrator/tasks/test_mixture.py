"""The problems of each step, and the held-out split."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter

import pytest

from poise.orchestrator.tasks.config import DigitsTask, GymTask, JsonlTask, PrimerTask
from poise.orchestrator.tasks.mixture import Mixture, task_names
from poise.orchestrator.tasks.problem import TaskError


def keys(problems):
    return [problem.key for problem in problems]


@pytest.fixture
def file(tmp_path):
    def write(num, name="own.jsonl", prefix="", **settings):
        path = tmp_path / name
        lines = [{"prompt": f"{prefix}{index}+1=", "answer": index + 1} for index in range(num)]
        path.write_text("\n".join(map(json.dumps, lines)))
        return JsonlTask(path=path, **settings)

    return write


def test_problems_depend_only_on_seed_and_step(file):
    tasks = [PrimerTask(), DigitsTask(weight=2), file(100)]
    mixture = Mixture(tasks, 7)
    steps = [keys(mixture.problems(step, 12)) for step in range(6)]
    fresh = Mixture(tasks, 7)
    assert keys(fresh.problems(5, 12)) == steps[5]
    assert keys(fresh.problems(2, 12)) == steps[2]
    assert len({tuple(step) for step in steps}) == 6
    assert keys(Mixture(tasks, 8).problems(5, 12)) != steps[5]


def test_another_seed_draws_other_problems():
    one, other = (Mixture([DigitsTask()], seed).problems(0, 20) for seed in (0, 1))
    assert not set(keys(one)) >= set(keys(other))
    one, other = (Mixture([DigitsTask(), PrimerTask()], seed).problems(0, 20) for seed in (0, 1))
    assert [problem.domain for problem in one] != [problem.domain for problem in other]


def test_another_process_draws_the_same_problems():
    code = (
        "from poise.orchestrator.tasks.mixture import Mixture\n"
        "from poise.orchestrator.tasks.config import PrimerTask\n"
        "mixture = Mixture([PrimerTask()], 3)\n"
        "print(*(p.key for p in mixture.problems(4, 8) + mixture.held_out(8)))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "77", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    output = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    mixture = Mixture([PrimerTask()], 3)
    assert output.stdout.split() == keys(mixture.problems(4, 8) + mixture.held_out(8))


def test_tasks_are_drawn_by_weight():
    mixture = Mixture([PrimerTask(), DigitsTask(weight=3)], 0)
    domains = Counter(problem.domain for step in range(4) for problem in mixture.problems(step, 200))
    assert domains["digits"] / 800 == pytest.approx(0.75, abs=0.06)
    order = [problem.domain for problem in mixture.problems(0, 40)]
    assert order != sorted(order)


@pytest.mark.parametrize("tasks", [[PrimerTask()], [DigitsTask(), PrimerTask()], [PrimerTask(), PrimerTask()]])
def test_problems_of_a_step_are_distinct(tasks):
    mixture = Mixture(tasks, 1)
    for step in range(3):
        assert len(set(keys(mixture.problems(step, 256)))) == 256


def test_a_task_that_is_too_small_repeats_problems():
    problems = Mixture([PrimerTask(skills=("copy",))], 0).problems(0, 80)
    assert len(problems) == 80
    assert 40 < len(set(keys(problems))) <= 58


def test_no_step_trains_on_held_out_problems(file):
    mixture = Mixture([PrimerTask(), DigitsTask(), file(400)], 0)
    held_out = mixture.held_out(96)
    assert len(set(keys(held_out))) == 96
    trained = {problem.prompt_key for step in range(40) for problem in mixture.problems(step, 64)}
    assert not trained & {problem.prompt_key for problem in held_out}


def test_held_out_problems_follow_weights_but_not_the_seed(file):
    tasks = [PrimerTask(), DigitsTask(weight=2), file(1000)]
    held_out = Mixture(tasks, 0).held_out(41)
    assert Counter(problem.domain for problem in held_out) == {"primer": 10, "digits": 21, "default": 10}
    assert keys(Mixture(tasks, 9).held_out(41)) == keys(held_out)


def test_about_an_eighth_is_held_out(file):
    mixture = Mixture([file(4000)], 0)
    trained = set(keys(mixture.problems(0, 4000)))
    assert len(trained) / 4000 == pytest.approx(7 / 8, abs=0.02)


def test_too_few_held_out_problems_are_reported(file):
    task = file(40)
    with pytest.raises(TaskError) as caught:
        Mixture([PrimerTask(), task], 0).held_out(128)
    said = str(caught.value)
    assert f"tasks[1] (jsonl), {task.path}: has " in said
    assert "its share of 128 is 64. Lower evaluation.num_prompts" in said


def test_tasks_that_share_problems_hold_out_distinct_ones():
    tasks = [DigitsTask(skills=("max",)), DigitsTask(skills=("max",))]
    assert len(set(keys(Mixture(tasks, 0).held_out(100)))) == 100


@pytest.mark.parametrize("others", [[], [DigitsTask(weight=1.5)]])
def test_every_problem_of_a_file_is_drawn_once_an_epoch(file, others):
    mixture = Mixture([file(48, eval_path=file(5, "eval.jsonl", "9").path), *others], 0)
    given = [p.key for step in range(80) for p in mixture.problems(step, 7) if p.domain == "default"]
    epochs = [given[start : start + 48] for start in range(0, len(given) - 47, 48)]
    assert len(epochs) >= 4
    for epoch in epochs:
        assert len(set(epoch)) == 48
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_step_across_epochs_repeats_no_problem(file):
    mixture = Mixture([file(31, eval_path=file(5, "eval.jsonl", "9").path)], 0)
    for step in range(120):
        assert len(set(keys(mixture.problems(step, 10)))) == 10


def test_only_the_eval_file_is_held_out(file):
    task = file(60, eval_path=file(20, "eval.jsonl").path)  # its prompts are in the training file, too
    mixture = Mixture([task], 0)
    held_out = {problem.prompt for problem in mixture.held_out(20)}
    assert held_out == {f"{index}+1=" for index in range(20)}
    trained = {problem.prompt for problem in mixture.problems(0, 40)}
    assert trained == {f"{index}+1=" for index in range(20, 60)}


def test_no_task_trains_on_held_out_prompts_of_others(file):
    split = file(200)
    whole = file(200, "same.jsonl", eval_path=file(5, "eval.jsonl", "9").path)
    mixture = Mixture([split, whole], 0)
    held_out = {p.prompt_key for p in mixture.held_out(10)}
    trained = {p.prompt_key for step in range(8) for p in mixture.problems(step, 100)}
    assert not trained & held_out


def test_a_file_without_training_problems_is_rejected(file):
    with pytest.raises(TaskError, match="none is left for training"):
        Mixture([file(3, eval_path=file(5, "eval.jsonl").path)], 0)


def test_invalid_lines_of_any_task_are_reported_first(file, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{}")
    with pytest.raises(TaskError, match=r"bad\.jsonl:1: prompt: missing"):
        Mixture([PrimerTask(), JsonlTask(path=bad)], 0)


def test_a_missing_verifier_is_reported_before_the_run(file):
    with pytest.raises(TaskError, match=r"tasks\[0\] \(jsonl\): verifier: .*module nowhere_at_all cannot be imported"):
        Mixture([file(10, verifier="nowhere_at_all:check")], 0)


def test_reading_a_file_stops_at_max_prompts(file):
    path = file(3).path
    path.write_text(path.read_text() + "\nnot JSON")
    task = JsonlTask(path=path, max_prompts=3, eval_path=file(5, "eval.jsonl", "9").path)
    assert len(set(keys(Mixture([task], 0).problems(0, 3)))) == 3


def test_no_tasks_are_rejected():
    with pytest.raises(TaskError, match="add at least one"):
        Mixture([], 0)


def test_tasks_need_no_torch():
    code = (
        "import sys; import poise.orchestrator.tasks.mixture, poise.orchestrator.rewards.pool\n"
        "print({'torch', 'transformers', 'vllm', 'reasoning_gym', 'math_verify'} & set(sys.modules))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    output = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "set()"


def test_problems_have_the_name_of_their_task(file):
    tasks = [file(64, "gsm8k.jsonl"), DigitsTask(), PrimerTask(), DigitsTask(skills=("fst",))]
    assert task_names(tasks) == ["gsm8k", "digits-1", "primer", "digits-2"]
    assert task_names([GymTask(name="spell_backward"), DigitsTask()]) == ["spell_backward", "digits"]
    mixture = Mixture(tasks, 0)
    held_out = mixture.held_out(16)
    assert [problem.task for problem in held_out] == [name for name in task_names(tasks) for _ in range(4)]
    trained = mixture.problems(0, 200)
    assert {(problem.task, problem.domain) for problem in trained} == {
        ("gsm8k", "default"),
        ("digits-1", "digits"),
        ("digits-2", "digits"),
        ("primer", "primer"),
    }
    assert {problem.metadata["skill"] for problem in trained if problem.task == "digits-2"} == {"fst"}


SIZES = [[8] * 50 + [16] * 50, [16] * 50 + [8] * 50, [1, 300, 7, 64, 64, 2, 500, 56], [5, 3] * 200, [994]]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("others", [[], [DigitsTask(weight=0.5)]])
def test_changed_sizes_keep_one_problem_an_epoch(file, sizes, others):
    mixture = Mixture([file(994, eval_path=file(5, "eval.jsonl", "held out ").path), *others], 0)
    given = [p.key for step, n in enumerate(sizes) for p in mixture.problems(step, n) if p.domain == "default"]
    assert len(set(given[:994])) == len(given[:994])


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("others", [[], [DigitsTask(weight=0.5), PrimerTask()]])
def test_a_resumed_mixture_continues(file, sizes, others):
    tasks = [*others, file(994, eval_path=file(5, "eval.jsonl", "held out ").path)]
    whole, first, then = (Mixture(tasks, 3) for _ in range(3))
    expected = [keys(whole.problems(step, n)) for step, n in enumerate(sizes)]
    cut = len(sizes) // 2
    for step in range(cut):
        first.problems(step, sizes[step])

    then.resume(cut, first.num_drawn(cut))

    assert [keys(then.problems(step, sizes[step])) for step in range(cut, len(sizes))] == expected[cut:]


def test_skipped_draws_count(file):
    tasks = [file(300, eval_path=file(5, "eval.jsonl", "held out ").path), DigitsTask()]
    whole, resumed = Mixture(tasks, 0), Mixture(tasks, 0)
    for step, n in enumerate((8, 8, 3)):
        whole.problems(step, n)
        resumed.skip(step, n)
    assert keys(resumed.problems(3, 20)) == keys(whole.problems(3, 20))


def test_positions_follow_the_names_of_tasks(file):
    first, second = file(100, "first.jsonl"), file(100, "second.jsonl", "1")
    before = Mixture([first, second], 0)
    before.problems(0, 30)
    given = before.num_drawn(1)
    assert sum(given.values()) == 30

    after = Mixture([DigitsTask(), second, first], 0)
    after.resume(1, given)

    assert after.num_drawn(1) == given | {"digits": 0}


def test_a_draw_before_the_resumed_one_is_an_error():
    mixture = Mixture([DigitsTask()], 0)
    mixture.resume(5, {"digits": 40})
    with pytest.raises(ValueError, match="draw 4 is before draw 5, at which the run resumed"):
        mixture.problems(4, 8)


def test_invalid_rows_of_all_files_are_listed(tmp_path):
    paths = [tmp_path / f"{name}.jsonl" for name in "abc"]
    for path in paths:
        path.write_text("{}\n")
    with pytest.raises(TaskError) as caught:
        Mixture([JsonlTask(path=paths[0], eval_path=paths[1]), JsonlTask(path=paths[2])], 0)
    for path in paths:
        assert f"{path}:1: prompt: missing" in str(caught.value)


@pytest.mark.parametrize(
    ("of_run", "of_task", "stops"),
    [("stop", None, True), ("skip", None, False), ("stop", "skip", False), ("skip", "stop", True)],
)
def test_on_bad_row_of_a_task_overrides_the_run(file, of_run, of_task, stops):
    task = file(40, on_bad_row=of_task)
    task.path.write_text(task.path.read_text() + "\n{}\n")
    if stops:
        with pytest.raises(TaskError, match="1 of 41 rows is invalid"):
            Mixture([task], 0, of_run)
    else:
        assert Mixture([task], 0, of_run).files[0].bad.num == 1


def test_rows_dropped_later_are_never_drawn(file):
    mixture = Mixture([file(80), file(20, "other.jsonl", "1")], 0)
    first, second = mixture.files
    gone = [problem for problem in first.problems if problem.line % 3 == 0]

    mixture.replace_files([first.without([(problem, "too long") for problem in gone]), second])

    left = {problem.key for problem in (*first.problems, *second.problems)} - {problem.key for problem in gone}
    seen = {problem.key for step in range(40) for problem in mixture.problems(step, 8)}
    seen |= {problem.key for problem in mixture.held_out(8)}
    assert seen <= left
    assert mixture.files[0].bad.num == len(gone)


def test_a_task_without_training_problems_is_rejected(file):
    mixture = Mixture([file(20)], 0)
    (only,) = mixture.files
    with pytest.raises(TaskError, match="all problems are invalid, none is left for training"):
        mixture.replace_files([only.without([(problem, "too long") for problem in only.problems])])
