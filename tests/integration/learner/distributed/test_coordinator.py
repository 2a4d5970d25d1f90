"""Two ranks under torchrun train like one process."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tests.support.forking import ForkedProgram
from tests.unit.learner.batches import make_batch, make_config, rewarded

from poise.learner import __main__ as learner_main
from poise.learner.core import LearnerCore
from poise_client import AsyncLearnerClient, RetryPolicy
from poise_client.errors import PoiseClientError
from poise_client.types import Batch, StepResult

DEADLINE_S = 240.0
RECOMPUTED = {"policy": "cispo", "aggregation": "constant", "normalizer_tokens": 16, "old_logprobs": "recompute"}
CASES: dict[str, dict[str, object]] = {
    "ppo": {"loss": {"policy": "ppo"}},
    "critic": {
        "loss": RECOMPUTED,
        "critic": {"learning_rate": 1e-3, "warmup_updates": 0, "value_clip": 0.05},
        "measure_gradient_variance": True,
        "micro_batch_tokens": 13,  # rows in some halves divide by two, in others not
    },
    "adapters": {
        "loss": {"policy": "gspo", "aggregation": "sequence_mean", "kl_coefficient": 0.1},
        "lora": {"rank": 4, "alpha": 8},
    },
}
"""The three ratios, the three means, both kinds of old log-probabilities, a KL, a critic, the variance, and LoRA."""
COMPARED = ("loss", "entropy", "gradient_norm", "mismatch_kl", "reference_kl", "clip_share")
COMPARED += ("value_loss", "explained_variance", "critic_gradient_norm", "gradient_variance")
SETTINGS = {
    "mini_batch_prompts": 2,
    "micro_batch_tokens": 24,  # rows that do not divide by two
    "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.0},
    "checkpoint_every_steps": 2,
    "gradient_checkpointing": True,
}


class TwoRanks:
    """A learner with two ranks, over several restarts."""

    def __init__(self, model: Path, folder: Path, *, is_forked: bool = True, **changes: object) -> None:
        self.folder, self._is_forked = folder, is_forked
        settings = make_config(model, folder / "state", **(SETTINGS | changes)).model_dump(mode="json")
        (folder / "learner.yaml").write_text(json.dumps(settings | {"grpc": {"port": 0}, "admin": {"port": 0}}))
        self.process: subprocess.Popen[bytes] | ForkedProgram | None = None

    def start(self) -> None:
        (self.folder / "address.json").unlink(missing_ok=True)
        environment = os.environ | {"POISE_ADDRESS_FILE": str(self.folder / "address.json"), "OMP_NUM_THREADS": "1"}
        options, settings = ["--standalone", "--nproc-per-node=2"], ["-c", str(self.folder / "learner.yaml")]
        log = self.folder / "log"
        if self._is_forked:
            options += ["--run-path", "--start-method=fork", learner_main.__file__]
            self.process = ForkedProgram("torch.distributed.run", [*options, *settings], environment, log)
        else:
            command = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "poise.learner", *settings]
            with log.open("ab") as output:
                self.process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)

    async def ask(self, question: Callable[[AsyncLearnerClient], object]) -> object:
        async with asyncio.timeout(DEADLINE_S):
            while True:
                assert self.process is not None
                assert self.process.poll() is None, (self.folder / "log").read_text()[-3000:]
                try:
                    address = json.loads((self.folder / "address.json").read_text())["grpc"]
                    async with AsyncLearnerClient(address, retries=RetryPolicy(max_attempts=1)) as client:
                        return await question(client)  # type: ignore[misc]
                except (PoiseClientError, FileNotFoundError):
                    await asyncio.sleep(0.1)

    async def submit(self, batch: Batch) -> StepResult:
        answer = await self.ask(lambda client: client.submit_advantages(batch))
        assert isinstance(answer, StepResult)
        return answer

    async def stop(self) -> None:
        """Drain. Ignore torchrun's own exit status: it exits with a traceback at a signal."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(self.process.wait, DEADLINE_S)
        assert "learner: stopped" in (self.folder / "log").read_text()


@asynccontextmanager
async def started(ranks: TwoRanks) -> AsyncIterator[TwoRanks]:
    ranks.start()
    try:
        yield ranks
    finally:
        assert ranks.process is not None
        if ranks.process.poll() is None:
            await ranks.stop()


@pytest.fixture
def alone(model: Path, tmp_path: Path) -> Iterator[Callable[..., LearnerCore]]:
    """Makes learners with one process."""
    made: list[LearnerCore] = []

    def make(**changes: object) -> LearnerCore:
        core = LearnerCore(make_config(model, tmp_path / f"alone-{len(made)}", **(SETTINGS | changes)))
        core.recover()
        made.append(core)
        return core

    yield make
    for core in made:
        core.close()


def weights_of(exported: str | Path) -> dict[str, np.ndarray]:
    return load_file(Path(exported) / "model.safetensors")


@pytest.mark.parametrize("case", CASES)
async def test_two_ranks_train_like_one_over_a_restart(
    alone: Callable[..., LearnerCore], model: Path, tmp_path: Path, case: str
) -> None:
    one = alone(**CASES[case])
    start = weights_of(model)
    async with started(TwoRanks(model, tmp_path, is_forked=case != "ppo", **CASES[case])) as ranks:
        for step in range(3):
            if step == 2 and case != "ppo":  # the critic's state holds the policy's
                await ranks.stop()
                ranks.start()
            batch = rewarded(make_batch(step)) if case == "critic" else make_batch(step)
            mine, theirs = (await ranks.submit(batch)).metrics, one.submit(batch)[0].metrics
            for name in COMPARED:
                assert getattr(mine, name) == pytest.approx(getattr(theirs, name), rel=1e-4, abs=1e-6), name
            assert (mine.num_tokens, mine.num_updates) == (theirs.num_tokens, theirs.num_updates)
            assert mine.num_model_tokens == theirs.num_model_tokens
        exported = await ranks.ask(lambda client: client.export_model("mine"))
        mine_after, theirs_after = weights_of(exported.path), weights_of(one.export("theirs").path)  # type: ignore[attr-defined]
    assert mine_after.keys() == theirs_after.keys()
    for name, values in theirs_after.items():
        difference = np.abs(mine_after[name] - values)
        assert np.quantile(difference, 0.99) < 2e-6, name
        assert case == "adapters" or np.abs(values - start[name]).max() > 5e-4, name
    assert any(np.abs(values - start[name]).max() > 1e-5 for name, values in theirs_after.items())


def test_one_rank_under_torchrun_trains_like_without(
    alone: Callable[..., LearnerCore], monkeypatch: pytest.MonkeyPatch
) -> None:
    without = alone()
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "TORCHELASTIC_RUN_ID": "one",
    }.items():
        monkeypatch.setenv(name, value)
    sharded = alone()
    assert torch.distributed.is_initialized()
    for step in range(2):
        mine, theirs = (core.submit(make_batch(step))[0].metrics for core in (sharded, without))
        assert (mine.loss, mine.gradient_norm) == pytest.approx((theirs.loss, theirs.gradient_norm), rel=1e-4)
    assert list(sharded.checkpoint().parent.glob("checkpoint-*"))
    mine_after, theirs_after = (weights_of(core.export("mine").path) for core in (sharded, without))
    for name, values in theirs_after.items():
        assert np.quantile(np.abs(mine_after[name] - values), 0.99) < 2e-6, name
