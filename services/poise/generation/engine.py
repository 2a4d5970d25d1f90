"""The interface of inference engines, implemented by `engines.vllm` and `engines.transformers`.

One suite of contract tests runs on every implementation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from poise.generation.prompts.time_limit import TimeLimit
from poise.generation.weights.process_group import GroupPayload
from poise_client.types import EncodedPrompt, Message, Rollout, RolloutId, Sampling


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """Facts about the loaded model that do not change while the engine runs."""

    engine: str
    model: str
    hidden_size: int
    num_layers: int
    feature_layer: int
    max_model_len: int
    vocabulary_size: int
    tokenizer_digest: bytes = b""
    """SHA-256 of the tokenizer with its chat template; empty if unknown."""


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One rollout to sample."""

    id: RolloutId
    """Copied into the rollout."""
    prompt_token_ids: Sequence[int]
    """At least one token, and fewer than max_model_len."""
    sampling: Sampling
    """Its max_tokens is at least 1 and at most max_model_len minus the prompt's tokens."""


class Engine(Protocol):
    """A language model that samples rollouts and replaces its weights in place."""

    @property
    def info(self) -> EngineInfo:
        """Facts about the model. Raises `Starting` before `start` returned."""
        ...

    async def start(self) -> None:
        """Load the model. Raises `BackendDown` with the reason if that fails."""
        ...

    async def stop(self) -> None:
        """End all processes and free the memory. Safe to call twice."""
        ...

    def is_alive(self) -> bool:
        """Return whether the engine can still serve; False once its processes died."""
        ...

    def tokenize(self, content: str | Sequence[Message], limit: TimeLimit | None = None) -> list[int]:
        """Return the token ids of a text, or of a conversation with its generation prompt.

        Raises:
            InvalidRequest: the tokenizer or the chat template rejects the content.
            LimitReached: the chat template exceeds `limit`.
        """
        ...

    async def generate(self, request: EngineRequest) -> Rollout:
        """Sample one rollout, with its token entropies. Cancelling aborts it and frees its memory."""
        ...

    async def encode(self, group_id: str, prompt_token_ids: Sequence[int]) -> EncodedPrompt:
        """Return the `prompt_hidden` that rollouts of this prompt would have, from one forward pass.

        The prompt must leave space for one response token. Cancelling aborts the pass and frees its memory.
        """
        ...

    @property
    def process_group_backend(self) -> str:
        """Backend of the process groups that `receive_payload` can join; empty without `nccl`. Valid after `start`."""
        ...

    async def receive_payload(self, payload: GroupPayload) -> None:
        """Receive the payload of a push through a process group, while sampling continues.

        Cancelling aborts it.

        Raises:
            BackendDown: the payload did not arrive, or not in time.
        """
        ...

    async def update_weights(self, weights: Path, policy_version: int) -> float:
        """Serve the parameters in a safetensors file from the next step boundary on. Drops prefix caches.

        With `in_flight: keep`, running rollouts continue under the new version, and their version spans show it. With
        `abort`, they end with the tokens they have, at least one, and finish_reason "abort".

        Returns the seconds for which generation paused.

        Raises:
            InvalidRequest: the file does not fit the model. Nothing changed.
        """
        ...

    async def update_adapter(self, folder: Path, policy_version: int) -> float:
        """Serve the model with the adapter in a peft folder, as `update_weights` does with parameters.

        Only for an engine with `lora` set, which accepts no other weights. The folder must not change while the adapter
        is served.
        """
        ...
