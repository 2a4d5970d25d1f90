"""Pushes of weights: the protocol of UpdateWeights, and which policy is served.

A push is received beside what is served, checked to the last byte, and only then given to the engine: all or nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import AsyncIterator, Callable
from functools import partial

from poise.errors import BackendDown, Busy, InvalidRequest, PoiseError
from poise.generation.config import GenerationConfig
from poise.generation.engine import Engine
from poise.generation.metrics import GenerationMetrics
from poise.generation.served_policy import ServedPolicy, admit_push
from poise.generation.weights.adapter_files import admit_adapter
from poise.generation.weights.manifest import Announcement, ExpectedTensor, check_announcement, check_sizes
from poise.generation.weights.received_files import StagedWeights
from poise.generation.weights.staging import Staging
from poise.runtime.models.checkpoint_digest import checkpoint_digest
from poise.runtime.network.broadcast_group import Rendezvous
from poise.runtime.rpc.request_stream import MIN_BYTES_PER_S, PATIENCE_S, read_rest
from poise.runtime.rpc.validation import Violations, quoted
from poise_client.codec import DTYPE_NAMES, backend_name, decode_adapter
from poise_client.types import WeightUpdate
from poise_proto.v1 import generation_pb2 as pb

logger = logging.getLogger(__name__)

MAX_CHUNK_BYTES = 2 * 2**20

Requests = AsyncIterator[pb.UpdateWeightsRequest]


class PushReceiver:
    """Takes one push at a time. Close it at the end."""

    def __init__(self, engine: Engine, config: GenerationConfig, metrics: GenerationMetrics) -> None:
        self._engine = engine
        self._config = config
        self._metrics = metrics
        self._staging = Staging(config.staging_dir, keep_base=config.keep_base, shared_dirs=config.shared_dirs)
        self._pushing = asyncio.Lock()
        self._base_digest = b""
        """Of the model as it was loaded; known where adapters are served over it."""
        self.policy = ServedPolicy()
        """What is served."""

    @property
    def keeps_base(self) -> bool:
        """Whether a delta against what is served is taken."""
        return self._staging.base is not None and self._staging.base.policy == self.policy

    def start(self) -> None:
        """Remove what killed processes left in the staging folder, and see over what adapters are to be served. Blocks.

        Raises:
            BackendDown: the model's files cannot be read.
        """
        self._staging.remove_leftovers()
        if self._config.lora is not None:
            self._base_digest = checkpoint_digest(self._config.model)

    def close(self) -> None:
        """Leave nothing in the staging folder."""
        self._staging.close()

    async def take(self, requests: Requests) -> WeightUpdate:
        """Receive a push, check it, serve it.

        Raises:
            PoiseError: why it is not served; what was served before is.
        """
        try:
            if not self._engine.is_alive():
                _ = self._engine.info  # raises, with the progress, while the model is loading
                raise BackendDown("the engine died; the process restarts", retry_after_s=1.0)
            if self._pushing.locked():
                raise Busy("another push is being received or applied", retry_after_s=1.0)
            async with self._pushing:
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
            raise InvalidRequest.field("part", "the first message of a push must be `manifest`")
        announced = await asyncio.to_thread(_read_begin, first.manifest, self._config.max_update_bytes)
        admit_adapter(announced.adapter, self._config, self._base_digest)
        if not admit_push(self.policy, announced.policy):
            return WeightUpdate(announced.policy.policy_version, True, 0.0, 0.0)
        with contextlib.ExitStack() as files:
            landed = None
            if announced.rendezvous is not None:
                self._check_group(announced.rendezvous)
                body = files.enter_context(self._staging.landing(announced))
                allowed_s = PATIENCE_S + announced.body_bytes / MIN_BYTES_PER_S
                await self._engine.receive(dataclasses.replace(body, timeout_s=min(body.timeout_s, allowed_s)))
                landed = body.path
            staged = files.enter_context(self._staging.receive(announced, landed))
            await _receive(requests, staged)
            receive_s = time.monotonic() - started
            pause_s = await self._apply_to_its_end(staged, announced, receive_s)
        return WeightUpdate(announced.policy.policy_version, False, receive_s, pause_s)

    def _check_group(self, rendezvous: Rendezvous) -> None:
        if not rendezvous.backend or rendezvous.backend != self._engine.group_backend:
            takes = self._engine.group_backend or "none is taken: set `nccl`"
            raise InvalidRequest.field(
                "manifest.process_group.backend", f"is {quoted(rendezvous.backend)}; required here: {takes}"
            )

    async def _apply(self, staged: StagedWeights, announced: Announcement, receive_s: float) -> float:
        pushed = announced.policy
        if announced.adapter is None:
            pause_s = await self._engine.update_weights(staged.path, pushed.policy_version)
        else:
            with self._staging.lay_out(staged, announced) as folder:
                pause_s = await self._engine.update_adapter(folder, pushed.policy_version)
            self._staging.serves(folder)
        self.policy = pushed
        self._staging.applied(staged, announced)
        self._metrics.weights_applied(pushed.policy_version, receive_s, pause_s)
        logger.info(
            "serving version %d of lineage %s: %s received in %.2f s, stood still for %.2f s",
            pushed.policy_version,
            pushed.lineage_id[:8],
            "all" if announced.base is None else "what changed",
            receive_s,
            pause_s,
        )
        return pause_s

    async def _apply_to_its_end(self, staged: StagedWeights, announced: Announcement, receive_s: float) -> float:
        applying = asyncio.create_task(self._apply(staged, announced, receive_s), name="apply-weights")
        try:
            return await asyncio.shield(applying)
        except asyncio.CancelledError:
            # The caller left; what has begun ends, applied or not, before the next push or the file's deletion.
            await asyncio.wait({applying})
            raise


async def _receive(requests: Requests, staged: StagedWeights) -> None:
    """Fill the file. What is stored and hashed is done on a thread, while the next message comes."""
    storing = _Storing()
    try:
        if staged.source is not None:
            await storing.then(staged.read_source)
        async for message in requests:
            match message.WhichOneof("part"):
                case "chunk":
                    chunk = message.chunk
                    if staged.source is not None:
                        raise InvalidRequest.field("part", "is chunk; the body lies in a file, and `commit` follows")
                    if not 1 <= len(chunk.data) <= MAX_CHUNK_BYTES:
                        raise InvalidRequest.field(
                            "chunk.data", f"has {len(chunk.data)} bytes; required: 1 to {MAX_CHUNK_BYTES}"
                        )
                    await storing.then(partial(staged.write, chunk.offset, chunk.data))
                case "commit":
                    await storing.then(partial(staged.finish, message.commit.total_bytes))
                    await storing.over()
                    return
                case other:
                    raise InvalidRequest.field(
                        "part", f"is {other or 'unset'}; after `manifest` come chunks and one `commit`"
                    )
        raise InvalidRequest.field("part", "the push ended without `commit`; the old version goes on being served")
    finally:
        await storing.settle()


class _Storing:
    """Work on a thread, one piece after another."""

    def __init__(self) -> None:
        self._current: asyncio.Future[None] | None = None

    async def then(self, work: Callable[[], None]) -> None:
        """Start the next piece once the last is done. Raises what that raised."""
        await self.over()
        self._current = asyncio.get_running_loop().run_in_executor(None, work)

    async def over(self) -> None:
        """Return once all is done. Raises what the last piece raised."""
        if self._current is not None:
            current, self._current = self._current, None
            try:
                await asyncio.shield(current)
            except asyncio.CancelledError:
                self._current = current
                raise

    async def settle(self) -> None:
        """Return once nothing runs any more, however it ended."""
        if self._current is not None:
            await asyncio.wait({self._current})
            if not self._current.cancelled():
                self._current.exception()


def _read_begin(begin: pb.WeightsManifest, max_bytes: int) -> Announcement:
    wrong = Violations()
    wrong.identifier("manifest.lineage_id", begin.lineage_id)
    wrong.raise_if_any()
    check_sizes([len(tensor.shape) for tensor in begin.tensors], begin.file)
    announced = Announcement(
        policy=ServedPolicy(begin.lineage_id, begin.policy_version, begin.digest),
        tensors=tuple(
            ExpectedTensor(
                tensor.name,
                DTYPE_NAMES.get(tensor.dtype, ""),
                tuple(tensor.shape),
                tensor.sha256,
                tensor.num_changed,
                tensor.block_bytes,
            )
            for tensor in begin.tensors
        ),
        base=ServedPolicy(begin.base.lineage_id, begin.base.policy_version, begin.base.digest)
        if begin.HasField("base")
        else None,
        file=begin.file,
        keep=begin.keep_as_base,
        adapter=decode_adapter(begin.adapter) if begin.HasField("adapter") else None,
        rendezvous=Rendezvous(backend_name(begin.process_group.backend), begin.process_group.rendezvous)
        if begin.HasField("process_group")
        else None,
        timeout_s=begin.process_group.timeout_s,
    )
    check_announcement(announced, max_bytes)
    return announced
