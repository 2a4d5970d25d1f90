"""Losing any rank restarts all of them, and training ends with the same weights."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from tests.integration.learner.nodes import DEADLINE_S, Nodes
from tests.unit.learner.batches import make_batch, make_config

from poise_client.types import StepResult

TIMEOUT_S = 6.0
NUM_BATCHES = 3
SETTINGS = {"rank_timeout_s": TIMEOUT_S, "checkpoint_every_steps": 2, "micro_batch_tokens": 24}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def make_nodes(model: Path, folder: Path, *, num_nodes: int = 2) -> Nodes:
    return Nodes(make_config(model, folder / "state", **SETTINGS), folder, num_nodes=num_nodes)


async def submit(nodes: Nodes, step: int) -> StepResult:
    return await nodes.ask(lambda client: client.submit_advantages(make_batch(step)))


async def digest(nodes: Nodes) -> bytes:
    return (await nodes.ask(lambda client: client.get_status())).digest


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The digest of the weights after all batches, without losing a rank."""

    async def run() -> bytes:
        async with make_nodes(model, tmp_path_factory.mktemp("undisturbed")).running() as nodes:
            for step in range(NUM_BATCHES):
                await submit(nodes, step)
            return await digest(nodes)

    return asyncio.run(run())


def kill(nodes: Nodes, rank: int) -> None:
    os.kill(nodes.pid(rank), signal.SIGKILL)


def stop(nodes: Nodes, rank: int) -> None:
    os.kill(nodes.pid(rank), signal.SIGSTOP)


def hang(nodes: Nodes, rank: int) -> None:
    os.kill(nodes.pid(rank), signal.SIGUSR1)


async def lose_while_idle(nodes: Nodes, lose: Callable[[Nodes, int], None], rank: int) -> None:
    before = list(nodes.num_starts)
    lose(nodes, rank)
    await nodes.restarted(before)


async def lose_while_training(nodes: Nodes, lose: Callable[[Nodes, int], None], rank: int, step: int) -> None:
    before = list(nodes.num_starts)
    training = nodes.flag(f"training-{rank}")
    training.unlink(missing_ok=True)
    # Unless the lost rank hangs itself, the other one does, so that both are training when the rank is lost.
    waits = nodes.flag(f"hang-{rank if lose is hang else 1 - rank}")
    waits.touch()
    submitting: Awaitable[StepResult] = asyncio.create_task(submit(nodes, step))
    async with asyncio.timeout(DEADLINE_S):
        while waits.exists() or not training.exists():
            await asyncio.sleep(0.01)
    if lose is not hang:
        lose(nodes, rank)
    await nodes.restarted(before)
    await submitting


@pytest.mark.parametrize(
    ("lose", "idle_rank", "training_rank"),
    [(kill, 0, 1), (stop, 1, 0), (hang, 1, 0)],  # each loss at each rank, and each rank both idle and training
)
async def test_losing_a_rank_restarts_all(
    model: Path,
    tmp_path: Path,
    undisturbed: bytes,
    lose: Callable[[Nodes, int], None],
    idle_rank: int,
    training_rank: int,
) -> None:
    async with make_nodes(model, tmp_path).running() as nodes:
        await submit(nodes, 0)

        await lose_while_idle(nodes, lose, idle_rank)
        await submit(nodes, 1)
        await lose_while_training(nodes, lose, training_rank, 2)

        assert await digest(nodes) == undisturbed, nodes.log()


async def test_batch_that_fails_on_a_follower_is_rejected(model: Path, tmp_path: Path) -> None:
    async with make_nodes(model, tmp_path).running() as nodes:
        await submit(nodes, 0)
        nodes.flag("fail-1").write_text("1")

        refused = await submit(nodes, 1)
        nodes.flag("fail-1").unlink()
        trained = await nodes.ask(lambda client: client.submit_advantages(make_batch(2, version=1)))

    assert {reason for _, reason in refused.rejected} == {"failed"}, nodes.log()
    assert not trained.rejected
    assert "rank 1 failed: no memory left" in nodes.log()


async def test_stopped_rank_of_one_torchrun_is_killed(model: Path, tmp_path: Path, undisturbed: bytes) -> None:
    async with make_nodes(model, tmp_path, num_nodes=1).running() as nodes:
        for step in range(NUM_BATCHES):
            await submit(nodes, step)

        for rank in (0, 1):
            await lose_while_idle(nodes, stop, rank)

            assert await digest(nodes) == undisturbed, nodes.log()


async def test_stop_signal_to_a_follower_drains_all(model: Path, tmp_path: Path, undisturbed: bytes) -> None:
    async with make_nodes(model, tmp_path).running() as nodes:
        await submit(nodes, 0)
        before = list(nodes.num_starts)

        os.kill(nodes.pid(1), signal.SIGTERM)
        await nodes.restarted(before)

        log = nodes.log()
        assert "a rank of the learner received a stop signal: the learner drains" in log
        assert "sent no heartbeat" not in log
        assert (await nodes.ask(lambda client: client.get_status())).checkpoint_version == 1
        for step in (1, 2):
            await submit(nodes, step)
        assert await digest(nodes) == undisturbed, nodes.log()
