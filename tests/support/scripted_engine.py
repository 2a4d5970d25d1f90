"""An engine without a model: the seed decides what it samples, and tests decide when it finishes.

`tests/contract/test_scripted_engine.py` holds it to what the torch engine promises.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from poise.errors import BackendDown, InvalidRequest
from poise.generation.engine import EngineInfo, EngineRequest
from poise.generation.prompts.time_limit import TimeLimit
from poise.generation.weights.adapter_files import WEIGHTS_FILE, check_adapter, read_config
from poise.generation.weights.manifest import check_shapes
from poise.generation.weights.process_group import GroupPayload
from poise_client.types import (
    EncodedPrompt,
    EntropyStats,
    Features,
    Floats,
    Message,
    Rollout,
    RolloutId,
    Sampling,
    VersionSpan,
)

WIDTH = 4
VOCABULARY = 256
PARAMETERS = {"first.weight": (2, 3), "second.weight": (5,)}
_SEEDS = itertools.count(10**9)


async def at_once(_: object) -> None:
    """Do not wait."""


class ScriptedEngine:
    """See `Engine`. Tokens are bytes, and every response has max_tokens of them."""

    def __init__(self, *, max_model_len: int = 64) -> None:
        self.before_rollout: Callable[[EngineRequest], Awaitable[None]] = at_once
        """Awaited by each rollout and encoding while it runs, to delay it or to make it fail."""
        self.before_update: Callable[[Path], Awaitable[None]] = at_once
        """Awaited by each update before it takes effect."""
        self.requests: list[EngineRequest] = []
        """All submitted requests, in order."""
        self.num_aborted = 0
        self.most_at_once = 0
        self._num_running = 0
        self._max_model_len = max_model_len
        self._version = 0
        self._alive = False
        self._loaded = False

    @property
    def info(self) -> EngineInfo:
        if not self._loaded:
            raise BackendDown("the model is still loading", retry_after_s=1.0)
        return EngineInfo("torch", "scripted", WIDTH, 3, 1, self._max_model_len, VOCABULARY, b"\xff\x00")  # no UTF-8

    async def start(self) -> None:
        self._alive = self._loaded = True

    async def stop(self) -> None:
        self._alive = False

    def die(self) -> None:
        """Behave like an engine whose processes were killed."""
        self._alive = False

    def is_alive(self) -> bool:
        return self._alive

    def tokenize(self, content: str | Sequence[Message], limit: TimeLimit | None = None) -> list[int]:
        self._check_alive()
        if not isinstance(content, str):
            content = "".join(f"<{turn['role']}>{turn['content']}" for turn in content) + "<assistant>"
        return list(content.encode())

    async def generate(self, request: EngineRequest) -> Rollout:
        first_version = await self._run(request)
        return self._rollout(request, first_version)

    async def encode(self, group_id: str, prompt_token_ids: Sequence[int]) -> EncodedPrompt:
        rollout_id = RolloutId("", 0, group_id, 0)
        version = await self._run(EngineRequest(rollout_id, prompt_token_ids, Sampling(max_tokens=1)))
        return EncodedPrompt(group_id, len(prompt_token_ids), _prompt_hidden(prompt_token_ids), version)

    async def _run(self, request: EngineRequest) -> int:
        """Wait as long as the test wants. Return the version served at the start."""
        self._check_alive()
        self.requests.append(request)
        self._num_running += 1
        self.most_at_once = max(self.most_at_once, self._num_running)
        first_version = self._version
        try:
            await self.before_rollout(request)
            self._check_alive()
        except asyncio.CancelledError:
            self.num_aborted += 1
            raise
        finally:
            self._num_running -= 1
        return first_version

    async def update_weights(self, weights: Path, policy_version: int) -> float:
        self._check_alive()
        check_shapes(PARAMETERS, _shapes(weights))
        return await self._update(weights, policy_version)

    @property
    def process_group_backend(self) -> str:
        return ""

    async def receive_payload(self, payload: GroupPayload) -> None:
        raise BackendDown("a scripted engine joins no group")

    async def update_adapter(self, folder: Path, policy_version: int) -> float:
        self._check_alive()
        rank, _ = read_config(folder)
        check_adapter(PARAMETERS, _shapes(folder / WEIGHTS_FILE), rank)
        return await self._update(folder, policy_version)

    async def _update(self, weights: Path, policy_version: int) -> float:
        await self.before_update(weights)
        self._check_alive()
        self._version = policy_version
        return 0.001

    def _check_alive(self) -> None:
        if not self._alive:
            raise BackendDown("the engine is not running")

    def _rollout(self, request: EngineRequest, first_version: int) -> Rollout:
        sampling = request.sampling
        seed = next(_SEEDS) if sampling.seed is None else sampling.seed
        entropy = hashlib.sha256(f"{seed}/{list(request.prompt_token_ids)}".encode()).digest()
        random = np.random.default_rng(list(entropy))
        length = sampling.max_tokens
        token_ids = random.integers(97, 123, length).astype(np.int32)
        entropies = random.uniform(0, 2, length).astype(np.float32)
        spans = [VersionSpan(0, length, first_version)]
        if self._version != first_version:
            spans = [VersionSpan(0, 1, first_version), VersionSpan(1, length, self._version)][: min(length, 2)]
        return Rollout(
            id=request.id,
            token_ids=token_ids,
            logprobs=-random.uniform(0, 2, length).astype(np.float32),
            token_entropies=entropies.astype(np.float16),
            sum_squared_probs=np.exp(-entropies).astype(np.float16),
            features=Features(
                _prompt_hidden(request.prompt_token_ids),
                random.normal(size=WIDTH).astype(np.float32) * (length > 1),
                EntropyStats(
                    float(entropies.mean()), float(entropies[-1]), float(entropies.max()), float(entropies.min())
                ),
            ),
            version_spans=tuple(spans),
            finish_reason="length",
            text=bytes(token_ids.tolist()).decode(),
            first_token_s=0.001,
            total_s=0.002,
        )


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(path, framework="np") as file:
            return {name: tuple(file.get_tensor(name).shape) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InvalidRequest.field("weights", f"cannot be read: {error}") from error


def _prompt_hidden(prompt_token_ids: Sequence[int]) -> Floats:
    return np.random.default_rng(list(prompt_token_ids)).normal(size=WIDTH).astype(np.float32)
