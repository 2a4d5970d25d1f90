"""Where the problems of one task come from: a generator that is drawn from, or a list that is walked.

Owns the split into what is trained on and what is held out. A generator's split goes by the prompt's hash, the same in
every run; so does a file's, unless it has a file of held-out problems.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence, Set
from functools import lru_cache
from typing import Protocol

from poise.orchestrator.rewards.rules import resolve
from poise.orchestrator.tasks import digits, gym, primer
from poise.orchestrator.tasks.config import DigitsTask, GymTask, JsonlTask, PrimerTask, TaskConfig
from poise.orchestrator.tasks.jsonl import read_file
from poise.orchestrator.tasks.problem import Problem, TaskError
from poise.orchestrator.tasks.rows import DataFile, OnBadRow

HELD_OUT_SHARE = 8
"""One in so many prompts is held out."""

_MAX_DRAWS = 500
"""After so many draws in vain a generator has no more distinct problems to give."""


class Source(Protocol):
    """The problems of one task."""

    name: str
    """For messages."""

    def training(self, seed: str, step: int, first: int, num: int, seen: Set[str]) -> list[Problem]:
        """Return `num` problems for a step, before which `first` were given. `seen` are the step's keys so far."""
        ...

    def held_out(self) -> Iterator[Problem]:
        """Yield the distinct held-out problems, always in the same order."""
        ...

    def withhold(self, prompt_keys: Set[str]) -> None:
        """Keep these prompts, which some task holds out, from training."""
        ...


def is_held_out(problem: Problem) -> bool:
    """Whether the split by hash holds this problem out."""
    return int(problem.prompt_key[:8], 16) % HELD_OUT_SHARE == 0


class Generator:
    """Problems made on demand."""

    def __init__(self, name: str, draw: Callable[[random.Random], Problem]) -> None:
        self.name = name
        self._draw = draw
        self._withheld: Set[str] = frozenset()

    def training(self, seed: str, step: int, first: int, num: int, seen: Set[str]) -> list[Problem]:
        """See `Source`. Repeats a problem only when new ones are not to be had."""
        source = _random(seed, step)
        given = set(seen)
        problems: list[Problem] = []
        for _ in range(num):
            spare: Problem | None = None
            for _ in range(_MAX_DRAWS):
                problem = self._draw(source)
                if is_held_out(problem) or problem.prompt_key in self._withheld:
                    continue
                spare = problem
                if problem.key not in given:
                    break
            if spare is None:
                raise TaskError(f"{self.name}: all problems drawn are held out; it has too few different ones")
            given.add(spare.key)
            problems.append(spare)
        return problems

    def held_out(self) -> Iterator[Problem]:
        """See `Source`. Ends when new ones are not to be had."""
        source = _random("held-out")
        given: set[str] = set()
        num_in_vain = 0
        while num_in_vain < _MAX_DRAWS * HELD_OUT_SHARE:
            problem = self._draw(source)
            if is_held_out(problem) and problem.key not in given:
                given.add(problem.key)
                num_in_vain = 0
                yield problem
            else:
                num_in_vain += 1

    def withhold(self, prompt_keys: Set[str]) -> None:
        """See `Source`."""
        self._withheld = prompt_keys


class Listed:
    """Problems of a list, every one given once an epoch."""

    def __init__(
        self, name: str, training: Sequence[Problem], held_out: Sequence[Problem], files: Sequence[DataFile] = ()
    ) -> None:
        self.name = name
        self.files = files
        """What they were read from."""
        self._training = training
        self._held_out = sorted(held_out, key=lambda problem: problem.key)
        self._order = lru_cache(maxsize=4)(self._make_order)

    def training(self, seed: str, step: int, first: int, num: int, seen: Set[str]) -> list[Problem]:
        """See `Source`."""
        size = len(self._training)
        places = (divmod(place, size) for place in range(first, first + num))
        return [self._training[self._order(seed, epoch)[offset]] for epoch, offset in places]

    def held_out(self) -> Iterator[Problem]:
        """See `Source`."""
        return iter(self._held_out)

    @property
    def held_out_keys(self) -> Set[str]:
        """The prompts held out."""
        return {problem.prompt_key for problem in self._held_out}

    def withhold(self, prompt_keys: Set[str]) -> None:
        """See `Source`. Raises `TaskError` when nothing is left to train on."""
        self._training = [problem for problem in self._training if problem.prompt_key not in prompt_keys]
        if not self._training:
            raise TaskError(f"{self.name}: no problem is left to train on, all are held out; add problems")

    def keep(self, files: Sequence[DataFile]) -> None:
        """Go on with the problems that are left of the files. Raises `TaskError` when none is left to train on."""
        self.files = files
        left = {problem.key for file in files for problem in file.problems}
        self._training = [problem for problem in self._training if problem.key in left]
        self._held_out = [problem for problem in self._held_out if problem.key in left]
        self._order.cache_clear()
        if not self._training:
            raise TaskError(f"{self.name}: no problem is left to train on, the others cannot be used; add problems")

    def _make_order(self, seed: str, epoch: int) -> list[int]:
        """Return the order of an epoch. What ends an epoch does not begin the next: one step may hold both."""
        order = _shuffled(len(self._training), seed, epoch)
        if epoch == 0:
            return order
        third = len(order) // 3  # the first two thirds are rearranged here, so that the last one is as it was shuffled
        just_given = set(_shuffled(len(order), seed, epoch - 1)[-third:]) if third else set()
        head = sorted(order[: 2 * third], key=lambda index: index in just_given)
        return head + order[2 * third :]


def make_sources(tasks: Sequence[TaskConfig], on_bad_row: OnBadRow) -> list[Source]:
    """Return the source of every task; none trains on what another holds out of its file.

    Raises:
        TaskError: files, names or options are wrong, or leave nothing to train on; of all tasks at once.
    """
    sources: list[Source] = []
    wrong: list[str] = []
    for index, task in enumerate(tasks):
        try:
            sources.append(_make_source(index, task, on_bad_row))
        except TaskError as error:
            wrong.append(str(error))
    if wrong:
        raise TaskError("\n".join(wrong))
    withheld = {key for source in sources if isinstance(source, Listed) for key in source.held_out_keys}
    for source in sources:
        source.withhold(withheld)
    return sources


def _make_source(index: int, task: TaskConfig, on_bad_row: OnBadRow) -> Source:
    name = f"tasks[{index}] ({task.kind})"
    if isinstance(task, PrimerTask):
        return Generator(name, lambda source: primer.draw(task.skills, task.one_shot, task.domain, source))
    if isinstance(task, DigitsTask):
        return Generator(name, lambda source: _digits_problem(task, source))
    if isinstance(task, GymTask):
        return Generator(name, gym.drawer(task))
    return _file_source(name, task, task.on_bad_row or on_bad_row)


def _file_source(name: str, task: JsonlTask, on_bad_row: OnBadRow) -> Listed:
    try:
        resolve(task.verifier)
    except ValueError as error:
        raise TaskError(f"{name}: verifier: {error}") from error
    files, wrong = [], []
    for path, limit in ((task.path, task.max_prompts), (task.eval_path, None)):
        try:
            files += [read_file(task, path, on_bad_row, limit)] if path is not None else []
        except TaskError as error:
            wrong.append(str(error))
    if wrong:
        raise TaskError("\n".join(wrong))
    problems = files[0].problems
    name = f"{name}, {task.path}"
    if task.eval_path is None:
        training, held_out = [p for p in problems if not is_held_out(p)], [p for p in problems if is_held_out(p)]
        return Listed(name, training, held_out, files)
    return Listed(name, problems, files[1].problems, files)


def _digits_problem(task: DigitsTask, source: random.Random) -> Problem:
    skill = source.choice(task.skills)
    prompt, answer = digits.draw(skill, source)
    return Problem(task.domain, prompt, answer, "exact", {"skill": skill})


def _shuffled(size: int, seed: str, epoch: int) -> list[int]:
    order = list(range(size))
    _random(seed, "epoch", epoch).shuffle(order)
    return order


def _random(*parts: str | int) -> random.Random:
    """Return a source of chance that follows from the parts alone; text seeds do not go through `hash`."""
    return random.Random("/".join(map(str, parts)))  # noqa: S311 (no secret)
