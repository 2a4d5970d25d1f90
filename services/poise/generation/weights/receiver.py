"""The server side of UpdateWeights: receives a push, checks every byte, then applies it to the engine."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import AsyncIterator, Callable
from functools import partial

from poise.errors import BackendDown, Busy, InvalidRequest, PoiseError
from poise.generation.config import GenerationConfig
from poise.generation.engine import Engine
from poise.generation.metrics import GenerationMetrics
from poise.generation.served_policy import ServedPolicy, must_apply
from poise.generation.weights.adapter_files import adapter_folder
from poise.generation.weights.manifest import read_manifest
from poise.generation.weights.staging import StagedPush, Staging
from poise.runtime.models.checkpoint_digest import checkpoint_digest
from poise.runtime.rpc.request_stream import MIN_BYTES_PER_S, WAIT_BUDGET_S, read_rest
from poise.runtime.tasks import until_done, wait_until_done
from poise_client.types import WeightUpdate
from poise_proto.v1 import generation_pb2 as pb

logger = logging.getLogger(__name__)

MAX_CHUNK_BYTES = 2 * 2**20

Requests = AsyncIterator[pb.UpdateWeightsRequest]


class PushReceiver:
    """Receives one push at a time. A push is applied completely or not at all."""

    def __init__(self, engine: Engine, config: GenerationConfig, metrics: GenerationMetrics) -> None:
        self._engine = engine
        self._config = config
        self._metrics = metrics
        self._is_busy = asyncio.Lock()
        self._base_digest = b""
        """Digest of the model that adapters are served over; empty without `lora`."""
        self.staging = Staging(config.staging_dir, keep_base=config.keep_base, shared_dirs=config.shared_dirs)
        self.policy = ServedPolicy()
        """The version being served."""

    @property
    def keeps_base(self) -> bool:
        """Whether a delta against the served version is accepted."""
        return self.staging.base is not None and self.staging.base.manifest.policy == self.policy

    def start(self) -> None:
        """Remove the files of killed processes; with `lora`, hash the model's files. Blocks.

        Raises:
            BackendDown: the model's files cannot be read.
        """
        self.staging.remove_leftovers()
        if self._config.lora is not None:
            self._base_digest = checkpoint_digest(self._config.model)

    def close(self) -> None:
        """Remove all staged files."""
        self.staging.close()

    async def receive(self, requests: Requests) -> WeightUpdate:
        """Receive, check and apply one push.

        Raises:
            PoiseError: the push was not applied, and the old version is still served.
        """
        try:
            if not self._engine.is_alive():
                _ = self._engine.info  # raises, with the progress, while the model is loading
                raise BackendDown("the engine died; the process restarts", retry_after_s=1.0)
            if self._is_busy.locked():
                raise Busy("another push is being received or applied", retry_after_s=1.0)
            async with self._is_busy:
                update = await self._receive_and_apply(requests)
        except PoiseError:
            await read_rest(requests)
            raise
        if update.already_applied:
            await read_rest(requests)
        return update

    async def _receive_and_apply(self, requests: Requests) -> WeightUpdate:
        started = time.monotonic()
        first = await anext(requests, None)
        if first is None or first.WhichOneof("part") != "manifest":
            raise InvalidRequest.field("part", "is not `manifest`, which must be the first message of a push")
        manifest = await asyncio.to_thread(
            read_manifest,
            first.manifest,
            self._config,
            base_digest=self._base_digest,
            group_backend=self._engine.process_group_backend,
        )
        version = manifest.policy_version
        if not must_apply(self.policy, manifest.policy):
            return WeightUpdate(version, True, 0.0, 0.0)
        with self.staging.open(manifest) as push:
            if manifest.process_group is not None:
                payload = push.group_payload()
                limit_s = WAIT_BUDGET_S + manifest.payload_bytes / MIN_BYTES_PER_S
                await self._engine.receive_payload(
                    dataclasses.replace(payload, timeout_s=min(payload.timeout_s, limit_s))
                )
            await _receive(requests, push)
            receive_s = time.monotonic() - started
            pause_s = await until_done(self._apply(push, receive_s))  # then the file may go, and the next push start
        return WeightUpdate(version, False, receive_s, pause_s)

    async def _apply(self, push: StagedPush, receive_s: float) -> float:
        """Serve a complete push; return the seconds for which generation paused."""
        manifest, version = push.manifest, push.manifest.policy_version
        if manifest.adapter is None:
            folder = None
            pause_s = await self._engine.update_weights(push.path, version)
        else:
            names = [tensor.name for tensor in manifest.tensors]
            with adapter_folder(push.path, names, manifest.adapter, self.staging.folder) as folder:
                pause_s = await self._engine.update_adapter(folder, version)
        self.policy = manifest.policy
        self.staging.applied(push, folder)
        self._metrics.weights_applied(version, receive_s, pause_s)
        logger.info(
            "serving version %d of lineage %s (%s): received in %.2f s, generation paused for %.2f s",
            version,
            manifest.lineage_id[:8],
            "whole" if manifest.base is None else "delta",
            receive_s,
            pause_s,
        )
        return pause_s


async def _receive(requests: Requests, push: StagedPush) -> None:
    """Fill the file of a push. A thread stores and hashes each message while the next one arrives."""
    storing: asyncio.Task[None] | None = None

    async def store(work: Callable[[], None]) -> asyncio.Task[None]:
        """Start `work` on a thread after the previous call's work has ended; raise that work's error."""
        nonlocal storing
        if storing is not None:
            await asyncio.shield(storing)
        storing = asyncio.create_task(asyncio.to_thread(work))
        return storing

    try:
        if not push.comes_in_chunks:
            await store(push.read_file)
        async for message in requests:
            match message.WhichOneof("part"):
                case "chunk":
                    chunk = message.chunk
                    if not push.comes_in_chunks:
                        raise InvalidRequest.field(
                            "part", "is chunk; required: commit, because the manifest names a file or a process group"
                        )
                    if not 1 <= len(chunk.data) <= MAX_CHUNK_BYTES:
                        raise InvalidRequest.field(
                            "chunk.data", f"has {len(chunk.data)} bytes; required: 1 to {MAX_CHUNK_BYTES}"
                        )
                    await store(partial(push.write, chunk.offset, chunk.data))
                case "commit":
                    await asyncio.shield(await store(partial(push.finish, message.commit.total_bytes)))
                    return
                case other:
                    raise InvalidRequest.field(
                        "part", f"is {other or 'unset'}; required after `manifest`: chunk or commit"
                    )
        raise InvalidRequest.field("part", "the push ended without `commit`; the old version is still served")
    finally:
        if storing is not None:  # the file must not be closed meanwhile
            await wait_until_done(storing)
