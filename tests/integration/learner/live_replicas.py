"""Real generation replicas, each behind a proxy that corrupts or delays pushes."""

# ruff: noqa: N802 (gRPC names the methods)

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import torch
from safetensors.torch import load_file
from tests.integration.learner.replicas import interceptors

from poise.generation.app import GenerationApp, build
from poise.generation.config import GenerationConfig
from poise.generation.engines.transformers.engine import TorchEngine
from poise.learner.publishing.weight_version import WeightVersion
from poise_client import combine_digests, hash_weights
from poise_client.types import WeightArray
from poise_proto.v1 import generation_pb2 as pb
from poise_proto.v1 import generation_pb2_grpc

NUM_PIECES = 10
"""Pieces that the proxy splits each chunk into, so that it can reorder them."""

FAULTS = ("drop", "truncate", "swap", "swap in place", "flip a bit", "cut the connection", "repeat")


def published_versions(folder: Path, count: int) -> list[WeightVersion]:
    """Return versions 0 to `count` - 1 of a model in bfloat16, each with a hundredth of the elements changed."""
    arrays = {
        name: tensor.to(torch.bfloat16).view(torch.uint16).numpy()
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    random = np.random.default_rng(0)
    versions = []
    for number in range(count):
        weights = {name: WeightArray(bits, "bfloat16") for name, bits in arrays.items()}
        hashes = hash_weights(weights)
        versions.append(WeightVersion("lineage", number, weights, hashes, combine_digests(hashes)))
        arrays = {name: bits + (random.random(bits.shape) < 0.01).astype(np.uint16) for name, bits in arrays.items()}
    return versions


def served_values(version: WeightVersion) -> bytes:
    """Return the fingerprint of an engine's float32 parameters if it serves exactly this version."""
    return _fingerprint({name: to_float32(weight) for name, weight in version.weights.items()})


def to_float32(weight: WeightArray) -> np.ndarray:
    """Return bfloat16 bits as float32 values."""
    return (weight.array.astype(np.uint32) << 16).view(np.float32)


def _fingerprint(arrays: dict[str, np.ndarray]) -> bytes:
    return hashlib.sha256(b"".join(arrays[name].tobytes() for name in sorted(arrays))).digest()


class LiveReplica:
    """The generation service with the torch engine, on a port of this process."""

    def __init__(self, model: Path, staging_dir: Path, **settings: Any) -> None:
        self._settings = {"model": str(model), "engine": "torch", "dtype": "float32", "staging_dir": staging_dir}
        self._settings |= settings
        self.address = "127.0.0.1:0"
        self.app: GenerationApp | None = None
        self._server: grpc.aio.Server | None = None

    async def start(self) -> LiveReplica:
        self.app = build(GenerationConfig(**self._settings))
        self._server = grpc.aio.server(
            interceptors=interceptors("generation", self.app.registry), options=[("grpc.so_reuseport", 0)]
        )
        self.app.register(self._server)
        await self.app.start()
        self.address = f"127.0.0.1:{self._server.add_insecure_port(self.address)}"
        await self._server.start()
        return self

    async def stop(self) -> None:
        """Die at once."""
        if self._server is not None and self.app is not None:
            await self._server.stop(None)
            await self.app.stop()
            self._server = None

    async def restart(self) -> None:
        await self.stop()
        await self.start()

    async def serves(self) -> bytes:
        """Return the fingerprint of its parameters, between two steps of the engine."""
        assert self.app is not None
        engine = self.app.engine
        assert isinstance(engine, TorchEngine)

        def look() -> bytes:
            return _fingerprint({name: p.detach().numpy() for name, p in engine.model.named_parameters()})

        return await engine.run_on_thread(look)


class Proxy(generation_pb2_grpc.GenerationServiceServicer):
    """Forwards calls to a replica. A stopped proxy is a dead replica."""

    def __init__(self, replica: Callable[[], str], seed: int) -> None:
        self._replica = replica
        self._random = random.Random(seed)
        self.faults: list[str] = []
        """One fault for each of the next pushes; later pushes pass."""
        self.open = asyncio.Event()
        """While unset, pushes stop in the middle."""
        self.open.set()
        self.held_s: list[float] = []
        """For each stopped push, the seconds it had left at its arrival."""
        self.piece_s = 0.0
        """Delay of each piece, as in a slow network, s."""
        self.num_deltas = 0
        self.address = "127.0.0.1:0"
        self._server: grpc.aio.Server | None = None
        self._channel: grpc.aio.Channel | None = None

    async def start(self) -> Proxy:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port(self.address)}"
        options = [("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 100)]
        self._channel = grpc.aio.insecure_channel(self._replica(), options=options)
        await self._server.start()
        return self

    async def stop(self) -> None:
        if self._server is not None and self._channel is not None:
            await self._server.stop(None)
            await self._channel.close()
            self._server = None

    async def GetPolicy(self, request: pb.GetPolicyRequest, context: Any) -> pb.GetPolicyResponse:
        return await self._pass_on(self._stub().GetPolicy(request), context)

    async def UpdateWeights(self, requests: Any, context: Any) -> pb.UpdateWeightsResponse:
        fault = self.faults.pop(0) if self.faults else ""
        begin = await anext(aiter(requests))
        self.num_deltas += begin.manifest.HasField("base")
        pieces = [piece async for message in requests for piece in _pieces(message)]
        with _mistreated_file(begin.manifest, fault, self._random):
            sent, cut = _mistreated(pieces, fault, self._random), asyncio.Event()
            left_s = context.time_remaining()
            call = self._stub().UpdateWeights(
                self._sent(begin, sent, left_s, cut if fault == "cut the connection" else None)
            )
            if fault == "cut the connection":
                await cut.wait()
                call.cancel()
            return await self._pass_on(call, context)

    async def _sent(
        self,
        begin: pb.UpdateWeightsRequest,
        rest: list[pb.UpdateWeightsRequest],
        left_s: float,
        cut: asyncio.Event | None,
    ) -> AsyncIterator[pb.UpdateWeightsRequest]:
        yield begin
        for index, message in enumerate(rest):
            await asyncio.sleep(self.piece_s)
            if index == len(rest) // 2:
                self.held_s.append(left_s)
                try:
                    await self.open.wait()
                finally:
                    self.held_s.remove(left_s)
                if cut is not None:
                    cut.set()
                    await asyncio.Event().wait()
            yield message

    def _stub(self) -> generation_pb2_grpc.GenerationServiceStub:
        assert self._channel is not None
        return generation_pb2_grpc.GenerationServiceStub(self._channel)

    async def _pass_on(self, call: Any, context: Any) -> Any:
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            await context.abort(error.code(), error.details() or "", tuple(error.trailing_metadata() or ()))
        except asyncio.CancelledError:
            if not call.cancelled() or asyncio.current_task().cancelling():  # type: ignore[union-attr]
                raise
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the connection was cut")


@contextlib.contextmanager
def _mistreated_file(begin: pb.WeightsManifest, fault: str, chance: random.Random) -> Iterator[None]:
    """Let a push through a file name a damaged copy, as after a disk error."""
    if not begin.file or fault in ("", "cut the connection"):
        yield
        return
    data = bytearray(Path(begin.file).read_bytes())
    size = max(1, len(data) // NUM_PIECES)
    first, second = (size * number for number in chance.sample(range(NUM_PIECES), 2))
    match fault:
        case "drop":
            del data[first : first + size]
        case "truncate":
            del data[first:]
        case "swap" | "swap in place":
            data[first : first + size], data[second : second + size] = (
                data[second : second + size],
                data[first : first + size],
            )
        case "flip a bit":
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        case "repeat":
            data[first:first] = data[first : first + size]
    copy = Path(begin.file).with_name(f"bad-{chance.getrandbits(64):x}.safetensors")
    copy.write_bytes(data)
    begin.file = str(copy)
    try:
        yield
    finally:
        copy.unlink()


def _pieces(message: pb.UpdateWeightsRequest) -> list[pb.UpdateWeightsRequest]:
    if message.WhichOneof("part") != "chunk":
        return [message]
    chunk = message.chunk
    size = -(-len(chunk.data) // NUM_PIECES)
    return [_chunk(chunk.offset + start, chunk.data[start : start + size]) for start in range(0, len(chunk.data), size)]


def _chunk(offset: int, data: bytes) -> pb.UpdateWeightsRequest:
    return pb.UpdateWeightsRequest(chunk=pb.WeightsChunk(offset=offset, data=data))


def _mistreated(
    pieces: list[pb.UpdateWeightsRequest], fault: str, chance: random.Random
) -> list[pb.UpdateWeightsRequest]:
    """Return the messages after the manifest, changed as a bad network or a bug would change them."""
    *chunks, commit = pieces
    if not chunks:
        return [] if fault == "truncate" else pieces
    first, second = chance.sample(range(len(chunks)), 2) if len(chunks) > 1 else (0, 0)
    match fault:
        case "drop":
            del chunks[first]
        case "truncate":
            return chunks[:first]
        case "swap":
            chunks[first], chunks[second] = chunks[second], chunks[first]
        case "swap in place":  # only checksums detect it
            a, b = chunks[first].chunk, chunks[second].chunk
            chunks[first], chunks[second] = _chunk(a.offset, b.data), _chunk(b.offset, a.data)
        case "flip a bit":
            data = bytearray(chunks[first].chunk.data)
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            chunks[first] = _chunk(chunks[first].chunk.offset, bytes(data))
        case "repeat":
            chunks.insert(first, chunks[first])
    return [*chunks, commit]
