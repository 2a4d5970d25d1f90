"""A real process, killed at any point and restarted, ends with the weights of an undisturbed one."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pytest
from tests.integration.learner.crashing_learner import POINTS
from tests.support.forking import ForkedProgram
from tests.unit.learner.batches import make_batch, make_config, rewarded

from poise.learner.core import LearnerCore
from poise_client import AsyncLearnerClient, RetryPolicy
from poise_client.errors import PoiseClientError
from poise_client.types import Batch, StepResult

SCRIPT = Path(__file__).with_name("crashing_learner.py")
NUM_BATCHES = 4
CASES: dict[str, dict[str, object]] = {
    "alone": {},
    "with a critic": {"critic": {"learning_rate": 1e-3, "warmup_updates": 0}},
}
DEADLINE_S = 240.0


class Learner:
    """A learner process, over several restarts."""

    def __init__(self, model: Path, folder: Path, **changes: object) -> None:
        self.folder = folder
        settings = make_config(model, folder / "state", checkpoint_every_steps=2, **changes).model_dump(mode="json")
        settings |= {"grpc": {"port": 0}, "admin": {"port": 0}}
        (folder / "learner.yaml").write_text(json.dumps(settings))
        self.process: ForkedProgram | None = None

    def start(self, point: str) -> None:
        (self.folder / "address.json").unlink(missing_ok=True)
        environment = os.environ | {"POISE_ADDRESS_FILE": str(self.folder / "address.json"), "OMP_NUM_THREADS": "1"}
        arguments = [point, "-c", str(self.folder / "learner.yaml")]
        self.process = ForkedProgram(str(SCRIPT), arguments, environment, self.folder / "log")

    async def submit(self, batch: Batch) -> StepResult:
        """Submit until answered; restart the process if it dies."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                assert self.process is not None
                if self.process.poll() is not None:
                    assert self.process.returncode == -9, (self.folder / "log").read_text()[-3000:]
                    self.start("nowhere")
                try:
                    address = json.loads((self.folder / "address.json").read_text())["grpc"]
                    async with AsyncLearnerClient(address, retries=RetryPolicy(max_attempts=1)) as client:
                        return await client.submit_advantages(batch)
                except (PoiseClientError, FileNotFoundError):
                    await asyncio.sleep(0.1)


def batch_of(case: str, step: int) -> Batch:
    return rewarded(make_batch(step)) if "critic" in CASES[case] else make_batch(step)


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Digest of the last version without any failure."""
    digests = {}
    for case, changes in CASES.items():
        core = LearnerCore(make_config(model, tmp_path_factory.mktemp("undisturbed"), **changes))
        core.recover()
        for step in range(NUM_BATCHES):
            core.submit(batch_of(case, step))
        assert core.published is not None
        digests[case] = core.published.digest
        core.close()
    return digests


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("point", [point for point in POINTS if point != "nowhere"])
async def test_killed_learner_ends_with_the_undisturbed_weights(
    model: Path, tmp_path: Path, expected: dict[str, bytes], point: str, case: str
) -> None:
    learner = Learner(model, tmp_path, **CASES[case])
    learner.start(point)
    first = learner.process
    assert first is not None
    try:
        for step in range(NUM_BATCHES):
            result = await learner.submit(batch_of(case, step))
            assert result.policy_version == step + 1
            assert not result.rejected
        assert first.poll() == -9, "it was not killed"
        address = json.loads((tmp_path / "address.json").read_text())["grpc"]
        async with AsyncLearnerClient(address) as client:
            status = await client.get_status()
        assert status.digest == expected[case]
        assert status.num_rollouts == 6 * NUM_BATCHES
    finally:
        assert learner.process is not None
        learner.process.kill()
        learner.process.wait(DEADLINE_S)
