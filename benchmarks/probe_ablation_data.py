"""Rollouts for `probe_ablation`, sampled once from SmolLM2-135M-Instruct and kept in files.

Three domains of elementary skills, each with one solved example. Training prompts have two rollouts each, as in a
POISE step; held-out prompts are different ones with sixteen.

A folder holds `settings.json`. Each batch of prompts has a `.json` with its problems and responses, and a
`.safetensors` with all numbers, which is written last. Existing batches are not sampled again.

Shapes: P prompts of a batch, n rollouts of each, d the model's width.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save
from tqdm import tqdm

from poise.algorithms.features import default_feature_layer
from poise.generation.config import GenerationConfig, VllmConfig
from poise.generation.engine import EngineRequest
from poise.generation.engines.vllm.engine import VllmEngine
from poise.local.models.catalog import make_model
from poise.orchestrator.rewards.verifiers import reward_function
from poise.orchestrator.tasks import primer
from poise.orchestrator.tasks.problem import Problem
from poise.runtime.files.atomic import write_file
from poise.runtime.files.cache import cache_dir
from poise.value.estimators.features import FeatureMatrix, Label
from poise_client.types import Features, Message, Rollout, RolloutId, Sampling

MODEL = "smollm2-135m-instruct"
NUM_LAYERS = 30
TEMPERATURE = 1.0
MAX_TOKENS = 32
MAX_MODEL_LEN = 256
SPLITS = {"training": (384, 2), "held_out": (48, 16)}
"""Prompts of a domain, and rollouts of each."""
ROLLOUTS_A_BATCH = 192


def default_folder() -> Path:
    return cache_dir() / "benchmarks/probe_ablation"


def _listed(items: Sequence[object]) -> str:
    return ", ".join(map(str, items))


def _words(source: random.Random, fewest: int, most: int) -> list[str]:
    return source.sample(primer._WORDS, source.randint(fewest, most))


def _repeat(source: random.Random) -> tuple[str, str]:
    words = _words(source, 2, 8)
    return f"Repeat this list: {_listed(words)}", _listed(words)


def _reverse(source: random.Random) -> tuple[str, str]:
    words = _words(source, 2, 3)
    return f"Write this list in reverse order: {_listed(words)}", _listed(words[::-1])


def _sort(source: random.Random) -> tuple[str, str]:
    numbers = source.sample(range(1, 30), source.randint(2, 3))
    return f"Sort these numbers from smallest to largest: {_listed(numbers)}", _listed(sorted(numbers))


def _count(source: random.Random) -> tuple[str, str]:
    first, more = source.randint(1, 90), source.randint(2, 5)
    return f"Count from {first} to {first + more}.", _listed(range(first, first + more + 1))


LIST_SKILLS = {"repeat": _repeat, "reverse": _reverse, "sort": _sort, "count": _count}


def _draw_list(source: random.Random) -> Problem:
    """Return a problem of the domain `lists`, in the form of `primer.draw`."""
    skill = source.choice(list(LIST_SKILLS))
    example, solution = LIST_SKILLS[skill](random.Random(100))
    question, answer = LIST_SKILLS[skill](source)
    prompt = [Message(role="system", content=primer.SYSTEM)]
    prompt += [Message(role="user", content=example), Message(role="assistant", content=solution)]
    prompt.append(Message(role="user", content=question))
    return Problem("lists", prompt, answer, "exact", {"skill": skill})


def _primer(domain: str, *skills: str) -> Callable[[random.Random], Problem]:
    return lambda source: primer.draw(skills, True, domain, source)


DOMAINS: dict[str, Callable[[random.Random], Problem]] = {
    "words": _primer("words", "copy", "capitals", "first_letter", "first_word", "last_word"),
    "numbers": _primer("numbers", "larger", "smaller", "greater", "next_number", "odd_or_even"),
    "lists": _draw_list,
}


@dataclass(frozen=True)
class Batch:
    """Prompts that are sampled and written together."""

    name: str
    problems: Sequence[Problem]
    num_rollouts: int


def batches() -> list[Batch]:
    """Return all batches of a collection, always the same. Held-out and training prompts are disjoint."""
    found = []
    for domain, draw in DOMAINS.items():
        problems = _distinct(domain, draw, sum(num_prompts for num_prompts, _ in SPLITS.values()))
        for split, (num_prompts, num_rollouts) in SPLITS.items():
            own, problems = problems[:num_prompts], problems[num_prompts:]
            size = ROLLOUTS_A_BATCH // num_rollouts
            for start in range(0, num_prompts, size):
                name = f"{domain}-{split}-{start // size:02d}"
                found.append(Batch(name, own[start : start + size], num_rollouts))
    return found


def _distinct(domain: str, draw: Callable[[random.Random], Problem], num: int) -> list[Problem]:
    """Return problems with distinct prompts, shuffled because some skills have fewer of them."""
    source = random.Random(domain)
    problems: dict[str, Problem] = {}
    while len(problems) < num:
        problem = draw(source)
        problems.setdefault(problem.prompt_key, problem)
    shuffled = list(problems.values())
    source.shuffle(shuffled)
    return shuffled


def settings() -> dict[str, object]:
    """Return the settings that a collection depends on."""
    keys = [problem.key for batch in batches() for problem in batch.problems]
    return {
        "model": MODEL,
        "feature_layer": default_feature_layer(NUM_LAYERS),
        "temperature": TEMPERATURE,
        "max_tokens": MAX_TOKENS,
        "max_model_len": MAX_MODEL_LEN,
        "splits": {split: list(counts) for split, counts in SPLITS.items()},
        "problems_sha256": hashlib.sha256("".join(keys).encode()).hexdigest(),
    }


def check_settings(folder: Path) -> bool:
    """Return whether the folder holds a collection, partial or complete; reject one with other settings."""
    path = folder / "settings.json"
    if not path.exists():
        return False
    found, wanted = json.loads(path.read_text()), settings()
    if differing := sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key)):
        raise click.ClickException(
            f"{folder} was collected with other settings: {', '.join(differing)}. Name another folder with --data, or "
            "remove this one to sample again."
        )
    return True


def missing(folder: Path) -> list[Batch]:
    return [batch for batch in batches() if not (folder / f"{batch.name}.safetensors").exists()]


def collect(folder: Path) -> None:
    """Sample the missing batches. An interrupted call can be repeated."""
    if not check_settings(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / "settings.json", json.dumps(settings(), indent=2).encode())
    if left := missing(folder):
        asyncio.run(_sample(folder, left))


async def _sample(folder: Path, left: Sequence[Batch]) -> None:
    engine = VllmEngine(
        GenerationConfig(
            model=str(make_model(MODEL)),
            dtype="float32",
            max_model_len=MAX_MODEL_LEN,
            vllm=VllmConfig(threads=2),
        )
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            await engine.start()
        for batch in (bar := tqdm(left, unit="batch")):
            bar.set_description(batch.name)
            started_s = time.perf_counter()
            prompts = [engine.tokenize(problem.prompt) for problem in batch.problems]
            rollouts = await asyncio.gather(
                *(
                    engine.generate(
                        EngineRequest(
                            RolloutId(batch.name, 0, str(index), sibling),
                            prompt,
                            Sampling(temperature=TEMPERATURE, max_tokens=MAX_TOKENS),
                        )
                    )
                    for index, prompt in enumerate(prompts)
                    for sibling in range(batch.num_rollouts)
                )
            )
            _write(folder, batch, prompts, rollouts, time.perf_counter() - started_s)
    finally:
        await engine.stop()


def _write(
    folder: Path, batch: Batch, prompts: Sequence[Sequence[int]], rollouts: Sequence[Rollout], seconds: float
) -> None:
    siblings = [rollouts[i : i + batch.num_rollouts] for i in range(0, len(rollouts), batch.num_rollouts)]
    rewards, records = [], []
    for problem, group in zip(batch.problems, siblings, strict=True):
        rewards += [reward_function(problem)(rollout.text) for rollout in group]
        records.append({**asdict(problem), "responses": [rollout.text for rollout in group]})
    arrays = {
        "prompt_ids": np.concatenate([np.array(prompt, np.int32) for prompt in prompts]),
        "prompt_lengths": np.array([len(prompt) for prompt in prompts], np.int32),
        "response_ids": np.concatenate([rollout.token_ids for rollout in rollouts]),
        "response_lengths": np.array([len(rollout.token_ids) for rollout in rollouts], np.int32),
        "rewards": np.array(rewards, np.float32),
        "prompt_hidden": np.stack([rollout.features.prompt_hidden for rollout in rollouts]),
        "response_hidden": np.stack([rollout.features.response_hidden for rollout in rollouts]),
        "entropies": np.array([_entropies(rollout.features) for rollout in rollouts], np.float32),
    }
    write_file(folder / f"{batch.name}.json", json.dumps({"seconds": seconds, "problems": records}, indent=1).encode())
    write_file(folder / f"{batch.name}.safetensors", save(arrays))


def _entropies(features: Features) -> list[float]:
    spans = (features.output_entropy, features.reasoning_entropy, features.answer_entropy)
    return [statistic for span in spans for statistic in astuple(span)]


@dataclass(frozen=True, eq=False)
class Prompts:
    """One split of a domain."""

    groups: list[Label]
    token_ids: list[NDArray[np.int32]]
    """Tokens of each group's prompt."""

    @property
    def rewards(self) -> NDArray[np.float32]:
        """[P, n]"""
        return np.stack([group.rewards for group in self.groups])


@dataclass(frozen=True, eq=False)
class Domain:
    """Rollouts of one domain."""

    name: str
    training: Prompts
    held_out: Prompts


def load(folder: Path) -> list[Domain]:
    """Read a whole collection."""
    if not check_settings(folder):
        raise click.ClickException(f"{folder} holds no rollouts. Run `collect` first; it takes about 15 minutes.")
    if left := missing(folder):
        raise click.ClickException(f"{folder}: {len(left)} batches are not sampled yet. Run `collect` again.")
    splits: dict[tuple[str, str], Prompts] = {}
    for batch in batches():
        domain, split, _ = batch.name.split("-")
        prompts = splits.setdefault((domain, split), Prompts([], []))
        arrays = load_file(folder / f"{batch.name}.safetensors")
        prompts.groups.extend(_groups(batch, domain, arrays))
        prompts.token_ids.extend(np.split(arrays["prompt_ids"], arrays["prompt_lengths"].cumsum()[:-1]))
    return [Domain(name, splits[name, "training"], splits[name, "held_out"]) for name in DOMAINS]


def _groups(batch: Batch, domain: str, arrays: dict[str, NDArray[np.float32]]) -> Iterator[Label]:
    rows = FeatureMatrix(arrays["prompt_hidden"], arrays["response_hidden"], arrays["entropies"])
    for index, problem in enumerate(batch.problems):
        start, end = index * batch.num_rollouts, (index + 1) * batch.num_rollouts
        yield Label("benchmark", 0, problem.key, domain, rows.part(start, end), arrays["rewards"][start:end])


def digest(domains: Sequence[Domain]) -> str:
    """Return a hex digest of the data that estimators are fitted on."""
    return hashlib.sha256(b"".join(domain.training.rewards.tobytes() for domain in domains)).hexdigest()
