"""GenerationService on the wire: protobuf to the sampler and the engine, and back.

Owns validation of requests, the push protocol, and which policy is served. Knows neither vLLM nor torch.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import grpc.aio
import numpy as np

from poise.errors import BackendDown, Busy, Draining, InvalidRequest, PoiseError, VersionMismatch
from poise.generation.config import GenerationConfig
from poise.generation.engine import Engine
from poise.generation.metrics import GenerationMetrics
from poise.generation.policy import ServedPolicy, admit_push
from poise.generation.sampler import Sampler
from poise.generation.weights import ExpectedTensor, StagedWeights, check_announcement, policy_digest
from poise.runtime.validation import Violations
from poise_client.codec import (
    DTYPE_NAMES,
    CodecError,
    decode_prompt,
    decode_sampling,
    encode_group,
    encode_policy,
    encode_weight_update,
)
from poise_client.types import Policy, Prompt, Sampling, WeightUpdate
from poise_proto.v1 import generation_pb2 as pb
from poise_proto.v1 import generation_pb2_grpc

logger = logging.getLogger(__name__)

MAX_PROMPTS = 4096
MAX_ROLLOUTS = 256
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_CHUNK_BYTES = 2 * 2**20
MIN_TEMPERATURE, MAX_TEMPERATURE = float(np.float32(0.01)), 100.0
"""Below the least, which vLLM does not go under, logits overflow; 0 is greedy. As float32, for so it travels."""

ROLES = ("system", "user", "assistant")

_PUSH_IDLE_S = 60.0
"""A push that sends nothing for so long is given up, so that the next may come."""

Context = grpc.aio.ServicerContext[object, object]


class GenerationServicer(generation_pb2_grpc.GenerationServiceServicer):
    """Samples and takes pushes. `refusal` says why new rollouts are refused now; empty when they are not."""

    def __init__(
        self, engine: Engine, config: GenerationConfig, metrics: GenerationMetrics, refusal: Callable[[], str]
    ) -> None:
        self._engine = engine
        self._config = config
        self._metrics = metrics
        self.sampler = Sampler(engine, config)
        self.instance_id = uuid.uuid4().hex
        self.policy = ServedPolicy()
        self._refusal = refusal
        self._pushing = asyncio.Lock()

    async def StreamTrajectories(  # noqa: N802
        self, request: pb.StreamTrajectoriesRequest, context: Context
    ) -> AsyncIterator[pb.StreamTrajectoriesResponse]:
        """See generation.proto."""
        self._refuse_unless_ready()
        prompts, sampling, num_rollouts = _read_request(request)
        if request.HasField("min_policy_version") and self.policy.policy_version < request.min_policy_version:
            raise VersionMismatch(
                f"version {self.policy.policy_version} is served; min_policy_version is {request.min_policy_version}",
                remedy="Wait for the learner's push, and ask again.",
            )
        groups = self.sampler.sample(
            request.run_id, request.step, prompts, num_rollouts, sampling, request.return_token_entropies
        )
        try:
            with self._engine_deaths():
                async for group in groups:
                    self._metrics.observe(group)
                    yield encode_group(group)
        finally:
            await groups.aclose()

    async def UpdateWeights(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.UpdateWeightsRequest], context: Context
    ) -> pb.UpdateWeightsResponse:
        """See generation.proto."""
        if not self._engine.is_alive():
            raise BackendDown("the engine does not run: it is still loading, or died", retry_after_s=1.0)
        if self._pushing.locked():
            raise Busy("another push is being received or applied", retry_after_s=1.0)
        async with self._pushing:
            with self._engine_deaths():
                return encode_weight_update(await self._receive_and_apply(request_iterator))

    async def GetPolicy(self, request: pb.GetPolicyRequest, context: Context) -> pb.GetPolicyResponse:  # noqa: N802
        """See generation.proto."""
        info = self._engine.info
        refusal = self._refusal()
        return encode_policy(
            Policy(
                instance_id=self.instance_id,
                lineage_id=self.policy.lineage_id,
                policy_version=self.policy.policy_version,
                digest=self.policy.digest,
                ready=not refusal,
                not_ready_reason=refusal,
                engine=info.engine,
                model=info.model,
                hidden_size=info.hidden_size,
                feature_layer=info.feature_layer,
                max_model_len=info.max_model_len,
                num_running=self.sampler.num_running,
            )
        )

    def _refuse_unless_ready(self) -> None:
        if refusal := self._refusal():
            raise Draining(refusal, retry_after_s=0.5)

    @contextmanager
    def _engine_deaths(self) -> Iterator[None]:
        """Let callers try again later when what they met is the engine's death rather than a defect."""
        try:
            yield
        except PoiseError:
            raise
        except Exception as error:
            if self._engine.is_alive():
                raise
            raise BackendDown("the engine died; the process restarts", retry_after_s=1.0) from error

    async def _receive_and_apply(self, requests: AsyncIterator[pb.UpdateWeightsRequest]) -> WeightUpdate:
        started = time.monotonic()
        begin = await _next_part(requests)
        if begin is None or begin.WhichOneof("part") != "begin":
            raise InvalidRequest.field("part", "the first message of a push must be `begin`")
        pushed, tensors = _read_begin(begin.begin, self._config.max_update_bytes)
        if not admit_push(self.policy, pushed):
            return WeightUpdate(pushed.policy_version, True, 0.0, 0.0)
        with StagedWeights(tensors, self._config.staging_dir) as staged:
            await _receive(requests, staged)
            receive_s = time.monotonic() - started
            pause_s = await self._apply_to_its_end(staged.path, pushed, receive_s)
        return WeightUpdate(pushed.policy_version, False, receive_s, pause_s)

    async def _apply(self, path: Path, pushed: ServedPolicy, receive_s: float) -> float:
        pause_s = await self._engine.update_weights(path, pushed.policy_version)
        self.policy = pushed
        self._metrics.weights_applied(pushed.policy_version, receive_s, pause_s)
        logger.info(
            "serving version %d of lineage %s: received in %.2f s, stood still for %.2f s",
            pushed.policy_version,
            pushed.lineage_id[:8],
            receive_s,
            pause_s,
        )
        return pause_s

    async def _apply_to_its_end(self, path: Path, pushed: ServedPolicy, receive_s: float) -> float:
        applying = asyncio.create_task(self._apply(path, pushed, receive_s), name="apply-weights")
        try:
            return await asyncio.shield(applying)
        except asyncio.CancelledError:
            # The caller left; what has begun ends, applied or not, before the next push or the file's deletion.
            await asyncio.wait({applying})
            raise


async def _next_part(requests: AsyncIterator[pb.UpdateWeightsRequest]) -> pb.UpdateWeightsRequest | None:
    try:
        return await asyncio.wait_for(anext(requests), _PUSH_IDLE_S)
    except StopAsyncIteration:
        return None
    except TimeoutError:
        raise InvalidRequest.field("part", f"no message for {_PUSH_IDLE_S:.0f} s; the push is given up") from None


async def _receive(requests: AsyncIterator[pb.UpdateWeightsRequest], staged: StagedWeights) -> None:
    while (message := await _next_part(requests)) is not None:
        match message.WhichOneof("part"):
            case "chunk":
                size = len(message.chunk.data)
                if not 1 <= size <= MAX_CHUNK_BYTES:
                    raise InvalidRequest.field("chunk.data", f"has {size} bytes; required: 1 to {MAX_CHUNK_BYTES}")
                staged.write(message.chunk.offset, message.chunk.data)
            case "commit":
                staged.finish(message.commit.total_bytes)
                return
            case other:
                raise InvalidRequest.field("part", f"is {other or 'unset'}; after `begin` come chunks and one `commit`")
    raise InvalidRequest.field("part", "the push ended without `commit`; the old version goes on being served")


def _read_begin(begin: pb.WeightsBegin, max_bytes: int) -> tuple[ServedPolicy, list[ExpectedTensor]]:
    wrong = Violations()
    wrong.identifier("begin.lineage_id", begin.lineage_id)
    wrong.raise_if_any()
    tensors = [
        ExpectedTensor(tensor.name, DTYPE_NAMES.get(tensor.dtype, ""), tuple(tensor.shape), tensor.sha256)
        for tensor in begin.tensors
    ]
    check_announcement(tensors, max_bytes)
    if begin.digest != policy_digest(tensors):
        raise InvalidRequest.field("begin.digest", "is not the SHA-256 over the tensors' sha256 in order of name")
    return ServedPolicy(begin.lineage_id, begin.policy_version, begin.digest), tensors


def _read_request(request: pb.StreamTrajectoriesRequest) -> tuple[list[Prompt], Sampling, int]:
    wrong = Violations()
    wrong.identifier("run_id", request.run_id)
    num_rollouts = request.num_rollouts or 1
    wrong.check(num_rollouts <= MAX_ROLLOUTS, "num_rollouts", f"is {num_rollouts}; required: 1 to {MAX_ROLLOUTS}")
    num_prompts = len(request.prompts)
    wrong.check(1 <= num_prompts <= MAX_PROMPTS, "prompts", f"has {num_prompts}; required: 1 to {MAX_PROMPTS}")
    prompts = _read_prompts(request.prompts[:MAX_PROMPTS], wrong)
    sampling = decode_sampling(request.sampling)
    _check_sampling(sampling, wrong)
    wrong.raise_if_any()
    return prompts, sampling, num_rollouts


def _read_prompts(specs: Sequence[pb.PromptSpec], wrong: Violations) -> list[Prompt]:
    prompts: list[Prompt] = []
    seen: set[str] = set()
    for index, spec in enumerate(specs):
        path = f"prompts[{index}]"
        wrong.identifier(f"{path}.group_id", spec.group_id)
        wrong.check(spec.group_id not in seen, f"{path}.group_id", f"{spec.group_id!r} names an earlier prompt too")
        seen.add(spec.group_id)
        for turn, message in enumerate(spec.chat.messages):
            wrong.check(
                message.role in ROLES,
                f"{path}.chat.messages[{turn}].role",
                f"is {message.role[:40]!r}; required: one of {', '.join(ROLES)}",
            )
        try:
            prompts.append(decode_prompt(spec, path))
        except CodecError as error:
            wrong.add(error.field, error.description)
    return prompts


def _check_sampling(sampling: Sampling, wrong: Violations) -> None:
    temperature, top_p = sampling.temperature, sampling.top_p
    wrong.check(
        temperature == 0 or MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE,
        "sampling.temperature",
        f"is {temperature:g}; required: {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}, or 0 (greedy)",
    )
    wrong.check(0 < top_p <= 1, "sampling.top_p", f"is {top_p}; required: above 0, at most 1")
    wrong.check(len(sampling.stop) <= MAX_STOPS, "sampling.stop", f"has {len(sampling.stop)}; at most {MAX_STOPS}")
    for index, stop in enumerate(sampling.stop[:MAX_STOPS]):
        wrong.check(
            1 <= len(stop) <= MAX_STOP_CHARS,
            f"sampling.stop[{index}]",
            f"has {len(stop)} characters; required: 1 to {MAX_STOP_CHARS}",
        )
