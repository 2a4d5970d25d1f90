"""How much faster does the learner train than a plain transformers loop with AdamW, and in how much less memory?

Both take the same optimizer step on the same rollouts with the same loss: SmolLM2-135M's architecture with random
weights, in float32, pairs of siblings whose response lengths vary as widely as those of reasoning models. The plain
loop follows the documentation of transformers and torch: eight rollouts at a time, padded to the longest, logits for
all tokens, log_softmax, gather, clipped ratios, backward, fused AdamW (the plain one is slower and needs more
memory). It computes no entropies and no other metrics; the learner does.

Each contender runs in its own process, and they take steps in turn. Memory is the peak resident set after the first
step began, minus the resident set after loading: gradients, AdamW's moments and all temporary tensors. Losses and
gradient norms must agree. Prints a table and writes results/learner_throughput.json.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from poise_client.types import Rollout, RolloutId, VersionSpan

HERE = Path(__file__).parent
VOCABULARY = 49152
LEARNING_RATE = 1e-6


@dataclass(frozen=True)
class Contender:
    """One way to train."""

    name: str
    plain_rollouts: int = 0
    """Rollouts that the plain loop pads together; 0 for the learner."""
    micro_batch_tokens: int = 0
    gradient_checkpointing: bool = False


PLAIN = Contender("plain, 8 rollouts at a time", plain_rollouts=8)
LEARNER = Contender("learner", micro_batch_tokens=2048, gradient_checkpointing=True)
CONTENDERS = (
    PLAIN,
    Contender("plain, 2 rollouts at a time", plain_rollouts=2),
    LEARNER,
    Contender("learner, no checkpointing", micro_batch_tokens=1024),
)


def make_rollouts(num_prompts: int, num_siblings: int, seed: int = 0) -> list[Rollout]:
    """Prompts of 40 to 160 tokens; log-normal response lengths with a median of 60, cut at 320."""
    random = np.random.default_rng(seed)
    rollouts = []
    for group in range(num_prompts):
        prompt = random.integers(0, VOCABULARY, random.integers(40, 161)).astype(np.int32)
        for index in range(num_siblings):
            length = int(np.clip(random.lognormal(np.log(60), 0.9), 4, 320))
            rollouts.append(
                Rollout(
                    RolloutId("benchmark", 0, f"g{group}", index),
                    prompt,
                    random.integers(0, VOCABULARY, length).astype(np.int32),
                    np.full(length, -np.log(VOCABULARY), np.float32),  # about that of random weights
                    (VersionSpan(0, length, 0),),
                    advantage=float(random.normal()),
                )
            )
    return rollouts


def plain_step(folder: str, rollouts: Sequence[Rollout], at_a_time: int) -> Callable[[], dict[str, float]]:
    """Load a model, and return a function that takes one step."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=True)
    num_tokens = sum(rollout.token_ids.size for rollout in rollouts)

    def step() -> dict[str, float]:
        optimizer.zero_grad()
        total = 0.0
        for start in range(0, len(rollouts), at_a_time):
            part = rollouts[start : start + at_a_time]
            longest = max(r.prompt_token_ids.size + r.token_ids.size for r in part)
            ids = torch.zeros(len(part), longest, dtype=torch.int64)
            seen, trained = torch.zeros_like(ids), torch.zeros(len(part), longest, dtype=torch.bool)
            old, advantages = torch.zeros(len(part), longest), torch.zeros(len(part), 1)
            for i, r in enumerate(part):
                num_prompt, num_all = r.prompt_token_ids.size, r.prompt_token_ids.size + r.token_ids.size
                ids[i, :num_all] = torch.from_numpy(np.concatenate([r.prompt_token_ids, r.token_ids]))
                seen[i, :num_all] = 1
                trained[i, num_prompt:num_all] = True
                old[i, num_prompt:num_all] = torch.from_numpy(r.logprobs)
                advantages[i] = r.advantage
            logits = model(input_ids=ids, attention_mask=seen).logits[:, :-1]
            logprobs = torch.log_softmax(logits, -1).gather(-1, ids[:, 1:, None])[..., 0]
            ratios = torch.exp(logprobs - old[:, 1:])
            losses = torch.maximum(-advantages * ratios, -advantages * ratios.clamp(0.8, 1.28))
            loss = losses[trained[:, 1:]].sum() / num_tokens
            loss.backward()
            total += float(loss.detach())
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
        return {"loss": total, "gradient_norm": norm}

    return step


def learner_step(folder: str, rollouts: Sequence[Rollout], contender: Contender) -> Callable[[], dict[str, float]]:
    """Load the learner's trainer, and return a function that takes one step."""
    from poise.learner.config import LearnerConfig, OptimizerConfig
    from poise.learner.training.trainer import Trainer

    trainer = Trainer(
        LearnerConfig(
            model=folder,
            state_dir=Path(folder) / "state",
            mini_batch_prompts=len(rollouts),
            micro_batch_tokens=contender.micro_batch_tokens,
            gradient_checkpointing=contender.gradient_checkpointing,
            optimizer=OptimizerConfig(learning_rate=LEARNING_RATE, warmup_updates=0),
        )
    )
    trainer.load()

    def step() -> dict[str, float]:
        metrics = trainer.train(rollouts, 1.0)
        return {"loss": metrics.loss, "gradient_norm": metrics.gradient_norm}

    return step


def worker(folder: str, contender: Contender, num_prompts: int, num_siblings: int) -> None:
    """Load and print a line; then take a step for each input line, and print its numbers."""
    rollouts = make_rollouts(num_prompts, num_siblings)
    if contender.plain_rollouts:
        step = plain_step(folder, rollouts, contender.plain_rollouts)
    else:
        step = learner_step(folder, rollouts, contender)
    loaded_bytes = memory_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak, to exclude loading
    print("{}", flush=True)
    for _ in sys.stdin:
        started_s = time.perf_counter()
        numbers = step()
        took_s = time.perf_counter() - started_s
        print(json.dumps(numbers | {"took_s": took_s, "bytes": memory_bytes("VmHWM") - loaded_bytes}), flush=True)


def memory_bytes(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


class Worker:
    """A contender's process."""

    def __init__(self, contender: Contender, arguments: Sequence[str]) -> None:
        self.contender = contender
        self.answers: list[dict[str, float]] = []
        command = [sys.executable, __file__, "--worker", json.dumps(asdict(contender)), *arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._read()

    def step(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.answers.append(self._read())

    def close(self) -> None:
        self.process.communicate()

    def _read(self) -> dict[str, float]:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())  # type: ignore[no-any-return]

    def row(self, num_tokens: int) -> dict[str, Any]:
        took_s = statistics.median(answer["took_s"] for answer in self.answers[1:])
        return asdict(self.contender) | {
            "step_s": took_s,
            "tokens_per_s": num_tokens / took_s,
            "peak_bytes": max(answer["bytes"] for answer in self.answers),
            "loss": self.answers[0]["loss"],
            "gradient_norm": self.answers[0]["gradient_norm"],
        }


def make_model(folder: str) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        rope_theta=100000.0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def measure(num_prompts: int, num_siblings: int, num_steps: int) -> list[dict[str, Any]]:
    rollouts = make_rollouts(num_prompts, num_siblings)
    num_tokens = sum(r.prompt_token_ids.size + r.token_ids.size for r in rollouts)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        make_model(folder)
        arguments = [f"--folder={folder}", f"--prompts={num_prompts}", f"--siblings={num_siblings}"]
        workers = []
        for contender in CONTENDERS:
            workers.append(Worker(contender, arguments))
            stack.callback(workers[-1].close)
        for _ in range(1 + num_steps):  # the first step creates AdamW's moments
            for one in workers:
                one.step()
        return [one.row(num_tokens) for one in workers]


def show(rows: list[dict[str, Any]], title: str) -> None:
    table = Table(title=title)
    for head in ("", "step s", "tokens/s", "peak MB", "loss", "gradient norm"):
        table.add_column(head, justify="left" if not head else "right")
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['step_s']:.2f}",
            f"{row['tokens_per_s']:.0f}",
            f"{row['peak_bytes'] / 1e6:.0f}",
            f"{row['loss']:.6f}",
            f"{row['gradient_norm']:.5f}",
        )
    Console(width=120).print(table)


def machine() -> dict[str, object]:
    import torch
    import transformers

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return {
        "processor": next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), platform.processor()),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


@click.command()
@click.option("--prompts", default=12, show_default=True, help="Prompts of the batch.")
@click.option("--siblings", default=2, show_default=True, help="Rollouts a prompt.")
@click.option("--steps", default=3, show_default=True, help="Measured steps, after one warm-up.")
@click.option("--worker", "contender", hidden=True)
@click.option("--folder", hidden=True)
def main(prompts: int, siblings: int, steps: int, contender: str | None, folder: str) -> None:
    """Compare the learner with a plain loop."""
    if contender is not None:
        worker(folder, Contender(**json.loads(contender)), prompts, siblings)
        return
    rows = measure(prompts, siblings, steps)
    rollouts = make_rollouts(prompts, siblings)
    lengths = [r.prompt_token_ids.size + r.token_ids.size for r in rollouts]
    title = f"{len(rollouts)} rollouts of {min(lengths)} to {max(lengths)} tokens, {sum(lengths)} in all"
    show(rows, title)
    by_name = {row["name"]: row for row in rows}
    plain, learner = by_name[PLAIN.name], by_name[LEARNER.name]
    for row in rows:
        for number in ("loss", "gradient_norm"):
            if not np.isclose(row[number], plain[number], rtol=1e-3):
                raise SystemExit(f"{row['name']} computes another {number}: {row[number]} for {plain[number]}")
    figures = {
        "speedup": plain["step_s"] / learner["step_s"],
        "memory_ratio": learner["peak_bytes"] / plain["peak_bytes"],
    }
    path = HERE / "results/learner_throughput.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"figures": figures, "machine": machine(), "rows": rows}, indent=2) + "\n")
    print(f"speedup {figures['speedup']:.2f}, memory_ratio {figures['memory_ratio']:.2f}: {path}")


if __name__ == "__main__":
    main()
