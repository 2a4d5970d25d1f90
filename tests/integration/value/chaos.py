"""Publishes labels while the value service and its Valkey are killed repeatedly, at any moment.

Each kill is aimed at a phase: a random moment after the service next begins to publish, consume, fit or checkpoint.
What it hit is what was going on at that moment.

What counts in the end is the durable state on disk, read without the service.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from tests.integration.value.service import TIMEOUT_S, Maker, ValueService, consumed, eventually

from poise.local.processes.valkey import valkey_command
from poise.value.dedup import groups_of
from poise.value.store import StateStore
from poise_client import AsyncValueClient
from poise_client.errors import PoiseClientError
from poise_client.types import Group

Victim = Literal["value", "valkey", "both"]
VICTIMS: tuple[Victim, ...] = get_args(Victim)
Phase = Literal["publish", "consume", "fit", "checkpoint"]
PHASES: tuple[Phase, ...] = get_args(Phase)
GROUPS_A_MESSAGE, MESSAGES_A_ROUND = 3, 6
WIDTH = 1024
"""Wide enough that fits and saves take their time."""
LONGEST_WAIT_S = 6.0
"""For the phase to begin; then the kill comes as it comes."""
LONGEST_DELAY_S: dict[Phase, float] = {"publish": 0.005, "consume": 0.05, "fit": 0.05, "checkpoint": 0.02}
"""From a phase's beginning to the kill: about as long as it takes."""

Name = tuple[str, int, str]
"""Run, step, group."""


@dataclass
class Outcome:
    """Of all rounds."""

    published: set[Name] = field(default_factory=set)
    """Labels whose publishing returned."""
    learnt: Counter[Name] = field(default_factory=Counter)
    """Labels in the windows of the durable state, and how often each is there."""
    consumed: set[Name] = field(default_factory=set)
    """Labels whose ids are in the durable state."""
    kills: Counter[Victim] = field(default_factory=Counter)
    hits: Counter[str] = field(default_factory=Counter)
    """Kills by what was going on at that moment; several things may be, or none ("idle")."""
    num_retries: int = 0
    """Messages published again because the answer was an error: their labels may be queued twice."""
    num_duplicates: int = 0
    """Queued copies that were recognised."""
    num_fits: int = 0

    @property
    def lost(self) -> set[Name]:
        return self.published - self.consumed

    @property
    def doubled(self) -> set[Name]:
        return {name for name, count in self.learnt.items() if count > 1}


class Valkey:
    """One server over all its lives."""

    def __init__(self, folder: Path) -> None:
        self._socket = folder / "sockets" / "valkey"
        self._command = valkey_command(self._socket, folder / "valkey")
        self._log = folder / "valkey.log"
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"unix://{self._socket}"

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(TIMEOUT_S)


async def run_chaos(folder: Path, num_rounds: int, seed: int) -> Outcome:
    """Publish in every round, and kill a victim in it; then let all come to rest and read the state."""
    source, outcome = random.Random(seed), Outcome()
    valkey = Valkey(folder)
    service = ValueService(folder, valkey.url, "queue.batch_entries=4", "probe.window_rows=100000")
    make = Maker()
    valkey.start()
    service.start()
    try:
        async with service.client() as client:
            for number in range(num_rounds):
                labels = [
                    [
                        make.label("chaos", number, make.question(f"{message}.{i}", width=WIDTH))
                        for i in range(GROUPS_A_MESSAGE)
                    ]
                    for message in range(MESSAGES_A_ROUND)
                ]
                victim, phase = source.choice(VICTIMS), PHASES[number % len(PHASES)]
                publishing = asyncio.create_task(_publish(client, labels, outcome))
                delay_s = source.uniform(0, LONGEST_DELAY_S[phase])
                outcome.hits.update(await service.ambush(phase, delay_s, victim != "valkey", LONGEST_WAIT_S))
                if victim != "valkey":
                    service.kill()
                if victim != "value":
                    valkey.kill()
                outcome.kills[victim] += 1
                await asyncio.sleep(source.uniform(0, 0.2))
                if victim != "value":
                    valkey.start()
                if victim != "valkey":
                    service.start()
                await publishing
            await service.ready()
            await consumed(client)
        assert service.process is not None
        service.process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(service.process.wait, TIMEOUT_S)
    finally:
        service.kill()
        valkey.kill()
    read_state(folder / "state", outcome)
    outcome.num_fits = len(service.record_file.read_text().splitlines()) if service.record_file.exists() else 0
    return outcome


async def _publish(client: AsyncValueClient, labels: list[list[Group]], outcome: Outcome) -> None:
    for message in labels:

        async def answered(message: list[Group] = message) -> bool:
            with contextlib.suppress(PoiseClientError):
                await client.publish_labels(message, timeout_s=2)
                return True
            outcome.num_retries += 1
            return False

        await eventually(answered, "labels are taken")
        outcome.published |= {(label.run_id, label.step, label.group_id) for label in message}


def read_state(folder: Path, outcome: Outcome) -> None:
    """Note what the durable state holds."""
    store = StateStore(folder)
    saved = store.open()
    store.close()
    assert saved is not None
    for domain in saved.domains:
        outcome.learnt.update((group.run_id, group.step, group.group_id) for group in domain.groups)
    outcome.consumed = {
        (run.run_id, step, group)
        for run in saved.consumed.runs
        for step, groups in run.steps.items()
        for group in groups_of(groups)
    }
    outcome.num_duplicates = saved.num_duplicates
