"""Sources of problems: generators and lists, each split into training and held-out problems.

The split uses the prompt's hash, so it is the same in every run. A task with a file of held-out problems is not split.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence, Set
from functools import lru_cache
from typing import Protocol

from poise.orchestrator.rewards.verifiers import load_verifier
from poise.orchestrator.tasks import digits, gym, primer
from poise.orchestrator.tasks.config import DigitsTask, GymTask, JsonlTask, PrimerTask, TaskConfig
from poise.orchestrator.tasks.jsonl import read_file
from poise.orchestrator.tasks.problem import Problem, TaskError
from poise.orchestrator.tasks.rows import DataFile, OnBadRow

HELD_OUT_SHARE = 8
"""One of this many prompts is held out."""

_MAX_DRAWS = 500
"""After this many draws without a new problem, a generator counts as exhausted."""


class Source(Protocol):
    """The problems of one task."""

    name: str
    """For messages."""

    def training(self, seed: str, draw: int, first: int, num: int, seen: Set[str]) -> list[Problem]:
        """Return `num` problems of a draw, after `first` problems of earlier draws.

        `seen` contains the keys of the draw's problems from other tasks.
        """
        ...

    def held_out(self) -> Iterator[Problem]:
        """Yield the distinct held-out problems, always in the same order."""
        ...

    def withhold(self, prompt_keys: Set[str]) -> None:
        """Exclude these prompts, which other tasks hold out, from training."""
        ...


def is_held_out(problem: Problem) -> bool:
    """Return whether the split by hash holds a problem out."""
    return int(problem.prompt_key[:8], 16) % HELD_OUT_SHARE == 0


class Generator:
    """Problems generated on demand."""

    def __init__(self, name: str, draw: Callable[[random.Random], Problem]) -> None:
        self.name = name
        self._draw = draw
        self._withheld: Set[str] = frozenset()

    def training(self, seed: str, draw: int, first: int, num: int, seen: Set[str]) -> list[Problem]:
        """See `Source`. Repeats a problem only if there are no new ones."""
        rng = _rng(seed, draw)
        drawn = set(seen)
        problems: list[Problem] = []
        for _ in range(num):
            spare: Problem | None = None
            for _ in range(_MAX_DRAWS):
                problem = self._draw(rng)
                if is_held_out(problem) or problem.prompt_key in self._withheld:
                    continue
                spare = problem
                if problem.key not in drawn:
                    break
            if spare is None:
                raise TaskError(
                    f"{self.name}: all {_MAX_DRAWS} problems drawn are held out; the task has too few distinct problems"
                )
            drawn.add(spare.key)
            problems.append(spare)
        return problems

    def held_out(self) -> Iterator[Problem]:
        """See `Source`. Ends when there are no new problems."""
        rng = _rng("held-out")
        drawn: set[str] = set()
        num_repeated = 0
        while num_repeated < _MAX_DRAWS * HELD_OUT_SHARE:
            problem = self._draw(rng)
            if is_held_out(problem) and problem.key not in drawn:
                drawn.add(problem.key)
                num_repeated = 0
                yield problem
            else:
                num_repeated += 1

    def withhold(self, prompt_keys: Set[str]) -> None:
        """See `Source`."""
        self._withheld = prompt_keys


class ProblemList:
    """Problems of a list; each is drawn once an epoch."""

    def __init__(
        self, name: str, training: Sequence[Problem], held_out: Sequence[Problem], files: Sequence[DataFile] = ()
    ) -> None:
        self.name = name
        self.files = files
        """The files that they were read from."""
        self._training = training
        self._held_out = sorted(held_out, key=lambda problem: problem.key)
        self._order = lru_cache(maxsize=4)(self._make_order)

    def training(self, seed: str, draw: int, first: int, num: int, seen: Set[str]) -> list[Problem]:
        """See `Source`."""
        size = len(self._training)
        positions = (divmod(position, size) for position in range(first, first + num))
        return [self._training[self._order(seed, epoch)[offset]] for epoch, offset in positions]

    def held_out(self) -> Iterator[Problem]:
        """See `Source`."""
        return iter(self._held_out)

    @property
    def held_out_keys(self) -> Set[str]:
        """The prompts held out."""
        return {problem.prompt_key for problem in self._held_out}

    def withhold(self, prompt_keys: Set[str]) -> None:
        """See `Source`. Raises `TaskError` if no problem is left for training."""
        self._training = [problem for problem in self._training if problem.prompt_key not in prompt_keys]
        if not self._training:
            raise TaskError(f"{self.name}: all problems are held out, none is left for training; add problems")

    def replace_files(self, files: Sequence[DataFile]) -> None:
        """Replace the files, and keep only their problems. Raises `TaskError` if none is left for training."""
        self.files = files
        left = {problem.key for file in files for problem in file.problems}
        self._training = [problem for problem in self._training if problem.key in left]
        self._held_out = [problem for problem in self._held_out if problem.key in left]
        self._order.cache_clear()
        if not self._training:
            raise TaskError(f"{self.name}: all problems are invalid, none is left for training; add problems")

    def _make_order(self, seed: str, epoch: int) -> list[int]:
        """Return the order of an epoch. It does not begin with the last problems of the previous epoch.

        Otherwise a step that spans both epochs could repeat a problem.
        """
        order = _shuffled(len(self._training), seed, epoch)
        if epoch == 0:
            return order
        third = len(order) // 3  # rearrange only the first two thirds: the next epoch depends on the last third
        just_drawn = set(_shuffled(len(order), seed, epoch - 1)[-third:]) if third else set()
        head = sorted(order[: 2 * third], key=lambda index: index in just_drawn)
        return head + order[2 * third :]


def make_sources(tasks: Sequence[TaskConfig], on_bad_row: OnBadRow) -> list[Source]:
    """Return the source of every task. No task trains on prompts that another task's file holds out.

    Raises:
        TaskError: files, names or options are invalid, or no problem is left for training. Covers all tasks.
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
    withheld = {key for source in sources if isinstance(source, ProblemList) for key in source.held_out_keys}
    for source in sources:
        source.withhold(withheld)
    return sources


def _make_source(index: int, task: TaskConfig, on_bad_row: OnBadRow) -> Source:
    name = f"tasks[{index}] ({task.kind})"
    if isinstance(task, PrimerTask):
        return Generator(name, lambda rng: primer.draw(task.skills, task.one_shot, task.domain, rng))
    if isinstance(task, DigitsTask):
        return Generator(name, lambda rng: _digits_problem(task, rng))
    if isinstance(task, GymTask):
        return Generator(name, gym.drawer(task))
    return _file_source(name, task, task.on_bad_row or on_bad_row)


def _file_source(name: str, task: JsonlTask, on_bad_row: OnBadRow) -> ProblemList:
    try:
        load_verifier(task.verifier)
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
        return ProblemList(name, training, held_out, files)
    return ProblemList(name, problems, files[1].problems, files)


def _digits_problem(task: DigitsTask, rng: random.Random) -> Problem:
    skill = rng.choice(task.skills)
    prompt, answer = digits.draw(skill, rng)
    return Problem(task.domain, prompt, answer, "exact", {"skill": skill})


def _shuffled(size: int, seed: str, epoch: int) -> list[int]:
    order = list(range(size))
    _rng(seed, "epoch", epoch).shuffle(order)
    return order


def _rng(*parts: str | int) -> random.Random:
    """Return a generator seeded with the parts. Text seeds do not depend on `hash`, which differs between processes."""
    return random.Random("/".join(map(str, parts)))  # noqa: S311 (not for cryptography)
