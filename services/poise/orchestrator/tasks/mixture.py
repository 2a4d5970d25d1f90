"""The problems of a run: which a step trains on, which are held out.

A pure function of seed and step: a restarted run asks what it would have asked. Knows sources, not what they hold.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

from poise.orchestrator.tasks.config import GymTask, JsonlTask, TaskConfig
from poise.orchestrator.tasks.problem import Problem, TaskError
from poise.orchestrator.tasks.sources import make_sources


class Mixture:
    """Several tasks, by weight."""

    def __init__(self, tasks: Sequence[TaskConfig], seed: int) -> None:
        """Load every task.

        Raises:
            TaskError: something is wrong with a task; of a file every wrong line is told.
        """
        if not tasks:
            raise TaskError("tasks: none given; name at least one")
        self._sources = make_sources(tasks)
        self._names = task_names(tasks)
        self._weights = [task.weight for task in tasks]
        self._seed = seed
        self._given: dict[int, list[list[int]]] = {}
        """By prompts a step: how many problems each task gave before each step, as far as counted."""

    def problems(self, step: int, n: int) -> list[Problem]:
        """Return the `n` problems of a step, where every step takes `n`. The same for the same seed, step and n.

        They are distinct as far as the tasks have enough of them; a file's come once an epoch.

        Raises:
            TaskError: a task has nothing to train on.
        """
        choices = self._choices(step, n)
        before = self._given_before(step, n)
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

    def _choices(self, step: int, n: int) -> list[int]:
        """Return which task each of the step's problems is of."""
        source = random.Random(f"{self._seed}/mixture/{step}")  # noqa: S311 (no secret)
        return source.choices(range(len(self._weights)), self._weights, k=n)

    def _given_before(self, step: int, n: int) -> list[int]:
        if len(self._sources) == 1:
            return [step * n]
        counts = self._given.setdefault(n, [[0] * len(self._sources)])
        for earlier in range(len(counts) - 1, step):
            choices = self._choices(earlier, n)
            counts.append([count + choices.count(index) for index, count in enumerate(counts[-1])])
        return counts[step]


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
