"""The generation service on a real port of this process, and a reference model to compare pushes with."""

from __future__ import annotations

import warnings
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tests.support.scripted_engine import ScriptedEngine
from tests.support.tiny_models import make_tiny_llama

from poise.generation.app import GenerationApp, build
from poise.generation.config import GenerationConfig
from poise.runtime.network.auth import BearerAuth
from poise.runtime.rpc.interceptors import ServiceInterceptor
from poise_client import AsyncGenerationClient
from poise_client.types import Rollout
from poise_proto.v1.generation_pb2_grpc import GenerationServiceStub


@dataclass
class Running:
    """A listening service and its client."""

    app: GenerationApp
    target: str
    client: AsyncGenerationClient
    channel: grpc.aio.Channel

    @property
    def stub(self) -> GenerationServiceStub:
        """A stub for requests that the client never sends."""
        return GenerationServiceStub(self.channel)

    def staged(self) -> list[Path]:
        """Return the files of pushes except the kept base."""
        base = self.app.servicer.receiver.staging.base
        files = self.app.config.staging_dir.rglob("*.safetensors")
        return [path for path in files if base is None or path != base.path]


class Reference:
    """The tiny model in transformers: its weights and their log-probabilities."""

    def __init__(self, folder: Path) -> None:
        import transformers

        self.folder = folder
        self._model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
        self.original = load_file(folder / "model.safetensors")

    def changed(self, seed: int) -> dict[str, np.ndarray]:
        """Return other weights that fit."""
        random = np.random.default_rng(seed)
        return {
            name: (array * (1 + 0.1 * random.normal(size=array.shape))).astype(np.float32)
            for name, array in self.original.items()
        }

    def check(self, weights: dict[str, np.ndarray], prompt: list[int], rollout: Rollout) -> None:
        """Compare the log-probabilities of a rollout at temperature 1 with a forward pass with `weights`."""
        self._model.load_state_dict({name: torch.tensor(array) for name, array in weights.items()}, strict=False)
        with torch.inference_mode():
            ids = torch.tensor([prompt + rollout.token_ids.tolist()])
            logprobs = torch.log_softmax(self._model(ids).logits[0, len(prompt) - 1 : -1], -1)
        expected = logprobs.gather(1, ids[0, len(prompt) :, None])[:, 0].numpy()
        np.testing.assert_allclose(rollout.logprobs, expected, atol=1e-4)


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of transformers' imports
        return Reference(make_tiny_llama(tmp_path_factory.mktemp("tiny"), max_position_embeddings=512))


@pytest.fixture
async def serve(tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    """Starts services with the given engine, or with the one that the settings choose."""
    threads = torch.get_num_threads()
    async with AsyncExitStack() as stack:

        async def start(engine: ScriptedEngine | None = None, **settings: Any) -> Running:
            config = GenerationConfig(
                **{"model": "scripted", "engine": "torch", "staging_dir": tmp_path / "staging"} | settings
            )
            app = build(config) if engine is None else GenerationApp(config, engine)
            interceptor = ServiceInterceptor(app.name, BearerAuth(None), app.registry, config.grpc.max_concurrent_rpcs)
            server = grpc.aio.server(interceptors=[interceptor])
            app.register(server)
            target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
            await server.start()
            stack.push_async_callback(server.stop, None)
            await app.start()
            stack.push_async_callback(app.stop)
            client = await stack.enter_async_context(AsyncGenerationClient(target))
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(target))
            return Running(app, target, client, channel)

        yield start
    torch.set_num_threads(threads)


@pytest.fixture
async def tiny(serve: Callable[..., Any], reference: Reference) -> Running:
    """The service with the torch engine on the tiny model."""
    running: Running = await serve(model=str(reference.folder), max_num_seqs=8, default_max_tokens=12)
    return running


@pytest.fixture
async def scripted(serve: Callable[..., Any]) -> tuple[Running, ScriptedEngine]:
    """The service with a scripted engine."""
    engine = ScriptedEngine()
    return await serve(engine), engine
