"""Publishes labels while the value service and its Valkey are killed repeatedly, at any moment.

Each kill is aimed at a phase: a random moment after the service next begins to publish, consume, fit or checkpoint.
`hits` counts the phases in progress at that moment.

The result is the durable state on disk, read without the service.
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
from poise_client.types import Estimator, Group

Victim = Literal["value", "valkey", "both"]
VICTIMS: tuple[Victim, ...] = get_args(Victim)
Phase = Literal["publish", "consume", "fit", "checkpoint"]
PHASES: tuple[Phase, ...] = get_args(Phase)
GROUPS_A_MESSAGE, MESSAGES_A_ROUND = 3, 6
WIDTH = 1024
"""Wide enough that fits and saves take measurable time."""
LONGEST_WAIT_S = 6.0
"""Maximum wait for the phase to begin, s. After that, the kill is at a random moment."""
LONGEST_DELAY_S: dict[Phase, float] = {"publish": 0.005, "consume": 0.05, "fit": 0.05, "checkpoint": 0.02}
"""Maximum time from the start of a phase to the kill: about the duration of the phase."""

Name = tuple[str, int, str]
"""Run, step, group."""


@dataclass
class Outcome:
    """Result of all rounds."""

    published: set[Name] = field(default_factory=set)
    """Labels that were published successfully."""
    learnt: Counter[Name] = field(default_factory=Counter)
    """Number of copies of each label in the windows of the durable state."""
    consumed: set[Name] = field(default_factory=set)
    """Labels whose ids are in the durable state."""
    kills: Counter[Victim] = field(default_factory=Counter)
    hits: Counter[str] = field(default_factory=Counter)
    """Kills by the phase in progress: several phases, or none ("idle")."""
    num_retries: int = 0
    """Messages published again after an error, so their labels may be queued twice."""
    num_duplicates: int = 0
    """Queued copies that were recognised as duplicates."""
    num_fits: int = 0

    @property
    def lost(self) -> set[Name]:
        return self.published - self.consumed

    @property
    def doubled(self) -> set[Name]:
        return {name for name, count in self.learnt.items() if count > 1}


class Valkey:
    """One server across restarts."""

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


async def run_chaos(folder: Path, num_rounds: int, seed: int, estimator: Estimator = "probe") -> Outcome:
    """Publish and kill a victim in every round; then wait until all labels are consumed, and read the state.

    Score-weighted estimators get groups of one rollout.
    """
    source, outcome = random.Random(seed), Outcome()
    valkey = Valkey(folder)
    service = ValueService(
        folder, valkey.url, "queue.batch_entries=4", "probe.window_rows=100000", f"estimator={estimator}"
    )
    make, num_rollouts = Maker(), 2 if estimator == "probe" else 1
    valkey.start()
    service.start()
    try:
        async with service.client() as client:
            for number in range(num_rounds):
                labels = [
                    [
                        make.label("chaos", number, make.query(f"{message}.{i}", width=WIDTH, n=num_rollouts))
                        for i in range(GROUPS_A_MESSAGE)
                    ]
                    for message in range(MESSAGES_A_ROUND)
                ]
                victim, phase = source.choice(VICTIMS), PHASES[number % len(PHASES)]
                publishing = asyncio.create_task(_publish(client, labels, outcome))
                delay_s = source.uniform(0, LONGEST_DELAY_S[phase])
                outcome.hits.update(await service.interrupt(phase, delay_s, victim != "valkey", LONGEST_WAIT_S))
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
    """Record the content of the durable state in `outcome`."""
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
