"""The mixture of tasks: the problems that each step trains on, and the held-out problems.

The problems of a draw depend only on the seed, the draw's number, and the number of problems in earlier draws. So a
restarted run continues at the same problem, even if it then uses more or fewer problems per step.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice

from poise.orchestrator.tasks.config import GymTask, JsonlTask, TaskConfig
from poise.orchestrator.tasks.problem import Problem, TaskError
from poise.orchestrator.tasks.rows import DataFile, OnBadRow
from poise.orchestrator.tasks.sources import ProblemList, make_sources


class Mixture:
    """Several tasks, mixed by weight."""

    def __init__(self, tasks: Sequence[TaskConfig], seed: int, on_bad_row: OnBadRow = "stop") -> None:
        """Load all tasks; `on_bad_row` applies to tasks that do not set their own.

        Raises:
            TaskError: a task is invalid. Invalid rows are listed by file and line.
        """
        if not tasks:
            raise TaskError("tasks: is empty; add at least one")
        self._sources = make_sources(tasks, on_bad_row)
        self._names = task_names(tasks)
        self._weights = [task.weight for task in tasks]
        self._seed = seed
        self._first_draw = 0
        self._num_drawn = [[0] * len(tasks)]
        """Entry i: the number of problems drawn from each task before draw `_first_draw` + i."""

    def problems(self, draw: int, n: int) -> list[Problem]:
        """Return the `n` problems of a draw; they are distinct if the tasks have enough problems.

        Each problem of a file appears once per epoch. A skipped earlier draw counts as `n` problems, unless `resume`
        set the positions.

        Raises:
            TaskError: a task has no problems for training.
        """
        choices, before = self._advance(draw, n)
        seen: set[str] = set()
        by_task: list[list[Problem]] = []
        for index, source in enumerate(self._sources):
            seed = f"{self._seed}/task/{index}"
            drawn = source.training(seed, draw, before[index], choices.count(index), seen)
            seen.update(problem.key for problem in drawn)
            by_task.append([replace(problem, task=self._names[index]) for problem in reversed(drawn)])
        return [by_task[index].pop() for index in choices]

    def held_out(self, n: int) -> list[Problem]:
        """Return `n` distinct held-out problems, divided between the tasks by weight. They do not depend on the seed.

        Raises:
            TaskError: a task has too few held-out problems.
        """
        held_out: list[Problem] = []
        seen: set[str] = set()
        for source, name, quota in zip(self._sources, self._names, _quotas(self._weights, n), strict=True):
            fresh = (problem for problem in source.held_out() if problem.key not in seen)
            found = list(islice(fresh, quota))
            if len(found) < quota:
                raise TaskError(
                    f"{source.name}: has {len(found)} held-out problems, but its share of {n} is {quota}. Lower "
                    "evaluation.num_prompts, add problems, or set eval_path of a jsonl task"
                )
            seen.update(problem.key for problem in found)
            held_out += [replace(problem, task=name) for problem in found]
        return held_out

    def num_drawn(self, draw: int) -> dict[str, int]:
        """Return the number of problems drawn from each task before a draw, by task name, for `resume`."""
        return dict(zip(self._names, self._num_drawn[draw - self._first_draw], strict=True))

    def resume(self, draw: int, num_drawn: Mapping[str, int]) -> None:
        """Continue at a draw, with the number of problems drawn from each task before it; 0 for missing tasks."""
        self._first_draw = draw
        self._num_drawn = [[num_drawn.get(name, 0) for name in self._names]]

    def skip(self, draw: int, n: int) -> None:
        """Count a draw of `n` problems without drawing them."""
        self._advance(draw, n)

    @property
    def files(self) -> list[DataFile]:
        """The data files of all tasks."""
        return [file for source in self._lists() for file in source.files]

    def replace_files(self, files: Sequence[DataFile]) -> None:
        """Replace the data files with `files`, in the same order.

        Raises:
            TaskError: no problem of a task is left for training.
        """
        rest = iter(files)
        for source in self._lists():
            source.replace_files(list(islice(rest, len(source.files))))

    def _lists(self) -> Iterator[ProblemList]:
        return (source for source in self._sources if isinstance(source, ProblemList))

    def _choices(self, draw: int, n: int) -> list[int]:
        """Return the index of the task of each problem of a draw."""
        rng = random.Random(f"{self._seed}/mixture/{draw}")  # noqa: S311 (not for cryptography)
        return rng.choices(range(len(self._weights)), self._weights, k=n)

    def _advance(self, draw: int, n: int) -> tuple[list[int], list[int]]:
        """Count a draw. Return the task of each of its problems, and the numbers drawn from each task before it."""
        if draw < self._first_draw:
            raise ValueError(f"draw {draw} is before draw {self._first_draw}, at which the run resumed")
        while len(self._num_drawn) <= draw - self._first_draw:
            earlier = self._first_draw + len(self._num_drawn) - 1
            self._num_drawn.append(self._after(self._num_drawn[-1], self._choices(earlier, n)))
        index = draw - self._first_draw
        before, choices = self._num_drawn[index], self._choices(draw, n)
        after = self._after(before, choices)
        if self._num_drawn[index + 1 : index + 2] != [after]:
            self._num_drawn[index + 1 :] = [after]
        return choices, before

    def _after(self, before: Sequence[int], choices: Sequence[int]) -> list[int]:
        return [count + choices.count(index) for index, count in enumerate(before)]


def task_names(tasks: Sequence[TaskConfig]) -> list[str]:
    """Return the name of each task: that of its file, its reasoning-gym name, or its kind.

    Tasks with the same name are numbered: "gsm8k", "digits-1", "digits-2".
    """
    names = [_task_name(task) for task in tasks]
    shared, counted = Counter(names), Counter[str]()
    numbered = []
    for name in names:
        counted[name] += 1
        numbered.append(f"{name}-{counted[name]}" if shared[name] > 1 else name)
    return numbered


def _task_name(task: TaskConfig) -> str:
    if isinstance(task, JsonlTask):
        return task.path.stem
    return task.name if isinstance(task, GymTask) else task.kind


def _quotas(weights: Sequence[float], n: int) -> list[int]:
    """Split `n` by weight, with the largest-remainder method."""
    shares = [n * weight / sum(weights) for weight in weights]
    quotas = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda index: quotas[index] - shares[index])
    for index in by_remainder[: n - sum(quotas)]:
        quotas[index] += 1
    return quotas
