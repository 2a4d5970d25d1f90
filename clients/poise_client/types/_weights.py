"""What a generation replica serves, and what it is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Policy:
    """What a generation replica serves."""

    instance_id: str
    lineage_id: str
    policy_version: int
    digest: bytes
    ready: bool
    not_ready_reason: str
    engine: str
    model: str
    hidden_size: int
    feature_layer: int
    max_model_len: int
    num_running: int
    keeps_base: bool = False
    """Whether the weights last pushed are kept, for a delta to build on."""
    process_group_backend: str = ""
    """Backend of the process groups that it accepts for pushes, `nccl` or `gloo`; empty if it accepts none."""
    tokenizer_digest: bytes = b""
    """SHA-256 of the tokenizer with its chat template."""
    vocabulary_size: int = 0
    """Token ids that the model has embeddings for: 0 to this - 1."""


@dataclass(frozen=True, slots=True)
class WeightArray:
    """One parameter. bfloat16 is held as its raw uint16 bits."""

    array: NDArray[np.generic]
    dtype: Literal["float32", "float64", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True)
class Adapter:
    """Says that weights are a low-rank adapter's, named as in peft's files, and what they are served over."""

    rank: int
    alpha: float
    """What it adds, lora_B·lora_A, is scaled by alpha / rank."""
    base_digest: bytes
    """Of the model that it was trained on, as its files hold it."""


@dataclass(frozen=True, slots=True)
class WeightUpdate:
    """What became of a push."""

    policy_version: int
    already_applied: bool
    receive_s: float
    pause_s: float
