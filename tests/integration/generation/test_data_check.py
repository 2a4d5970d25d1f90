"""A run's data files, checked by the tokenizer and the chat template of a real model behind gRPC."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import transformers
from tests.integration.generation.conftest import Running
from tests.support.tiny_models import CHAT_TEMPLATE, make_tiny_llama

from poise.orchestrator.config import OrchestratorConfig
from poise.orchestrator.sampling.load_balancer import RejectedPrompt
from poise.orchestrator.sampling.service_clients import ServiceClients
from poise.orchestrator.tasks.data_check import check_data
from poise.orchestrator.tasks.mixture import Mixture
from poise.orchestrator.tasks.problem import TaskError
from poise_client.types import Group, Prompt, Sampling

PICKY_TEMPLATE = "{% if messages | length > 2 %}{{ raise_exception('one turn only') }}{% endif %}" + CHAT_TEMPLATE
BAD_LINES = (3, 5, 8)


@pytest.fixture
async def picky(serve: Callable[..., Any], tmp_path: Path) -> AsyncIterator[Running]:
    """Serve a model of 128 tokens. Its template takes two messages; its tokenizer has a token without an embedding."""
    folder = make_tiny_llama(tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = PICKY_TEMPLATE
    tokenizer.add_tokens(["<beyond>"])
    tokenizer.save_pretrained(folder)
    yield await serve(model=str(folder), max_model_len=128)


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": "user" if index % 2 == 0 else "assistant", "content": text} for index, text in enumerate(contents)]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Return a file of 40 rows: line 3 is too long, the template rejects 5, and 8 has a token without an embedding."""
    prompts: list[Any] = [f"{index}+1=" for index in range(40)]
    prompts[0] = turns("hi")
    prompts[2] = "1" * 200
    prompts[4] = turns("hi", "ho", "hi")
    prompts[7] = "a <beyond> b"
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt, "answer": 1}) + "\n" for prompt in prompts))
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POISE_CACHE", str(tmp_path / "cache"))


def settings(running: Running, rows: Path, on_bad_row: str = "stop") -> OrchestratorConfig:
    return OrchestratorConfig.model_validate(
        {
            "run_dir": rows.parent / "run",
            "tasks": [{"kind": "jsonl", "path": rows, "on_bad_row": on_bad_row}],
            "sampling": {"max_tokens": 8},
            "evaluation": {"num_prompts": 0},
            "endpoints": {"generation": [running.target]},
        }
    )


async def check(config: OrchestratorConfig) -> Mixture:
    mixture = Mixture(config.tasks, config.seed)
    async with ServiceClients(config.endpoints, asyncio.Event()) as services:
        await check_data(config, mixture, services, lambda _: None)
    return mixture


async def sampled(config: OrchestratorConfig, prompts: Sequence[Prompt]) -> list[Group | RejectedPrompt]:
    async with (
        ServiceClients(config.endpoints, asyncio.Event()) as services,
        aclosing(services.sample("run", 0, prompts, 1, Sampling(max_tokens=2), 0)) as groups,
    ):
        return [each async for each in groups]


async def test_bad_rows_are_named_with_their_error(picky: Running, rows: Path) -> None:
    with pytest.raises(TaskError) as caught:
        await check(settings(picky, rows))
    long, template, beyond, summary = str(caught.value).splitlines()
    assert long.startswith(f"{rows}:3: prompt: has 200 tokens; 200 + 8 response tokens exceed max_model_len")
    assert template.startswith(f"{rows}:5: chat: is rejected by the model's chat template: one turn only")
    assert beyond.startswith(f"{rows}:8: text: has token ")
    assert summary == f"{rows}: 3 of 40 rows are invalid. Fix them, or set on_bad_row: skip to leave them out."


async def test_run_continues_without_skipped_rows(picky: Running, rows: Path) -> None:
    config = settings(picky, rows, "skip")
    mixture = await check(config)
    problems = [problem for step in range(4) for problem in mixture.problems(step, 16)]
    assert not {problem.line for problem in problems} & set(BAD_LINES)

    groups = await sampled(config, [Prompt(str(index), problem.prompt) for index, problem in enumerate(problems)])

    assert len(groups) == 64
    assert not [each for each in groups if isinstance(each, RejectedPrompt)]


async def test_rows_rejected_later_cost_only_themselves(picky: Running, rows: Path) -> None:
    prompts = [Prompt(str(i), json.loads(line)["prompt"]) for i, line in enumerate(rows.read_text().splitlines(), 1)]
    found = await sampled(settings(picky, rows), prompts)
    rejected = {int(each.group_id) for each in found if isinstance(each, RejectedPrompt)}
    assert rejected == set(BAD_LINES)
    assert len(found) == 40
