"""Problems from reasoning-gym.

`rewards.verifiers` scores the responses. The problem's metadata contains the dataset entry, because some tasks generate
another entry when the verifier process creates them again.
"""

from __future__ import annotations

import difflib
import json
import random
from collections.abc import Callable
from typing import Any

from poise.orchestrator.rewards.verifiers import encode_tuples
from poise.orchestrator.tasks.config import GymTask
from poise.orchestrator.tasks.problem import Problem, TaskError
from poise_client.types import Message


def drawer(task: GymTask) -> Callable[[random.Random], Problem]:
    """Return a function that draws a problem of the task.

    Raises:
        TaskError: reasoning-gym is not installed, or the name or options of the task are invalid.
    """
    dataset = _dataset(task)
    domain = task.domain or task.name

    def draw(rng: random.Random) -> Problem:
        index = rng.randrange(task.size)
        try:
            entry = dataset[index]
            packed = json.loads(json.dumps(encode_tuples(entry)))
        except Exception as error:
            raise TaskError(f"gym task {task.name!r}: creating problem {index} failed: {error!r}") from error
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
            f"gym task {task.name!r}: options: {min(reserved)} is not allowed here; set the task's size instead"
        )
    try:
        return reasoning_gym.create_dataset(task.name, **task.options, seed=0, size=task.size)
    except Exception as error:
        raise TaskError(f"gym task {task.name!r}: options {task.options} are invalid: {error}") from error
