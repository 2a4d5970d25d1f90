"""What do features and token statistics cost in vLLM's throughput?

Two engines serve the same model with the same settings: ours, which records hidden states, log-probabilities, entropies
and sums of squared probabilities, and plain vLLM, which does none of it. Both sample the same prompts with the same
seeds, in pairs of turns; the engine that goes first alternates. While one engine works, the other's processes are
suspended. Halfway, both restart in the opposite order. CPU seconds are those of the engine's processes and of this one.
Other load on the machine changes them less than tokens/s.

The ratio of a pair is our throughput divided by plain vLLM's. The table shows the geometric mean of the medians in both
orders of start, with a 95 % interval from a bootstrap over pairs, because the engine that starts second can be faster.
A second table shows what each part costs by itself in a step, on one thread. Prints both and writes
results/feature_overhead.json.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import math
import statistics
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
import numpy as np
import psutil
import torch
from rich.console import Console
from rich.table import Table

from poise.generation.config import GenerationConfig, VllmConfig
from poise.generation.engine import EngineRequest
from poise.generation.engines.vllm.engine import VllmEngine
from poise.generation.engines.vllm.launch import import_vllm, num_slots, read_model, vllm_arguments
from poise.generation.engines.vllm.recorder import Recorder
from poise.generation.engines.vllm.think_tokens import think_close_table
from poise.generation.engines.vllm.token_statistics import TokenStatistics, scaled_logits
from poise.generation.prompts.tokenizer import Tokenizer
from poise.local.models.catalog import make_model
from poise_client.types import RolloutId, Sampling

HERE = Path(__file__).parent
CLOCKS = {"wall_s": "tokens/s", "cpu_s": "tokens / CPU s", "worker_cpu_s": "tokens / CPU s of the worker"}
PART_REPEATS = 100

Requests = list[tuple[list[int], Sampling]]
Responses = list[list[int]]


@dataclass(frozen=True)
class Turn:
    """What an engine needed for the requests of one turn."""

    num_tokens: int
    wall_s: float
    cpu_s: float
    worker_cpu_s: float


@dataclass(frozen=True)
class Pair:
    """The turns of both engines with the same requests."""

    ours: Turn
    plain: Turn
    num_same: int
    """Responses with the same tokens."""
    ours_started_first: bool

    def ratio(self, clock: str) -> float:
        """Return our throughput divided by plain vLLM's."""
        ours, plain = (turn.num_tokens / getattr(turn, clock) for turn in (self.ours, self.plain))
        return ours / plain


class SuspendedEngine:
    """An engine whose processes run only during its turns."""

    def __init__(self, processes: set[psutil.Process], sample: Callable[[Requests], Awaitable[Responses]]) -> None:
        self._processes = processes
        self._sample = sample
        self._suspend()

    async def turn(self, requests: Requests) -> tuple[Turn, Responses]:
        """Sample a response to each request, all at once."""
        self.resume()
        before = self._clocks()
        responses = await self._sample(requests)
        turn = Turn(
            sum(map(len, responses)), *(after - start for after, start in zip(self._clocks(), before, strict=True))
        )
        self._suspend()
        return turn, responses

    def resume(self) -> None:
        """Let the processes run."""
        for process in self._processes:
            process.resume()

    def _suspend(self) -> None:
        for process in self._processes:
            process.suspend()

    def _clocks(self) -> tuple[float, float, float]:
        times = [process.cpu_times() for process in self._processes]
        cpu_s = [one.user + one.system for one in times]
        return time.monotonic(), sum(cpu_s) + time.process_time(), max(cpu_s)


@contextlib.asynccontextmanager
async def our_engine(config: GenerationConfig) -> AsyncIterator[SuspendedEngine]:
    """Start our engine; stop it at the end."""
    others = children()
    engine = VllmEngine(config)
    await engine.start()

    async def sample(requests: Requests) -> Responses:
        rollouts = await asyncio.gather(
            *(
                engine.generate(EngineRequest(RolloutId("bench", 0, "g", index), prompt, sampling))
                for index, (prompt, sampling) in enumerate(requests)
            )
        )
        return [rollout.token_ids.tolist() for rollout in rollouts]

    suspended = SuspendedEngine(children() - others, sample)
    try:
        yield suspended
    finally:
        suspended.resume()
        await engine.stop()


@contextlib.asynccontextmanager
async def plain_engine(config: GenerationConfig) -> AsyncIterator[SuspendedEngine]:
    """Start vLLM with our settings and its own worker and scheduler; stop it at the end."""
    import_vllm(config)
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.inputs import tokens_input
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    others = children()
    arguments = AsyncEngineArgs(**vllm_arguments(config, read_model(config)))
    llm = await asyncio.to_thread(AsyncLLM.from_engine_args, arguments)
    stop_token_ids = sorted(Tokenizer.load(config.model).stop_token_ids)
    request_ids = itertools.count()

    async def generate(prompt: list[int], sampling: Sampling) -> list[int]:
        params = SamplingParams(
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            seed=sampling.seed,
            stop_token_ids=stop_token_ids,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        token_ids: list[int] = []
        async for output in llm.generate(tokens_input(prompt), params, request_id=f"plain-{next(request_ids)}"):
            token_ids += output.outputs[0].token_ids
        return token_ids

    async def sample(requests: Requests) -> Responses:
        return await asyncio.gather(*(generate(*request) for request in requests))

    suspended = SuspendedEngine(children() - others, sample)
    try:
        yield suspended
    finally:
        suspended.resume()
        if llm.output_handler is not None:
            llm.output_handler.cancel()  # else it reports the shutdown as an error
        await asyncio.to_thread(llm.shutdown, 10.0)


def children() -> set[psutil.Process]:
    """Return all child processes of this one."""
    return set(psutil.Process().children(recursive=True))


def random_requests(seed: int, num_rollouts: int, num_prompt: int, max_tokens: int) -> Requests:
    """Return random prompts with their sampling parameters."""
    source = np.random.default_rng(seed)
    sampling = Sampling(max_tokens=max_tokens)
    return [
        (source.integers(1000, 40000, num_prompt).tolist(), replace(sampling, seed=1000 * seed + index))
        for index in range(num_rollouts)
    ]


async def measure(config: GenerationConfig, pairs: int, num_prompt: int, max_tokens: int) -> list[Pair]:
    """Return the pairs. Each engine starts first in one half of them, because that changes its memory."""
    measured = []
    for start_ours_first in (False, True):
        async with contextlib.AsyncExitStack() as stack:
            if start_ours_first:
                ours = await stack.enter_async_context(our_engine(config))
                plain = await stack.enter_async_context(plain_engine(config))
            else:
                plain = await stack.enter_async_context(plain_engine(config))
                ours = await stack.enter_async_context(our_engine(config))
            for index in range(-1, math.ceil(pairs / 2)):
                seed = len(measured)
                requests = random_requests(seed, config.max_num_seqs, num_prompt, max_tokens)
                results = {}
                for engine in (ours, plain) if index % 2 else (plain, ours):
                    results[engine] = await engine.turn(requests)
                (our_turn, our_responses), (plain_turn, plain_responses) = results[ours], results[plain]
                num_same = sum(mine == theirs for mine, theirs in zip(our_responses, plain_responses, strict=True))
                pair = Pair(our_turn, plain_turn, num_same, start_ours_first)
                if index >= 0:  # the first pair warms up
                    measured.append(pair)
                    click.echo(
                        f"pair {len(measured)}: " + ", ".join(f"{CLOCKS[c]} {pair.ratio(c):.3f}" for c in CLOCKS)
                    )
    return measured


def measure_parts(config: GenerationConfig, num_prompt: int, max_tokens: int) -> dict[str, float]:
    """Return the CPU milliseconds that each part of recording takes in a step, by itself and on one thread."""
    torch.set_num_threads(1)
    info, num = read_model(config).info, config.max_num_seqs
    recorder = Recorder(
        num_slots=num_slots(config),
        response_pool_tokens=config.response_pool_tokens,
        hidden_size=info.hidden_size,
        max_model_len=info.max_model_len,
        think_table_SV=torch.from_numpy(think_close_table([""] * info.vocabulary_size)),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    names, once = [str(index) for index in range(num)], np.ones(num, np.int64)
    for name in names:
        recorder.open(name, name, num_prompt, config.prompt_pool_tokens)
    prompt_states = torch.randn(num * num_prompt, info.hidden_size)
    recorder.record_hidden(
        names, 0 * once, num_prompt * once, torch.zeros(len(prompt_states), dtype=torch.int32), prompt_states
    )
    states = torch.randn(num, info.hidden_size)
    logits = torch.randn(num, info.vocabulary_size)
    tokens = torch.randint(info.vocabulary_size, (num,), dtype=torch.int32)
    temperature = torch.ones(num)
    statistics_of = TokenStatistics(logits.clone())

    def collect() -> None:
        """Collect all rollouts once every `max_tokens` steps."""
        for name in names:
            recorder.collect(name, max_tokens, max_tokens - 11, max_tokens - 1)

    positions = itertools.count(num_prompt)
    scratch = logits.clone()
    with torch.inference_mode():
        parts = {
            "hidden states": cpu_ms(
                lambda: recorder.record_hidden(names, next(positions) * once, once, tokens, states)
            ),
            "copy of the logits": cpu_ms(lambda: scaled_logits(logits, temperature, 1e-5)),
            "softmax and log-probabilities": cpu_ms(lambda: TokenStatistics(scratch).logprobs(tokens)),
            "entropies": cpu_ms(statistics_of.entropies),
            "Σπ²": cpu_ms(statistics_of.sum_squared_probs),
        }
        started = time.thread_time()
        collect()
        parts["collecting, spread over the steps"] = 1e3 * (time.thread_time() - started) / max_tokens
    return parts


def cpu_ms(part: Callable[[], object]) -> float:
    """Return the median CPU milliseconds of a call."""
    taken_s = []
    for _ in range(PART_REPEATS):
        started = time.thread_time()
        part()
        taken_s.append(time.thread_time() - started)
    return 1e3 * statistics.median(taken_s)


def ratio_with_interval(pairs: Sequence[Pair], clock: str) -> tuple[float, float, float]:
    """Return the geometric mean of the median ratios in both orders of start, and its 95 % interval."""
    source = np.random.default_rng(0)
    medians, draws = [], []
    for is_first in (False, True):
        ratios = np.array([pair.ratio(clock) for pair in pairs if pair.ours_started_first == is_first])
        medians.append(float(np.median(ratios)))
        draws.append(np.median(source.choice(ratios, (10000, len(ratios))), axis=1))
    low, high = np.percentile(np.sqrt(draws[0] * draws[1]), (2.5, 97.5))
    return math.sqrt(medians[0] * medians[1]), float(low), float(high)


@click.command()
@click.option("--model", default="smollm2-135m-instruct", show_default=True, help="A model of `poise models`.")
@click.option("--pairs", default=10, show_default=True, help="Measured pairs of turns.")
@click.option("--rollouts", default=32, show_default=True, help="Rollouts of a turn, all at once.")
@click.option("--prompt-tokens", default=60, show_default=True, help="Tokens of each prompt.")
@click.option("--max-tokens", default=64, show_default=True, help="Maximum response tokens.")
@click.option("--threads", default=2, show_default=True, help="Threads of vLLM's worker.")
@click.option("--save/--no-save", default=True, show_default=True, help="Write the results.")
def main(model: str, pairs: int, rollouts: int, prompt_tokens: int, max_tokens: int, threads: int, save: bool) -> None:
    """Compare our vLLM engine with plain vLLM."""
    warnings.simplefilter("ignore")  # from vLLM's imports
    logging.getLogger("vllm").setLevel(logging.ERROR)
    config = GenerationConfig(
        model=str(make_model(model)),
        dtype="float32",
        max_model_len=1024,
        max_num_seqs=rollouts,
        vllm=VllmConfig(threads=threads),
    )
    measured = asyncio.run(measure(config, pairs, prompt_tokens, max_tokens))
    parts = measure_parts(config, prompt_tokens, max_tokens)

    table = Table("", "ours", "plain vLLM", "ratio", "95 % interval")
    figures: dict[str, float] = {}
    for clock, title in CLOCKS.items():
        ours, plain = (
            statistics.median(turn.num_tokens / getattr(turn, clock) for turn in turns)
            for turns in ([pair.ours for pair in measured], [pair.plain for pair in measured])
        )
        ratio, low, high = ratio_with_interval(measured, clock)
        table.add_row(title, f"{ours:.1f}", f"{plain:.1f}", f"{ratio:.3f}", f"{low:.3f} to {high:.3f}")
        name = clock.removesuffix("_s")
        figures |= {f"{name}_ratio": ratio, f"{name}_ratio_low": low, f"{name}_ratio_high": high}
    console = Console()
    console.print(table)

    step_ms = 1e3 * statistics.median(pair.plain.worker_cpu_s for pair in measured) / max_tokens
    part_table = Table("part of recording", "CPU ms a step", "% of plain vLLM's step")
    for part, part_ms in parts.items():
        part_table.add_row(part, f"{part_ms:.3f}", f"{100 * part_ms / step_ms:.2f}")
    console.print(part_table)
    same = sum(pair.num_same for pair in measured)
    console.print(f"{same} of {len(measured) * rollouts} responses have the same tokens.")
    if save:
        settings = {
            "model": model,
            "rollouts": rollouts,
            "prompt_tokens": prompt_tokens,
            "max_tokens": max_tokens,
            "threads": threads,
        }
        result = {
            "figures": figures,
            "settings": settings,
            "parts_cpu_ms_per_step": parts,
            "plain_worker_cpu_ms_per_step": step_ms,
            "same_responses": same / (len(measured) * rollouts),
            "pairs": [asdict(pair) for pair in measured],
        }
        (HERE / "results/feature_overhead.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
