"""How do training, sampling and pushes of weights perform on a GPU?

Builds a Qwen3 with random weights and 0.6, 1.7 or 4 billion parameters, in bfloat16:

- The torch engine samples a few rollouts through the generation service. The learner's log-probabilities of them,
  before it is trained, are compared with the engine's.
- The learner takes steps on prompts of 100 to 400 tokens with two siblings each, whose responses have the lengths of
  reasoning models: as one process, and under torchrun with FSDP2 on `--processes` GPUs (one is enough).
- The new weights are pushed to the engine on the same GPU: whole and as a delta, over gRPC and through a shared file.
  The digests are compared. With a second GPU and vLLM, whole versions are also pushed by NCCL.

Engine and learner take turns on the GPU, each in its own process. Prints a table, and on a GPU writes
results/gpu_learner.json. `--device cpu --size tiny` only checks that the script runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from poise_client import AsyncGenerationClient, WeightPush, hash_weights
from poise_client.codec import dump_batch, load_batch
from poise_client.errors import PoiseClientError
from poise_client.types import Batch, Prompt, Rollout, RolloutId, Sampling, VersionSpan, WeightArray

HERE = Path(__file__).parent
LEARNING_RATE = 1e-6
START_S = 300.0
Weights = dict[str, WeightArray]


@dataclass(frozen=True)
class Size:
    """A shape of Qwen3, and the work to measure."""

    model: dict[str, int]
    vocabulary: int = 151936
    prompt_tokens: tuple[int, int] = (100, 400)
    response_tokens: tuple[int, int] = (1000, 4096)
    """Median and maximum."""
    micro_batch_tokens: int = 16384


def _qwen3(width: int, inner: int, layers: int, heads: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
    }


SIZES = {
    "tiny": Size({**_qwen3(64, 128, 2, 4), "num_key_value_heads": 2, "head_dim": 16}, 512, (10, 40), (50, 200), 1024),
    "0.6b": Size(_qwen3(1024, 3072, 28, 16)),
    "1.7b": Size(_qwen3(2048, 6144, 28, 16)),
    "4b": Size(_qwen3(2560, 9728, 36, 32), micro_batch_tokens=8192),
}


# ------------------------------------------------------------------------------------------------ the model, the work


def make_model(folder: Path, size: Size, device: str) -> None:
    """Write a model with random weights, and a tokenizer of its vocabulary."""
    import tokenizers
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=size.vocabulary,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        eos_token_id=0,
        **size.model,
    )
    with torch.device(device):
        model = transformers.Qwen3ForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    del model
    torch.cuda.empty_cache()  # leave the GPU to the other processes
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(size.vocabulary)}, unk_token="w1")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), eos_token="w0", clean_up_tokenization_spaces=False
    ).save_pretrained(folder)


def make_rollouts(size: Size, num_prompts: int, seed: int = 0) -> list[Rollout]:
    """Return pairs of siblings with log-normal lengths."""
    random = np.random.default_rng(seed)
    median, limit = size.response_tokens
    rollouts = []
    for group in range(num_prompts):
        prompt = random.integers(1, size.vocabulary, random.integers(*size.prompt_tokens)).astype(np.int32)
        for index in range(2):
            length = int(np.clip(random.lognormal(np.log(median), 0.8), 4, limit))
            rollouts.append(
                Rollout(
                    RolloutId("benchmark", 0, f"g{group}", index),
                    prompt,
                    random.integers(1, size.vocabulary, length).astype(np.int32),
                    np.full(length, -np.log(size.vocabulary), np.float32),  # about that of random weights
                    (VersionSpan(0, length, 0),),
                    advantage=float(random.normal()),
                )
            )
    return rollouts


# -------------------------------------------------------------------------------------------------------- the learner


def learn(folder: Path, size: Size, device: str, num_prompts: int, num_steps: int, *, checkpointing: bool) -> None:
    """Train, in one of as many processes as there are; the first writes the numbers, and two versions of weights."""
    import torch
    from torch.distributed.tensor import DTensor

    from poise.learner.config import LearnerConfig, OptimizerConfig
    from poise.learner.training.trainer import Trainer

    trainer = Trainer(
        LearnerConfig(
            model=str(folder / "model"),
            state_dir=folder / "state",
            dtype="bfloat16",
            device=device,
            mini_batch_prompts=num_prompts,
            micro_batch_tokens=size.micro_batch_tokens,
            gradient_checkpointing=checkpointing,
            optimizer=OptimizerConfig(learning_rate=LEARNING_RATE, warmup_updates=0),
        )
    )
    world = trainer.load()
    try:
        sampled = load_batch((folder / "sampled.pb").read_bytes())
        agreed = trainer.train(sampled.rollouts, sampled.temperature)
        rollouts = make_rollouts(size, num_prompts)
        trainer.train(rollouts, 1.0)  # warms up
        on_gpu = world.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        steps = [trainer.train(rollouts, 1.0) for _ in range(num_steps)]
        peak_bytes = (
            torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
        versions = [trainer.weights()]
        trainer.train(rollouts, 1.0)
        started_s = time.perf_counter()
        versions.append(trainer.weights())
        gather_s = time.perf_counter() - started_s
        sharded = any(isinstance(parameter, DTensor) for _, parameter in trainer.policy.trained())
        if world.rank > 0:
            return
        for number, weights in enumerate(versions, 1):
            save(weights, folder / f"version-{number}.safetensors")
        numbers = {
            "processes": world.size,
            "sharded": sharded,
            "parameters": sum(parameter.numel() for parameter in trainer.policy.model.parameters()),
            "mismatch_logprob": agreed.mismatch_logprob,
            "mismatch_kl": agreed.mismatch_kl,
            "loss": steps[0].loss,
            "gradient_norm": steps[0].gradient_norm,
            "model_tokens": steps[0].num_model_tokens,
            "step_s": statistics.median(step.train_s for step in steps),
            "tokens_per_s": statistics.median(step.tokens_per_s for step in steps),
            "mfu": statistics.median(step.mfu for step in steps),
            "peak_bytes": peak_bytes,
            "gather_s": gather_s,
        }
        (folder / "numbers.json").write_text(json.dumps(numbers))
    finally:
        trainer.close()


def run_learner(folder: Path, arguments: list[str], processes: int) -> dict[str, Any]:
    """Run `learn` in a process of its own, or under torchrun in `processes`."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes else []
    command = [sys.executable, *torchrun, __file__, f"--learn={folder}", *arguments]
    subprocess.run(command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    numbers: dict[str, Any] = json.loads((folder / "numbers.json").read_text())
    if numbers["sharded"] != bool(processes):
        raise SystemExit("FSDP2 was asked for and is not there, or the other way round")
    return {"name": f"FSDP2, {processes} GPU(s)" if processes else "alone", **numbers}


def save(weights: Weights, path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {name: torch.from_numpy(weight.array).view(torch.bfloat16) for name, weight in weights.items()}
    save_file(tensors, path)


def load(path: Path) -> Weights:
    import torch
    from safetensors.torch import load_file

    tensors = load_file(path)
    return {name: WeightArray(tensor.view(torch.uint16).numpy(), "bfloat16") for name, tensor in tensors.items()}


# --------------------------------------------------------------------------------------------------------- the engine


@contextlib.asynccontextmanager
async def engine(folder: Path, device: str) -> AsyncIterator[AsyncGenerationClient]:
    """Run a generation service with the torch engine, and yield a client once it is ready."""
    address = folder / "address.json"
    address.unlink(missing_ok=True)
    settings = {
        "model": str(folder / "model"),
        "engine": "torch",
        "dtype": "bfloat16",
        "torch": {"device": device},
        "nccl": True,
        "staging_dir": str(folder / "staging"),
        "shared_dirs": [str(folder / "shared")],
        "grpc": {"port": 0},
        "admin": {"port": 0},
    }
    (folder / "generation.yaml").write_text(json.dumps(settings))
    environment = os.environ | {"POISE_ADDRESS_FILE": str(address), "HF_HUB_OFFLINE": "1"}
    with (folder / "generation.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "poise.generation", "-c", str(folder / "generation.yaml")],
            env=environment, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        async with asyncio.timeout(START_S):
            while not address.exists():
                if process.poll() is not None:
                    raise SystemExit((folder / "generation.log").read_text()[-3000:])
                await asyncio.sleep(0.1)
        async with AsyncGenerationClient(json.loads(address.read_text())["grpc"], timeout_s=600) as client:
            async with asyncio.timeout(START_S):
                while not await is_ready(client):
                    if process.poll() is not None:
                        raise SystemExit((folder / "generation.log").read_text()[-3000:])
                    await asyncio.sleep(0.2)
            yield client
    finally:
        process.terminate()
        process.wait(60)


async def is_ready(client: AsyncGenerationClient) -> bool:
    try:
        return (await client.get_policy(timeout_s=5)).ready
    except PoiseClientError:
        return False


async def sample(folder: Path, size: Size, device: str, num_prompts: int, num_tokens: int) -> dict[str, float]:
    """Sample pairs of rollouts, and save them as a batch for the learner."""
    random = np.random.default_rng(1)
    prompts = [
        Prompt(f"s{i}", random.integers(1, size.vocabulary, size.prompt_tokens[0]).tolist()) for i in range(num_prompts)
    ]
    async with engine(folder, device) as client:

        async def draw(max_tokens: int) -> list[Rollout]:
            groups = client.stream_trajectories(
                "benchmark", 1, prompts, num_rollouts=2, sampling=Sampling(max_tokens=max_tokens, seed=0)
            )
            return [
                dataclasses.replace(rollout, advantage=1.0 - 2.0 * rollout.id.rollout_index)
                async for group in groups
                for rollout in group.rollouts
            ]  # fmt: skip

        await draw(2)  # warms up
        started_s = time.perf_counter()
        rollouts = await draw(num_tokens)
        took_s = time.perf_counter() - started_s
    (folder / "sampled.pb").write_bytes(dump_batch(Batch("benchmark", "sampled", 1, tuple(rollouts), 1.0)))
    num_sampled = sum(rollout.token_ids.size for rollout in rollouts)
    return {"tokens": num_sampled, "tokens_per_s": num_sampled / took_s}


def sending_device(device: str) -> str | None:
    """Return the device that sends to an engine on `device`, or None. Each NCCL member needs its own GPU."""
    import torch

    if not device.startswith("cuda"):
        return device
    return "cuda:1" if torch.cuda.device_count() > 1 else None


async def push(folder: Path, device: str, repeats: int) -> dict[str, Any]:
    """Push versions in turn, one whole and one as a delta, over gRPC and through a file."""
    from poise.learner.publishing.process_group import GroupSender
    from poise.learner.publishing.transports import SharedTransport
    from poise.runtime.network.broadcast_group import backend_of

    versions = [load(folder / f"version-{number}.safetensors") for number in (1, 2)]
    started_s = time.perf_counter()
    hashes = [hash_weights(weights) for weights in versions]
    hash_s = (time.perf_counter() - started_s) / len(versions)
    (folder / "shared").mkdir()
    transport = SharedTransport(folder / "shared")
    numbers = iter(range(1, 10**6))
    rows: dict[str, list[tuple[float, float, int]]] = {}

    async with engine(folder, device) as client:

        async def send(name: str, one: WeightPush, *, shared: bool) -> None:
            started_s = time.perf_counter()
            placed = await asyncio.to_thread(transport.place, one) if shared else one
            update = await client.push_weights(placed)
            took_s = time.perf_counter() - started_s
            if shared:
                transport.remove(placed)
            if (await client.get_policy()).digest != one.manifest.digest:
                raise SystemExit(f"after {name}, the engine serves other weights than those sent")
            rows.setdefault(name, []).append((took_s, update.pause_s, one.payload_bytes))

        def prepare(which: int, *, keep: bool) -> WeightPush:
            return WeightPush.prepare(
                "benchmark", next(numbers), versions[which], sha256_by_name=hashes[which], keep_as_base=keep
            )

        delta_s = []
        for _ in range(repeats):
            for way, shared in (("gRPC", False), ("shared file", True)):
                base = prepare(0, keep=True)
                await send(f"whole, {way}", base, shared=shared)
                started_s = time.perf_counter()
                delta = await asyncio.to_thread(prepare(1, keep=True).delta, base)
                delta_s.append(time.perf_counter() - started_s)
                if delta is None:
                    raise SystemExit("too much changed for a delta")
                await send(f"delta, {way}", delta, shared=shared)
        if (sending := sending_device(device)) is not None:
            sender = GroupSender(sending)
            for repeat in range(repeats + 1):
                one = prepare(0, keep=False)
                started_s = time.perf_counter()
                update = await sender.send(one, client, await client.get_policy(), 600)
                took_s = time.perf_counter() - started_s
                if (await client.get_policy()).digest != one.manifest.digest:
                    raise SystemExit("the engine serves other weights than those sent through the group")
                if repeat:  # the first one also forms the group
                    rows.setdefault(f"whole, {backend_of(sending)}", []).append(
                        (took_s, update.pause_s, one.payload_bytes)
                    )
            await sender.close()
    transport.close()
    return {
        "hash_s": hash_s,
        "make_delta_s": statistics.median(delta_s),
        "pushes": [
            {
                "name": name,
                "push_s": statistics.median(took_s for took_s, _, _ in values),
                "pause_s": statistics.median(pause_s for _, pause_s, _ in values),
                "bytes": values[0][2],
            }
            for name, values in rows.items()
        ],
    }


# ------------------------------------------------------------------------------------------------------------- report


def show(title: str, heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    table = Table(title=title)
    for head in heads:
        table.add_column(head, justify="right" if head else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)


def show_learners(learners: list[dict[str, Any]]) -> None:
    show(
        f"{learners[0]['parameters'] / 1e9:.2f} billion parameters, steps of {learners[0]['model_tokens']} tokens",
        ("", "step s", "tokens/s", "MFU", "peak GB", "weights to host s", "|Δlogprob| to the engine"),
        [
            (
                row["name"],
                f"{row['step_s']:.3f}",
                f"{row['tokens_per_s']:.0f}",
                f"{row['mfu']:.1%}" if row["mfu"] else "unknown",
                f"{row['peak_bytes'] / 1e9:.2f}",
                f"{row['gather_s']:.2f}",
                f"{row['mismatch_logprob']:.2e}",
            )
            for row in learners
        ],
    )


def show_pushes(result: dict[str, Any]) -> None:
    show(
        f"pushes to the torch engine; hashing {result['hash_s']:.2f} s, finding a delta {result['make_delta_s']:.2f} s",
        ("", "push s", "of it pause s", "MB"),
        [
            (row["name"], f"{row['push_s']:.3f}", f"{row['pause_s']:.4f}", f"{row['bytes'] / 1e6:.1f}")
            for row in result["pushes"]
        ],
    )


def machine(device: str) -> dict[str, object]:
    import torch
    import transformers

    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"
    return {"device": name, "torch": torch.__version__, "transformers": transformers.__version__}


@click.command()
@click.option("--size", type=click.Choice(list(SIZES)), default="1.7b", show_default=True, help="Shape of the model.")
@click.option("--device", default="cuda", show_default=True, help="A torch device.")
@click.option("--processes", default=1, show_default=True, help="GPUs for FSDP2.")
@click.option("--prompts", default=32, show_default=True, help="Prompts a step, two rollouts each.")
@click.option("--steps", default=3, show_default=True, help="Measured steps, after two warm-ups.")
@click.option("--repeats", default=3, show_default=True, help="Rounds of pushes.")
@click.option("--checkpointing/--no-checkpointing", default=True, show_default=True, help="Gradient checkpointing.")
@click.option("--learn", "folder", type=click.Path(path_type=Path), hidden=True)
def main(
    size: str, device: str, processes: int, prompts: int, steps: int, repeats: int, checkpointing: bool, folder: Path
) -> None:
    """Measure the learner, the engine and pushes on a GPU."""
    if folder is not None:
        learn(folder, SIZES[size], device, prompts, steps, checkpointing=checkpointing)
        return
    arguments = [f"--size={size}", f"--device={device}", f"--prompts={prompts}", f"--steps={steps}"]
    arguments.append("--checkpointing" if checkpointing else "--no-checkpointing")
    with tempfile.TemporaryDirectory(prefix="poise-benchmark-") as scratch:
        root = Path(scratch)
        make_model(root / "model", SIZES[size], device)
        sampled = asyncio.run(sample(root, SIZES[size], device, num_prompts=4, num_tokens=64))
        print(f"torch engine: {sampled['tokens_per_s']:.1f} tokens/s over {sampled['tokens']} tokens")
        learners = [run_learner(root, arguments, number) for number in (0, processes)]
        show_learners(learners)
        for number in ("loss", "gradient_norm"):
            if not np.isclose(learners[0][number], learners[1][number], rtol=0.02, atol=1e-4):
                raise SystemExit(f"FSDP2 computes another {number}")
        pushes = asyncio.run(push(root, device, repeats))
        show_pushes(pushes)
    by_name = {row["name"]: row for row in pushes["pushes"]}
    figures = {
        "tokens_per_s": learners[0]["tokens_per_s"],
        "mfu": learners[0]["mfu"],
        "peak_bytes": learners[0]["peak_bytes"],
        "fsdp2_speed_ratio": learners[1]["tokens_per_s"] / learners[0]["tokens_per_s"],
        "push_s": by_name["whole, gRPC"]["push_s"],
        "delta_push_s": by_name["delta, gRPC"]["push_s"],
        "mismatch_logprob": learners[0]["mismatch_logprob"],
    }
    if not device.startswith("cuda"):
        return
    path = HERE / "results/gpu_learner.json"
    path.parent.mkdir(exist_ok=True)
    result = {"figures": figures, "size": size, "engine": sampled, "learners": learners, **pushes}
    path.write_text(json.dumps(result | {"machine": machine(device)}, indent=2) + "\n")
    print(", ".join(f"{name} {value:.4g}" for name, value in figures.items()) + f": {path}")


if __name__ == "__main__":
    main()
