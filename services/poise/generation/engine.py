"""The engine interface: what the generation service asks of vLLM or of transformers.

Knows neither gRPC nor protobuf. Implementations: `torch_engine`, `vllm_engine`; one contract suite holds them
together.

Shapes: P prompt tokens, T response tokens, d the model's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from poise.generation.prompts.time_limit import TimeLimit
from poise.generation.weights.payload import Body
from poise_client.types import Features, FinishReason, Floats, Ints, Message, Sampling, VersionSpan


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What does not change while an engine runs."""

    engine: str
    model: str
    hidden_size: int
    num_layers: int
    feature_layer: int
    max_model_len: int
    vocabulary_size: int
    tokenizer_digest: bytes = b""
    """SHA-256 of all that turns prompts into ids: tokenizer and chat template; empty where it is not known."""


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One rollout to sample."""

    request_id: str
    """Unique among the running ones."""
    prompt_token_ids: Sequence[int]
    """At least one, and leaving room for at least one response token in max_model_len."""
    sampling: Sampling
    """max_tokens is resolved: at least 1, and P + max_tokens ≤ max_model_len."""


@dataclass(frozen=True, slots=True)
class EngineRollout:
    """One finished rollout."""

    token_ids: Ints
    logprobs: Floats
    token_entropies: Floats
    features: Features
    version_spans: tuple[VersionSpan, ...]
    finish_reason: FinishReason
    text: str
    first_token_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class EngineEncoding:
    """One encoded prompt."""

    prompt_hidden: Floats
    """[d]"""
    policy_version: int


class Engine(Protocol):
    """A language model that samples rollouts and takes new weights in place."""

    @property
    def info(self) -> EngineInfo:
        """Facts of the loaded model. Valid after `start`."""
        ...

    async def start(self) -> None:
        """Load the model. Raises `BackendDown` with the reason when it cannot."""
        ...

    async def stop(self) -> None:
        """End every process and free the memory. Safe to call twice."""
        ...

    def is_alive(self) -> bool:
        """Whether the engine can still serve; False once its processes died."""
        ...

    def tokenize(self, content: str | Sequence[Message], limit: TimeLimit | None = None) -> list[int]:
        """Return ids of a text as it stands, or of a conversation with its generation prompt.

        Raises `LimitReached` for a chat template that takes more than `limit` allows.
        """
        ...

    async def generate(self, request: EngineRequest) -> EngineRollout:
        """Sample one rollout. Cancelling the task aborts it in the engine and frees what it held."""
        ...

    async def encode(self, prompt_token_ids: Sequence[int]) -> EngineEncoding:
        """Return the `prompt_hidden` that rollouts of a prompt would have, by one pass, for a prompt fit to be sampled.

        Cancelling the task aborts it in the engine and frees what it held.
        """
        ...

    @property
    def group_backend(self) -> str:
        """Of the groups that `receive` can take part in; empty where `nccl` is not set. Valid after `start`."""
        ...

    async def receive(self, body: Body) -> None:
        """Write into a file what comes through a group, while rollouts go on.

        Raises `BackendDown` when it does not come, or not in time; cancelling the task gives it up.
        """
        ...

    async def update_weights(self, weights: Path, policy_version: int) -> float:
        """Serve the parameters of a safetensors file from the next step boundary on.

        Running rollouts go on under the new version (their spans say so), or where `in_flight` is `abort` they end with
        what they have, at least a token, and finish_reason "abort"; prefix caches are dropped. Returns the
        seconds for which generation stood still. Raises `InvalidRequest`, with nothing changed, when the file does not
        fit the model.
        """
        ...

    async def update_adapter(self, folder: Path, policy_version: int) -> float:
        """Serve the model with an adapter, in place of any other, from the next step boundary on.

        For an engine whose `lora` is set, and which then takes no other weights. The folder is as peft writes them, and
        stays as it is until another is served. All else is as in `update_weights`.
        """
        ...
