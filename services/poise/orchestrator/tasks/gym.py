"""Problems from reasoning-gym.

Owns making them by name and telling what is wrong with the settings. Scoring is `verifiers.rules`' part: the package's
own entry travels there in the problem's metadata, because four of its tasks make another one in another process.
"""

from __future__ import annotations

import difflib
import json
import random
from collections.abc import Callable
from typing import Any

from poise.orchestrator.rewards.rules import pack
from poise.orchestrator.tasks.config import GymTask
from poise.orchestrator.tasks.problem import Problem, TaskError
from poise_client.types import Message


def drawer(task: GymTask) -> Callable[[random.Random], Problem]:
    """Return what draws one of the task's problems.

    Raises:
        TaskError: reasoning-gym is missing, or knows no such task, or not with such options.
    """
    dataset = _dataset(task)
    domain = task.domain or task.name

    def draw(source: random.Random) -> Problem:
        index = source.randrange(task.size)
        try:
            entry = dataset[index]
            packed = json.loads(json.dumps(pack(entry)))
        except Exception as error:
            raise TaskError(f"gym task {task.name!r}: problem {index} cannot be made: {error!r}") from error
        prompt: list[Message] = [Message(role="user", content=entry["question"])]
        if task.system is not None:
            prompt.insert(0, Message(role="system", content=task.system))
        answer = entry["answer"]
        metadata = {"name": task.name, "options": task.options, "size": task.size, "entry": packed}
        return Problem(domain, prompt, "" if answer is None else str(answer), "gym", metadata)

    return draw


def _dataset(task: GymTask) -> Any:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise TaskError(f"gym task {task.name!r}: reasoning-gym is missing; install poise-served[train]") from error
    if task.name not in DATASETS:
        near = difflib.get_close_matches(task.name, DATASETS, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(sorted(DATASETS))}"
        raise TaskError(f"gym task name {task.name!r}: unknown; {hint}")
    if reserved := {"seed", "size"} & set(task.options):
        raise TaskError(
            f"gym task {task.name!r}: options: {min(reserved)} is not for options to set; use the task's size"
        )
    try:
        return reasoning_gym.create_dataset(task.name, **task.options, seed=0, size=task.size)
    except Exception as error:
        raise TaskError(f"gym task {task.name!r}: options {task.options} do not work: {error}") from error
