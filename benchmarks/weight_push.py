"""What does it cost to bring a new policy version to a generation replica?

Pushes SmolLM2-135M in bfloat16, 269 MB, to a replica in another process of this machine:

- a push over gRPC, compared with bare gRPC streaming of the same bytes in the same chunks; and a push through a
  shared file, compared with copying that file. The replica receives, checks every byte and stages; its engine does
  nothing.
- the pause of sampling while rollouts run, as a share of a whole push, with the torch engine and with vLLM.
- the bytes of a delta, for real updates by the learner's own trainer at the reference learning rate, on the model's
  own rollouts. A version is one update, or eight: a reference step of 256 prompts in mini-batches of 32.

The contenders of a comparison take turns; ratios are of medians. Prints tables and writes results/weight_push.json.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import click
import grpc.aio
import numpy as np
from prometheus_client import CollectorRegistry
from rich.console import Console
from rich.table import Table

from poise.generation.app import GenerationApp, build
from poise.generation.config import GenerationConfig, TorchConfig, VllmConfig
from poise.generation.engine import EngineInfo
from poise.learner.config import LearnerConfig, OptimizerConfig
from poise.learner.publishing.transports import SharedTransport
from poise.runtime.network.auth import BearerAuth
from poise.runtime.rpc.interceptors import ServiceInterceptor
from poise_client import AsyncGenerationClient, WeightPush, hash_weights
from poise_client.types import Prompt, Rollout, RolloutId, Sampling, VersionSpan, WeightArray

HERE = Path(__file__).parent
BARE = "/bare.Sink/Swallow"
LEARNING_RATE = 1e-6
UPDATES_A_STEP = 8
Weights = dict[str, WeightArray]


# ---------------------------------------------------------------------------------------------- the other process


class NoEngine:
    """An engine that accepts any weights at once."""

    info = EngineInfo("torch", "none", 1, 1, 0, 1, 1)
    process_group_backend = ""

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def is_alive(self) -> bool:
        return True

    async def update_weights(self, weights: Path, policy_version: int) -> float:
        return 0.0


async def swallow(requests: AsyncIterator[bytes], context: object) -> bytes:
    num_bytes = 0
    async for data in requests:
        num_bytes += len(data)
    return str(num_bytes).encode()


async def serve(engine: str, model: str, folder: Path) -> None:
    config = GenerationConfig(
        model=model,
        engine="vllm" if engine == "vllm" else "torch",
        dtype="float32",  # the fastest type on a CPU
        max_model_len=512,
        max_num_seqs=4,
        staging_dir=folder / "staging",
        shared_dirs=(folder / "shared",),
        torch=TorchConfig(threads=1),
        vllm=VllmConfig(threads=1),
    )
    app = GenerationApp(config, NoEngine()) if engine == "none" else build(config)  # type: ignore[arg-type]
    server = grpc.aio.server(
        interceptors=[ServiceInterceptor("generation", BearerAuth(None), CollectorRegistry(), 64)],
    )
    app.register(server)
    bare = grpc.aio.server()
    bare.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("bare.Sink", {"Swallow": grpc.stream_unary_rpc_method_handler(swallow)}),)
    )
    ports = [one.add_insecure_port("127.0.0.1:0") for one in (server, bare)]
    await app.start()
    for one in (server, bare):
        await one.start()
    print(json.dumps(ports), flush=True)
    await asyncio.to_thread(sys.stdin.read)  # until the parent is done, or gone
    await server.stop(None)
    await app.stop()


@contextlib.contextmanager
def replica(engine: str, model: str, folder: Path) -> Iterator[tuple[str, str]]:
    """Run a replica; yield its address, and that of the bare sink beside it."""
    command = [sys.executable, __file__, "--serve", engine, "--model", model, "--folder", str(folder)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "GRPC_VERBOSITY": "NONE"}
    with (folder / f"{engine}.log").open("w") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment, text=True
        )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith("["):
                break
        else:
            raise SystemExit((folder / f"{engine}.log").read_text()[-3000:])
        yield tuple(f"127.0.0.1:{port}" for port in json.loads(line))  # type: ignore[misc]
    finally:
        process.stdin.close()
        process.wait(60)


# ------------------------------------------------------------------------------------------------------- transport


async def timed(work: Callable[[], Awaitable[Any]]) -> float:
    started_s = time.perf_counter()
    await work()
    return time.perf_counter() - started_s


async def stream_bare(channel: grpc.aio.Channel, push: WeightPush) -> None:
    """Send the same chunks as a push does, and nothing else."""
    call = channel.stream_unary(BARE)
    assert int(await call(data for data in push._chunks(2**20))) == push.payload_bytes


async def measure_transport(
    addresses: tuple[str, str], weights: Weights, changed: Weights, folder: Path, repeats: int
) -> dict[str, float]:
    hash_s = [await timed(lambda: asyncio.to_thread(hash_weights, weights)) for _ in range(3)]
    hashes, changed_hashes = hash_weights(weights), hash_weights(changed)
    numbers = iter(range(1, 10**9))

    def prepared(which: Weights = weights, *, keep: bool = False) -> WeightPush:
        known = hashes if which is weights else changed_hashes
        return WeightPush.prepare("lineage", next(numbers), which, sha256_by_name=known, keep_as_base=keep)

    transport = SharedTransport(folder / "shared")
    source = folder / "shared" / "source"
    source.write_bytes(b"".join(prepared().file_parts()))
    times: dict[str, list[float]] = {
        name: [] for name in ("bare", "grpc", "copy", "shared", "make_delta", "delta", "delta_shared")
    }
    async with (
        AsyncGenerationClient(addresses[0]) as client,
        grpc.aio.insecure_channel(addresses[1]) as channel,
    ):

        async def share(push: WeightPush) -> None:
            placed = await asyncio.to_thread(transport.place, push)
            await client.push_weights(placed)
            transport.remove(placed)

        async def make_delta() -> None:
            nonlocal delta
            delta = await asyncio.to_thread(new.delta, base)

        for repeat in range(repeats + 1):
            round_s = {
                "bare": await timed(lambda: stream_bare(channel, prepared())),
                "grpc": await timed(lambda: client.push_weights(prepared())),
                "copy": await timed(lambda: asyncio.to_thread(shutil.copyfile, source, folder / "shared" / "copy")),
                "shared": await timed(lambda: share(prepared())),
            }
            (folder / "shared" / "copy").unlink()
            delta: WeightPush | None = None
            for kind, send in (("delta", client.push_weights), ("delta_shared", share)):
                base = prepared(keep=True)
                await client.push_weights(base)
                new = prepared(changed)
                round_s["make_delta"] = await timed(make_delta)
                assert delta is not None
                round_s[kind] = await timed(lambda send=send, delta=delta: send(delta))  # type: ignore[misc]
            if repeat:  # the first of all warms up
                for name, value in round_s.items():
                    times[name].append(value)
    transport.close()
    result = {f"{name}_s": statistics.median(values) for name, values in times.items()}
    result["hash_s"] = statistics.median(hash_s)
    result["bytes"] = prepared().payload_bytes
    return result


# ----------------------------------------------------------------------------------------------------------- pause


async def measure_pause(address: str, weights: Weights, repeats: int) -> dict[str, float]:
    """Push while four rollouts run; return how long they stood still, and how long the push took."""
    pause_s, push_s = [], []
    hashes = hash_weights(weights)
    prompts = [Prompt(f"g{i}", f"Once upon a time there were {i} kings") for i in range(4)]

    async def sample(client: AsyncGenerationClient) -> None:
        groups = client.stream_trajectories("run", 0, prompts, num_rollouts=1, sampling=Sampling(max_tokens=480))
        async with contextlib.aclosing(groups):
            async for _ in groups:
                pass

    async with AsyncGenerationClient(address, timeout_s=600) as client:
        for version in range(1, repeats + 2):
            sampling = asyncio.create_task(sample(client))
            while (await client.get_policy()).num_running < len(prompts):
                await asyncio.sleep(0.05)
            await asyncio.sleep(1.0)  # the prompts are through
            push = WeightPush.prepare("lineage", version, weights, sha256_by_name=hashes)
            started_s = time.perf_counter()
            update = await client.push_weights(push)
            took_s = time.perf_counter() - started_s
            assert (await client.get_policy()).num_running > 0, "the rollouts ended before the push did"
            sampling.cancel()
            await asyncio.gather(sampling, return_exceptions=True)
            if version > 1:
                pause_s.append(update.pause_s)
                push_s.append(took_s)
    return {
        "pause_s": statistics.median(pause_s),
        "push_s": statistics.median(push_s),
        "share": statistics.median(pause / push for pause, push in zip(pause_s, push_s, strict=True)),
    }


# ----------------------------------------------------------------------------------------------------------- deltas


def sample_rollouts(model: Any, tokenizer: Any, step: int, num_prompts: int) -> list[Rollout]:
    """Pairs of short answers to easy questions, sampled at temperature 1, with their log-probabilities."""
    import torch

    from poise.orchestrator.tasks.primer import SKILLS, draw

    source = random.Random(step)
    problems = [draw(tuple(SKILLS), True, "primer", source) for _ in range(num_prompts)]
    texts = [
        tokenizer.apply_chat_template(problem.prompt, tokenize=False, add_generation_prompt=True)
        for problem in problems
    ]
    inputs = tokenizer([text for text in texts for _ in range(2)], return_tensors="pt", padding=True)
    with torch.inference_mode():
        output = model.generate(
            **inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=16,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    start = inputs.input_ids.shape[1]
    logprobs = torch.stack(output.logits, 1).float().log_softmax(-1)
    rewards, rollouts = [], []
    for row, sequence in enumerate(output.sequences):
        tokens = sequence[start:].tolist()
        ends = [i for i, token in enumerate(tokens) if token == tokenizer.eos_token_id]
        tokens = tokens[: ends[0] + 1] if ends else tokens
        rewards.append(float(problems[row // 2].answer in tokenizer.decode(tokens, skip_special_tokens=True)))
        taken = [float(logprobs[row, i, token]) for i, token in enumerate(tokens)]
        prompt = inputs.input_ids[row][inputs.attention_mask[row].bool()].numpy().astype(np.int32)
        rollouts.append((row, prompt, np.array(tokens, np.int32), np.array(taken, np.float32)))
    mean = float(np.mean(rewards))
    return [
        Rollout(
            RolloutId("run", step, f"g{row // 2}", row % 2),
            prompt, tokens, taken, (VersionSpan(0, len(tokens), 0),), advantage=rewards[row] - mean,
        )
        for row, prompt, tokens, taken in rollouts
    ]  # fmt: skip


def measure_deltas(folder: str, state_dir: Path, num_updates: int, prompts: int) -> tuple[dict[str, Any], Weights]:
    """Train, and return the sizes of deltas between versions and the weights after the first update."""
    import torch
    import transformers

    from poise.learner.training.trainer import Trainer

    config = LearnerConfig(
        model=folder,
        state_dir=state_dir,
        dtype="bfloat16",
        mini_batch_prompts=prompts,
        optimizer=OptimizerConfig(learning_rate=LEARNING_RATE, warmup_updates=0),
    )
    trainer = Trainer(config)
    trainer.load()
    sampler = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    pushes = [WeightPush.prepare("lineage", 0, trainer.weights())]
    first: Weights = {}
    by_update, by_step, num_even = [], [], 0
    for update in range(1, num_updates + 1):
        with torch.no_grad():
            for parameter, trained in zip(sampler.parameters(), trainer.policy.model.parameters(), strict=True):
                parameter.copy_(trained)
        rollouts = sample_rollouts(sampler, tokenizer, update, prompts)
        num_even += all(rollout.advantage == 0 for rollout in rollouts)
        trainer.train(rollouts, 1.0)
        weights = trainer.weights()
        first = first or weights
        pushes.append(WeightPush.prepare("lineage", update, weights))
        by_update.append(share_of(pushes[-1], pushes[-2]))
        if update % UPDATES_A_STEP == 0:
            by_step.append(share_of(pushes[-1], pushes[0]))
            pushes = pushes[-1:]
    total = sum(int(np.prod(tensor.shape)) for tensor in pushes[-1].manifest.tensors)
    return {
        "num_updates": num_updates,
        "updates_without_a_signal": num_even,
        "changed_share_an_update": statistics.median(changed / total for changed, _ in by_update),
        "changed_share_a_step": statistics.median(changed / total for changed, _ in by_step),
        "ratio_an_update": statistics.median(ratio for _, ratio in by_update),
        "ratio_a_step": statistics.median(ratio for _, ratio in by_step),
        "ratios_an_update": [ratio for _, ratio in by_update],
        "ratios_a_step": [ratio for _, ratio in by_step],
    }, first


def share_of(new: WeightPush, base: WeightPush) -> tuple[int, float]:
    """Return the changed elements, and the bytes of the delta relative to the whole version, manifests included."""
    delta = new.delta(base)
    if delta is None:
        raise SystemExit("too much changed for a delta")
    sizes = [push.manifest.ByteSize() + push.payload_bytes for push in (delta, new)]
    return sum(tensor.num_changed for tensor in delta.manifest.tensors), sizes[0] / sizes[1]


# ----------------------------------------------------------------------------------------------------------- report


def show(title: str, rows: list[tuple[str, str]]) -> None:
    table = Table(title=title, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for row in rows:
        table.add_row(*row)
    Console(width=110).print(table)


def load_weights(model: str) -> Weights:
    """Return the parameters of a model in bfloat16."""
    import torch
    import transformers

    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    return {
        name: WeightArray(parameter.detach().view(torch.uint16).numpy(), "bfloat16")
        for name, parameter in loaded.named_parameters()
    }


def measure_all(model: str, folder: Path, repeats: int, updates: int, prompts: int, *, vllm: bool) -> dict[str, Any]:
    (folder / "shared").mkdir()
    deltas, changed = measure_deltas(model, folder / "state", updates, prompts)
    show(
        f"deltas of {updates} real updates at a learning rate of {LEARNING_RATE:g}",
        [
            ("elements changed by an update", f"{deltas['changed_share_an_update']:.2%}"),
            (f"by {UPDATES_A_STEP} updates", f"{deltas['changed_share_a_step']:.2%}"),
            ("bytes of a delta over those of everything, an update", f"{deltas['ratio_an_update']:.2%}"),
            (f"{UPDATES_A_STEP} updates", f"{deltas['ratio_a_step']:.2%}"),
        ],
    )
    weights = load_weights(model)
    with replica("none", model, folder) as addresses:
        transport = asyncio.run(measure_transport(addresses, weights, changed, folder, repeats))
    size = transport["bytes"]
    names = {
        "bare": "bare gRPC stream",
        "grpc": "push over gRPC",
        "copy": "copy of a file",
        "shared": "push through a file",
        "make_delta": "finding what changed in an update",
        "delta": "push of it over gRPC",
        "delta_shared": "push of it through a file",
        "hash": "hashing, once a version",
    }
    show(
        f"{size / 1e6:.0f} MB to a replica",
        [
            (text, f"{transport[f'{name}_s']:.3f} s  {size / 1e6 / transport[f'{name}_s']:6.0f} MB/s")
            for name, text in names.items()
        ],
    )
    pauses = {}
    for engine in ("torch", "vllm") if vllm else ("torch",):
        with replica(engine, model, folder) as addresses:
            pauses[engine] = asyncio.run(measure_pause(addresses[0], weights, max(3, repeats // 2)))
    show(
        "sampling stood still, in a push of everything over gRPC with four rollouts running",
        [
            (engine, f"{pause['pause_s']:.4f} s of {pause['push_s']:.3f} s, {pause['share']:.1%}")
            for engine, pause in pauses.items()
        ],
    )
    return {
        "figures": {
            "grpc_vs_bare": transport["bare_s"] / transport["grpc_s"],
            "shared_vs_copy": transport["copy_s"] / transport["shared_s"],
            "pause_share": pauses["torch"]["share"],
            **({"pause_share_vllm": pauses["vllm"]["share"]} if vllm else {}),
            "delta_bytes_ratio": deltas["ratio_an_update"],
            "delta_bytes_ratio_a_step": deltas["ratio_a_step"],
        },
        "transport": transport,
        "pauses": pauses,
        "deltas": deltas,
        "machine": {"cpu_count": os.cpu_count(), "python": platform.python_version(), "grpc": grpc.__version__},
    }


@click.command()
@click.option("--model", default="", help="Hugging Face folder; SmolLM2-135M by default.")
@click.option("--repeats", default=7, show_default=True, help="Rounds of each comparison.")
@click.option("--updates", default=16, show_default=True, help="Real updates, a multiple of eight.")
@click.option("--prompts", default=4, show_default=True, help="Prompts an update, two rollouts each.")
@click.option("--vllm/--no-vllm", default=True, show_default=True, help="Also measure the pause of vLLM.")
@click.option("--serve", "engine", default="", hidden=True)
@click.option("--folder", type=click.Path(path_type=Path), hidden=True)
def main(model: str, repeats: int, updates: int, prompts: int, vllm: bool, engine: str, folder: Path | None) -> None:
    """Measure what a push of weights costs."""
    if engine:
        assert folder is not None
        asyncio.run(serve(engine, model, folder))
        return
    if not model:
        from poise.local.models.catalog import make_model

        model = str(make_model("smollm2-135m-instruct"))
    shared_memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="poise-benchmark-", dir=shared_memory) as scratch:
        result = measure_all(model, Path(scratch), repeats, updates, prompts, vllm=vllm)
    path = HERE / "results/weight_push.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(", ".join(f"{name} {value:.4g}" for name, value in result["figures"].items()) + f": {path}")


if __name__ == "__main__":
    main()
