"""The policy that a generation replica serves, and the weights that a learner pushes to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Policy:
    """The served policy and the properties of the engine."""

    instance_id: str
    """Changes at each start of the replica."""
    lineage_id: str
    """Id of the learner that numbers the versions; empty before the first push."""
    policy_version: int
    """0 before the first push."""
    digest: bytes
    """Digest of the weights pushed last; empty before the first push."""
    ready: bool
    """Whether the replica accepts rollouts."""
    not_ready_reason: str
    engine: str
    """"vllm" or "torch"."""
    model: str
    hidden_size: int
    """Width d of the features."""
    feature_layer: int
    """Decoder layer of the features, from 0."""
    max_model_len: int
    """Maximum number of tokens of prompt and response together."""
    num_running: int
    """Rollouts running now."""
    keeps_base: bool = False
    """Whether the replica kept the weights pushed last, and so accepts a delta to them."""
    process_group_backend: str = ""
    """Backend of the process groups that it accepts for pushes, "nccl" or "gloo"; empty if it accepts none."""
    tokenizer_digest: bytes = b""
    """SHA-256 of the tokenizer with its chat template."""
    vocabulary_size: int = 0
    """Number of token ids with an embedding."""


@dataclass(frozen=True, slots=True)
class WeightArray:
    """One parameter. bfloat16 is represented as raw uint16 bits."""

    array: NDArray[np.generic]
    dtype: Literal["float32", "float64", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True)
class Adapter:
    """A low-rank adapter, whose tensors are named as in peft's files."""

    rank: int
    alpha: float
    """The adapter adds alpha / rank · lora_B·lora_A."""
    base_digest: bytes
    """Digest of the model that it was trained on, as stored in its files."""


@dataclass(frozen=True, slots=True)
class WeightUpdate:
    """The result of a push."""

    policy_version: int
    """The version now served."""
    already_applied: bool
    """Whether this version and digest were already served, so nothing changed."""
    receive_s: float
    """Seconds spent receiving and checking."""
    pause_s: float
    """Seconds for which sampling was paused."""
