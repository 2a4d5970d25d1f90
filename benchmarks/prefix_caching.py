"""How much do siblings gain from vLLM's prefix cache, and what do short prompts lose?

Samples groups with and without the cache, in turns, twice. Each round has new prompts, so only siblings share. CPU
seconds are those of vLLM's processes, which other load on the machine does not change, unlike rollouts/s. Prints a
table and writes results/prefix_caching.json.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from poise.generation.config import GenerationConfig, VllmConfig
from poise.generation.engine import EngineRequest
from poise.generation.engines.vllm.engine import VllmEngine
from poise.local.models.catalog import make_model
from poise_client.types import RolloutId, Sampling

HERE = Path(__file__).parent

SHAPES = ((400, 8), (400, 2), (60, 8))
"""Prompt tokens, rollouts of each."""

Shape = tuple[int, int]
Cost = tuple[float, float]
"""Wall-clock and CPU seconds of a rollout."""


def cpu_s() -> float:
    """Return the CPU seconds of vLLM's processes."""
    times = [process.cpu_times() for process in psutil.Process().children(recursive=True)]
    return sum(time.user + time.system for time in times)


async def measure(
    model: str, prefix_caching: bool, rounds: int, groups: int, max_tokens: int, seeds: itertools.count[int]
) -> dict[Shape, list[Cost]]:
    """Return the cost of each round by shape, without the first round."""
    vllm = VllmConfig(threads=1, prefix_caching=prefix_caching)
    engine = VllmEngine(GenerationConfig(model=model, max_model_len=1024, max_num_seqs=32, vllm=vllm))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from vLLM's imports
        await engine.start()
    costs: dict[Shape, list[Cost]] = {shape: [] for shape in SHAPES}
    try:
        for index, (num_prompt, num_rollouts) in itertools.product(range(rounds + 1), SHAPES):
            source = np.random.default_rng(next(seeds))
            prompts = [source.integers(1000, 40000, num_prompt).tolist() for _ in range(groups)]
            sampling = Sampling(max_tokens=max_tokens)
            started, started_cpu_s = time.monotonic(), cpu_s()
            await asyncio.gather(
                *(
                    engine.generate(EngineRequest(RolloutId("bench", 0, str(group), i), prompt, sampling))
                    for group, prompt in enumerate(prompts)
                    for i in range(num_rollouts)
                )
            )
            if index:
                total, total_cpu_s = time.monotonic() - started, cpu_s() - started_cpu_s
                num = groups * num_rollouts
                costs[num_prompt, num_rollouts].append((total / num, total_cpu_s / num))
    finally:
        await engine.stop()
    return costs


@click.command()
@click.option("--model", default="smollm2-135m-instruct", show_default=True, help="A model of `poise models`.")
@click.option("--rounds", default=3, show_default=True, help="Measured rounds of each shape.")
@click.option("--groups", default=2, show_default=True, help="Groups at once.")
@click.option("--max-tokens", default=8, show_default=True, help="Maximum response tokens.")
def main(model: str, rounds: int, groups: int, max_tokens: int) -> None:
    """Measure the gain of vLLM's prefix cache."""
    seeds = itertools.count()
    costs: dict[bool, dict[Shape, list[Cost]]] = {on: {shape: [] for shape in SHAPES} for on in (False, True)}
    for on in (False, True, True, False):
        measured = asyncio.run(measure(str(make_model(model)), on, rounds, groups, max_tokens, seeds))
        for shape in SHAPES:
            costs[on][shape] += measured[shape]
    table = Table("prompt tokens", "rollouts", "", "without", "with", "gain")
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        row: dict[str, Any] = {"prompt_tokens": shape[0], "rollouts": shape[1]}
        for name, part in (("s/rollout", 0), ("CPU s/rollout", 1)):
            without, with_cache = ([cost[part] for cost in costs[on][shape]] for on in (False, True))
            medians = statistics.median(without), statistics.median(with_cache)
            gain = medians[0] / medians[1]
            table.add_row(*map(str, shape), name, *(f"{median:.3f}" for median in medians), f"{gain:.2f}x")
            row[name] = {"without": without, "with": with_cache, "gain_of_medians": gain}
        rows.append(row)
    Console().print(table)
    figures = {
        f"cpu_gain_{row['prompt_tokens']}_tokens_{row['rollouts']}_rollouts": row["CPU s/rollout"]["gain_of_medians"]
        for row in rows
    }
    settings = {"model": model, "groups": groups, "max_tokens": max_tokens, "threads": 1}
    (HERE / "results/prefix_caching.json").write_text(
        json.dumps({"figures": figures, "settings": settings, "rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
