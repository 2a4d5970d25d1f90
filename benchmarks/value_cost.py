"""What does a rollout of 1,000 tokens cost in the value service, with each estimator?

A value service in its own process gets the labels of some steps, then estimates the baselines of further rollouts and
learns their labels. For each estimator:

- processor time of the service per rollout, in microseconds: of an estimate, and of learning a label. Learning includes
  publishing to Valkey, consuming, fits and saves;
- bytes on the wire per rollout: of the request and the answer of an estimate, and of a label;
- seconds of the last fit.

Hidden states are `--width` wide. The probe and `score_prompt` get them; the others get statistics of tokens only. The
probe needs groups of two; the others get groups of one. Prints a table and writes results/value_cost.json.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table
from value_process import ValueProcess

from poise_client import AsyncValueClient
from poise_client.codec import encode
from poise_client.types import EntropyStats, Features, Group, Rollout, RolloutId
from poise_proto.v1 import value_pb2 as pb

HERE = Path(__file__).parent
ESTIMATORS = ("probe", "score_mean", "score_prefix", "score_prompt", "auto")
NUM_EARLIER, NUM_MEASURED, ROLLOUTS_A_STEP = 20, 40, 64


class Source:
    """Random rollouts. Rewards depend on the prompt's hidden state."""

    def __init__(self, estimator: str, width: int, num_tokens: int) -> None:
        self._random = np.random.default_rng(0)
        self._width = width if estimator in ("probe", "score_prompt", "auto") else 0
        self._has_tokens, self._num_tokens = estimator != "probe", num_tokens
        self._group_size = 2 if estimator == "probe" else 1

    def step(self, step: int) -> list[Group]:
        names = (f"g{index:03d}" for index in range(ROLLOUTS_A_STEP // self._group_size))
        return [self._group(step, name) for name in names]

    def _group(self, step: int, name: str) -> Group:
        random = self._random
        prompt = random.standard_normal(self._width, np.float32)
        rollouts = []
        for index in range(self._group_size):
            response = random.standard_normal(self._width if self._group_size > 1 else 0, np.float32)
            features = (
                Features(prompt, response, EntropyStats(*random.random(4).tolist())) if self._width else Features()
            )
            rollouts.append(self._rollout(RolloutId("benchmark", step, name, index), features))
        return Group(name, tuple(rollouts), prompt_id=name)

    def _rollout(self, rollout_id: RolloutId, features: Features) -> Rollout:
        reward = float(self._random.random() < 0.5)
        if not self._has_tokens:
            return Rollout(rollout_id, features=features, reward=reward)
        probabilities = self._random.beta(4, 1, self._num_tokens)
        return Rollout(
            rollout_id,
            features=features,
            reward=reward,
            logprobs=np.log(probabilities).astype(np.float32),
            token_entropies=(-np.log(probabilities) * 1.5).astype(np.float16),
            sum_squared_probs=(probabilities**2 + 0.5 * (1 - probabilities) ** 2).astype(np.float16),
        )


async def measure(folder: Path, estimator: str, width: int, num_tokens: int) -> dict[str, float]:
    source = Source(estimator, width, num_tokens)
    settings: dict[str, Any] = {"probe": {"warmup_steps": 1}}
    if estimator != "probe":
        settings["estimator"] = estimator
    with ValueProcess(folder / estimator, settings) as service:
        async with AsyncValueClient(service.address) as client:
            for step in range(NUM_EARLIER):
                await client.publish_labels(source.step(step))
            await _learnt(client)
            estimate_s = learn_s = 0.0
            bytes_of = {"request": 0, "answer": 0, "label": 0}
            for step in range(NUM_EARLIER, NUM_EARLIER + NUM_MEASURED):
                groups = source.step(step)
                before = service.processor_s()
                answers = await client.estimate_baselines("benchmark", step, groups)
                estimated = service.processor_s()
                await client.publish_labels(groups)
                await _learnt(client)
                estimate_s += estimated - before
                learn_s += service.processor_s() - estimated
                bytes_of["request"] += sum(encode(group, pb.GroupFeatures).ByteSize() for group in groups)
                bytes_of["answer"] += sum(encode(answer, pb.GroupBaselines).ByteSize() for answer in answers)
                bytes_of["label"] += sum(encode(group, pb.LabelledGroup).ByteSize() for group in groups)
                if any(answer.values is None for answer in answers):
                    raise click.ClickException(f"{estimator}: some groups got no baselines")
            (probe,) = (await client.get_probe()).probes
    num_rollouts = NUM_MEASURED * ROLLOUTS_A_STEP
    return {
        "estimate_us": 1e6 * estimate_s / num_rollouts,
        "learn_us": 1e6 * learn_s / num_rollouts,
        **{f"{name}_bytes": number / num_rollouts for name, number in bytes_of.items()},
        "last_fit_ms": 1e3 * probe.last_fit_s,
    }


async def _learnt(client: AsyncValueClient) -> None:
    """Wait until all labels are consumed and fitted."""
    while True:
        report = await client.get_probe()
        if not report.num_pending and report.probes and report.probes[0].probe_version:
            await asyncio.sleep(0.3)  # the fit after the last label
            return
        await asyncio.sleep(0.02)


@click.command()
@click.option("--width", default=2560, show_default=True, help="Width of the hidden states.")
@click.option("--tokens", default=1000, show_default=True, help="Tokens of a rollout.")
@click.option("--estimator", "estimators", multiple=True, type=click.Choice(ESTIMATORS), default=ESTIMATORS)
@click.option("--out", type=click.Path(path_type=Path), default=HERE / "results" / "value_cost.json")
def main(width: int, tokens: int, estimators: tuple[str, ...], out: Path) -> None:
    """Measure the cost of a rollout with each estimator."""
    results = {}
    with tempfile.TemporaryDirectory(prefix="poise-benchmark-") as folder:
        for estimator in estimators:
            results[estimator] = asyncio.run(measure(Path(folder), estimator, width, tokens))
            click.echo(f"{estimator}: {results[estimator]}", err=True)
    table = Table(title=f"per rollout of {tokens} tokens, width {width}")
    table.add_column("")
    for column in next(iter(results.values())):
        table.add_column(column.replace("_", " "), justify="right")
    for estimator, row in results.items():
        table.add_row(estimator, *(f"{value:,.0f}" for value in row.values()))
    Console().print(table)
    figures = {f"{estimator}_{name}": value for estimator, row in results.items() for name, value in row.items()}
    settings = {"width": width, "tokens": tokens, "rollouts_a_step": ROLLOUTS_A_STEP}
    out.write_text(json.dumps({"figures": figures, "settings": settings}, indent=1) + "\n")


if __name__ == "__main__":
    main()
