"""Prompts, and what comes of them: rollouts with their features.

Shapes: P prompt tokens, T response tokens, d the model's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]

FinishReason = Literal["stop", "length", "abort"]


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


PromptContent = str | Sequence[Message] | Sequence[int]
"""Text as it stands, a conversation to be rendered with the chat template, or token ids."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, whose rollouts form a group."""

    group_id: str
    content: PromptContent


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn."""

    temperature: float = 1.0
    """Logprobs, entropies and the loss refer to the distribution after it. 0 is greedy, for evaluation only."""
    top_p: float = 1.0
    top_k: int = 0
    """0 means all."""
    max_tokens: int = 0
    """0 means the service's default."""
    stop: tuple[str, ...] = ()
    """Strings that end a response; they stay in it. They may name special tokens, such as `<|im_end|>`."""
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a response, besides the model's own; they stay in it."""


@dataclass(frozen=True, slots=True)
class RolloutId:
    """Names one rollout for ever."""

    run_id: str
    step: int
    group_id: str
    rollout_index: int


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Response tokens [start_token, end_token) that one policy version sampled."""

    start_token: int
    end_token: int
    policy_version: int


@dataclass(frozen=True, slots=True)
class EntropyStats:
    """Token entropies over a stretch, nats; zeros for an empty one."""

    mean: float = 0.0
    last: float = 0.0
    max: float = 0.0
    min: float = 0.0


@dataclass(frozen=True, slots=True)
class Features:
    """What the probe sees of one rollout."""

    prompt_hidden: Floats
    """[d]"""
    response_hidden: Floats
    """[d]"""
    output_entropy: EntropyStats = EntropyStats()
    reasoning_entropy: EntropyStats = EntropyStats()
    answer_entropy: EntropyStats = EntropyStats()


@dataclass(frozen=True, slots=True)
class Rollout:
    """One finished rollout."""

    id: RolloutId
    token_ids: Ints
    """[T], the stop token included when one was sampled."""
    logprobs: Floats
    """[T], nats, under the full-vocabulary distribution after temperature."""
    features: Features
    version_spans: tuple[VersionSpan, ...]
    finish_reason: FinishReason
    text: str
    token_entropies: Floats | None = None
    """[T], nats; only when asked for."""
    first_token_s: float = 0.0
    total_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Group:
    """The finished siblings of one prompt."""

    group_id: str
    prompt_token_ids: Ints
    """[P]"""
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True, slots=True)
class PromptCheck:
    """What a replica's tokenizer makes of a prompt."""

    group_id: str
    num_tokens: int
    """0 where it cannot be sampled."""
    problem: str
    """Why it cannot be sampled, however long it may be; empty when it can be."""


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt's state, from one pass through the model without sampling."""

    group_id: str
    num_prompt_tokens: int
    prompt_hidden: Floats
    """[d]: what it would be in the features of the prompt's rollouts."""
    policy_version: int
    """Whose state it is."""
