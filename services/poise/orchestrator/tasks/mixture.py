"""The problems of a run: which a step trains on, which are held out.

A function of the seed, the draw, and how many problems were given before it: a restarted run draws what it would have
drawn, also where it takes more or fewer from now on. Knows sources, not what they hold.
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
from poise.orchestrator.tasks.sources import Listed, make_sources


class Mixture:
    """Several tasks, by weight."""

    def __init__(self, tasks: Sequence[TaskConfig], seed: int, on_bad_row: OnBadRow = "stop") -> None:
        """Load every task; `on_bad_row` is for those that do not say themselves what bad rows do.

        Raises:
            TaskError: something is wrong with a task; bad rows are named by file and line.
        """
        if not tasks:
            raise TaskError("tasks: none given; name at least one")
        self._sources = make_sources(tasks, on_bad_row)
        self._names = task_names(tasks)
        self._weights = [task.weight for task in tasks]
        self._seed = seed
        self._first_draw = 0
        self._given = [[0] * len(tasks)]
        """How many problems each task gave before `_first_draw`, before the next draw, and so on, as far as counted."""

    def problems(self, step: int, n: int) -> list[Problem]:
        """Return the `n` problems of a draw: of a step, where each draws once.

        A file's come once an epoch, whatever the draws before took; those this object was not asked for count as `n`
        each, unless `resume` said otherwise. Distinct as far as the tasks have enough of them.

        Raises:
            TaskError: a task has nothing to train on.
        """
        choices, before = self._pass_over(step, n)
        seen: set[str] = set()
        by_task: list[list[Problem]] = []
        for index, source in enumerate(self._sources):
            seed = f"{self._seed}/task/{index}"
            given = source.training(seed, step, before[index], choices.count(index), seen)
            seen.update(problem.key for problem in given)
            by_task.append([replace(problem, task=self._names[index]) for problem in reversed(given)])
        return [by_task[index].pop() for index in choices]

    def held_out(self, n: int) -> list[Problem]:
        """Return `n` distinct problems that no step trains on: each task's share by weight, whatever the seed.

        Raises:
            TaskError: a task has too few.
        """
        held_out: list[Problem] = []
        seen: set[str] = set()
        for source, name, quota in zip(self._sources, self._names, _quotas(self._weights, n), strict=True):
            fresh = (problem for problem in source.held_out() if problem.key not in seen)
            found = list(islice(fresh, quota))
            if len(found) < quota:
                raise TaskError(
                    f"{source.name}: has {len(found)} held-out problems, and its share of {n} is {quota}; lower "
                    "evaluation.num_prompts, add problems, or give a jsonl task an eval_path"
                )
            seen.update(problem.key for problem in found)
            held_out += [replace(problem, task=name) for problem in found]
        return held_out

    def given(self, step: int) -> dict[str, int]:
        """Return how many problems each task gave before a draw, by its name: what `resume` takes."""
        return dict(zip(self._names, self._given[step - self._first_draw], strict=True))

    def resume(self, step: int, given: Mapping[str, int]) -> None:
        """Continue at a draw, given how many problems each task gave before it; 0 for tasks not named."""
        self._first_draw = step
        self._given = [[given.get(name, 0) for name in self._names]]

    def pass_over(self, step: int, n: int) -> None:
        """Count a draw of `n` problems as given, without drawing them."""
        self._pass_over(step, n)

    @property
    def files(self) -> list[DataFile]:
        """What was read of the tasks' files."""
        return [file for source in self._listed() for file in source.files]

    def keep(self, files: Sequence[DataFile]) -> None:
        """Replace the files by `files`, in the order of the property `files`.

        Raises:
            TaskError: nothing is left of a task to train on.
        """
        rest = iter(files)
        for source in self._listed():
            source.keep(list(islice(rest, len(source.files))))

    def _listed(self) -> Iterator[Listed]:
        return (source for source in self._sources if isinstance(source, Listed))

    def _choices(self, step: int, n: int) -> list[int]:
        """Return which task each of the step's problems is of."""
        source = random.Random(f"{self._seed}/mixture/{step}")  # noqa: S311 (no secret)
        return source.choices(range(len(self._weights)), self._weights, k=n)

    def _pass_over(self, step: int, n: int) -> tuple[list[int], list[int]]:
        """Return which task each problem of a draw is of, and how many each gave before; count it as given."""
        if step < self._first_draw:
            raise ValueError(f"draw {step} was given before the run was resumed at draw {self._first_draw}")
        while len(self._given) <= step - self._first_draw:
            earlier = self._first_draw + len(self._given) - 1
            self._given.append(self._after(self._given[-1], self._choices(earlier, n)))
        index = step - self._first_draw
        before, choices = self._given[index], self._choices(step, n)
        after = self._after(before, choices)
        if self._given[index + 1 : index + 2] != [after]:
            self._given[index + 1 :] = [after]
        return choices, before

    def _after(self, before: Sequence[int], choices: Sequence[int]) -> list[int]:
        return [count + choices.count(index) for index, count in enumerate(before)]


def task_names(tasks: Sequence[TaskConfig]) -> list[str]:
    """Return what each task goes by: its file's name, its reasoning-gym name, or its kind.

    Tasks that share one are numbered: "gsm8k", "digits-1", "digits-2".
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
    """Share out `n` by weight, to the largest remainders."""
    shares = [n * weight / sum(weights) for weight in weights]
    quotas = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda index: quotas[index] - shares[index])
    for index in by_remainder[: n - sum(quotas)]:
        quotas[index] += 1
    return quotas
