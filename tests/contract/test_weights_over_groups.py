"""One suite for every engine that receives pushes through a process group. On a CPU, the group uses gloo."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import warnings
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from safetensors.torch import load_file
from tests.contract.test_engines import DEADLINE_S, MAX_MODEL_LEN, Reference, sample
from tests.support.tiny_models import make_tiny_llama

from poise.errors import BackendDown
from poise.generation.config import GenerationConfig, TorchConfig, VllmConfig
from poise.generation.engine import Engine
from poise.generation.weights.process_group import GroupPayload
from poise.runtime.network.broadcast_group import BroadcastGroup, Rendezvous, invite
from poise_client.codec import safetensors_header
from poise_client.types import Sampling

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(make_tiny_llama(tmp_path_factory.mktemp("tiny"), max_position_embeddings=MAX_MODEL_LEN))


@pytest_asyncio.fixture(
    scope="module", loop_scope="module", params=["torch", pytest.param("vllm", marks=pytest.mark.vllm)]
)
async def engine(request: pytest.FixtureRequest, reference: Reference) -> AsyncIterator[Engine]:
    config = GenerationConfig(
        model=str(reference.folder),
        max_num_seqs=4,
        nccl=True,
        vllm=VllmConfig(kv_cache_gib=0.01, threads=1),
        torch=TorchConfig(threads=1),
    )
    if request.param == "torch":
        from poise.generation.engines.transformers.engine import TorchEngine

        engine: Engine = TorchEngine(config)
    else:
        from poise.generation.engines.vllm.engine import VllmEngine

        engine = VllmEngine(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of vLLM's imports
        await engine.start()  # vLLM spawns its processes, see tests/support/vllm_processes.py
    yield engine
    await engine.stop()


class Sender:
    """The other member of the group."""

    def __init__(self) -> None:
        self.rendezvous, self._meet = invite("cpu", DEADLINE_S)
        self._group: BroadcastGroup | None = None

    async def send(self, tensors: list[torch.Tensor]) -> None:
        """Send on a daemon thread, because the other member may never join."""
        done = asyncio.Event()
        loop = asyncio.get_running_loop()

        def run() -> None:
            with contextlib.suppress(RuntimeError):  # the other member never joined, or left
                self._send(tensors)
                loop.call_soon_threadsafe(done.set)

        threading.Thread(target=run, daemon=True).start()
        await done.wait()

    def _send(self, tensors: list[torch.Tensor]) -> None:
        self._group = self._group or self._meet()
        for tensor in tensors:
            self._group.broadcast(tensor.contiguous().view(-1).view(torch.uint8))

    def leave(self) -> None:
        assert self._group is not None
        self._group.abort()


def payload_of(weights: Path, rendezvous: Rendezvous, path: Path, timeout_s: float = DEADLINE_S) -> GroupPayload:
    tensors = load_file(weights)
    header = safetensors_header((name, "float32", tuple(tensor.shape)) for name, tensor in tensors.items())
    return GroupPayload(rendezvous, tuple(tensor.nbytes for tensor in tensors.values()), header, path, timeout_s)


async def test_weights_from_a_group_are_served_exactly(engine: Engine, reference: Reference, tmp_path: Path) -> None:
    assert engine.process_group_backend == "gloo"
    sender = Sender()
    running = asyncio.create_task(sample(engine, [65, 66], Sampling(max_tokens=300, seed=1)))
    for version in (1, 2, 3):  # through one group
        weights = reference.write_weights(tmp_path / f"{version}.safetensors", seed=version)
        path = tmp_path / "payload"
        await asyncio.gather(
            engine.receive_payload(payload_of(weights, sender.rendezvous, path)),
            sender.send(list(load_file(weights).values())),
        )
        received, sent = load_file(path), load_file(weights)
        assert received.keys() == sent.keys()
        assert all(torch.equal(received[name], tensor) for name, tensor in sent.items())
        await engine.update_weights(path, version)
        reference.use(weights)
        sampling = Sampling(max_tokens=20, seed=0)
        rollout = await sample(engine, [65, 66, 67], sampling)
        assert [span.policy_version for span in rollout.version_spans] == [version]
        reference.check([65, 66, 67], sampling, rollout, engine.info.feature_layer)
    await running


async def test_lost_sender_is_reported_and_the_next_one_works(
    engine: Engine, reference: Reference, tmp_path: Path
) -> None:
    weights = reference.write_weights(tmp_path / "new.safetensors", seed=4)
    tensors = list(load_file(weights).values())
    sender = Sender()
    payload = payload_of(weights, sender.rendezvous, tmp_path / "payload")
    receiving = asyncio.create_task(engine.receive_payload(payload))
    await sender.send(tensors[:3])
    sender.leave()
    with pytest.raises(BackendDown, match="did not arrive through its group"):
        await receiving
    assert engine.is_alive()
    another = Sender()
    await asyncio.gather(
        engine.receive_payload(payload_of(weights, another.rendezvous, tmp_path / "payload")),
        another.send(tensors),
    )
    assert load_file(tmp_path / "payload").keys() == load_file(weights).keys()


@pytest.mark.parametrize("ends", ["timeout", "cancelled"])
async def test_payload_that_stops_arriving_is_aborted(
    engine: Engine, reference: Reference, tmp_path: Path, ends: str
) -> None:
    weights = reference.write_weights(tmp_path / "new.safetensors", seed=5)
    tensors = list(load_file(weights).values())
    sender = Sender()
    timeout_s = 2.0 if ends == "timeout" else DEADLINE_S
    payload = payload_of(weights, sender.rendezvous, tmp_path / "payload", timeout_s)
    receiving = asyncio.create_task(engine.receive_payload(payload))
    await sender.send(tensors[:3])
    if ends == "cancelled":
        receiving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await receiving
        sender.leave()  # like a sender whose push was aborted
    else:
        with pytest.raises(BackendDown):
            await receiving
    deadline = time.monotonic() + DEADLINE_S
    while True:  # until the thread has noticed
        another = Sender()
        sending = asyncio.create_task(another.send(tensors))
        try:
            await engine.receive_payload(payload_of(weights, another.rendezvous, tmp_path / "payload"))
        except BackendDown:
            assert time.monotonic() < deadline
            sending.cancel()
            await asyncio.sleep(0.1)
        else:
            await sending
            return
