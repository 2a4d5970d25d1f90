"""The settings of the generation service."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from poise.algorithms.features import POOL_TOKENS
from poise.runtime.config.settings import AdminConfig, GrpcConfig, ServiceConfig, StrictModel


class VllmConfig(StrictModel):
    """Settings of the `vllm` engine."""

    kv_cache_gib: float = Field(1.0, gt=0)
    """Size of the KV cache on a CPU, GiB. On GPUs `gpu_memory_utilization` rules."""
    enforce_eager: bool = True
    """Run without torch.compile and CUDA graphs: starts minutes sooner, decodes slower on GPUs."""
    prefix_caching: bool = True
    """Compute what prompts begin with alike once a policy version: of siblings, all but the end of their prompt. Blocks
    are of 16 tokens, on a CPU 128; a prompt reads none that holds one of its last `prompt_pool_tokens`."""
    tensor_parallel_size: int = Field(1, ge=1)
    """GPUs that share one replica."""
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    """Share of each GPU's memory that vLLM may take."""
    threads: int | None = Field(None, ge=1)
    """CPU threads of the worker; null leaves it to vLLM."""
    start_timeout_s: float = Field(600.0, gt=0)
    """How long loading may take, s."""


class TorchConfig(StrictModel):
    """Settings of the `torch` engine."""

    threads: int = Field(1, ge=1)
    """CPU threads."""
    device: str = "cpu"
    """A torch device, such as `cpu` or `cuda:0`."""


class LoraConfig(StrictModel):
    """Serve low-rank adapters over the model, as learners with `push.transport: lora` send them."""

    max_rank: int = Field(32, ge=1, le=512)
    """Largest rank of an adapter."""


class GenerationConfig(ServiceConfig):
    """The generation service."""

    model_config = SettingsConfigDict(env_prefix="POISE_GENERATION_")

    grpc: GrpcConfig = GrpcConfig(port=50051)
    """Where the gRPC service listens."""
    admin: AdminConfig = AdminConfig(port=8051)
    """Where the admin app listens."""
    model: str
    """Hugging Face folder of the model, or its name on the hub."""
    engine: Literal["vllm", "torch"] = "vllm"
    """`vllm` is fast; `torch` (transformers) is exact and slow, the reference for tests and tiny models."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Element type of weights and activations; `auto` takes the checkpoint's."""
    max_model_len: int | None = Field(None, ge=2)
    """Most tokens of prompt and response together; null takes the model's own limit, or 8192 where it has none."""
    max_num_seqs: int = Field(64, ge=1)
    """Most rollouts sampled at once."""
    max_queued_rollouts: int = Field(65536, ge=1)
    """Most rollouts accepted and not finished; beyond, a request is refused with BUSY."""
    default_max_tokens: int = Field(256, ge=1)
    """Response tokens of a request that names no limit."""
    feature_layer: int | None = Field(None, ge=0)
    """Decoder layer, 0-based, whose output is pooled; null takes `round(0.53 x layers)`."""
    prompt_pool_tokens: int = Field(POOL_TOKENS, ge=1)
    """How many of the last prompt tokens `prompt_hidden` averages. Changed, it asks for new probes: another domain."""
    response_pool_tokens: int = Field(POOL_TOKENS, ge=1, le=256)
    """How many response tokens `response_hidden` averages; `vllm` keeps the states of 22 more, of each rollout."""
    wait_for_learner: bool = False
    """Be ready only once a learner has pushed its weights: for training, where both must hold the same policy."""
    staging_dir: Path | None = None
    """Where a push is collected before it is applied; memory-backed is fastest. Holds one model at a time, with
    `keep_base` one always and two during a push. Null takes `/dev/shm` where it has room for the model twice, else the
    folder for temporary files."""
    keep_base: bool = True
    """Keep the weights last applied in `staging_dir`, so that the next push need only bring what changed. They are kept
    only if the learner will send deltas and there is room for the next version beside them."""
    shared_dirs: tuple[Path, ...] = ()
    """Folders in which a push may name a file, for learners on this host with `push.transport: shared`; none refuses
    such pushes. Hard links save the copy where `staging_dir` lies on the same disk."""
    in_flight: Literal["keep", "abort"] = "keep"
    """What new weights do to the rollouts being sampled: `keep` lets them go on under the new version, as their version
    spans say; `abort` ends them with finish_reason "abort" and what they have."""
    max_update_bytes: int = Field(64 * 2**30, ge=1)
    """Largest push."""
    lora: LoraConfig | None = None
    """Take adapters instead of whole parameters, and sample from the model with the adapter, unmerged."""
    nccl: bool = False
    """Take pushes of learners with `push.transport: nccl` from GPU to GPU; on CPUs of one host gloo stands in."""
    vllm: VllmConfig = VllmConfig()
    """The `vllm` engine."""
    torch: TorchConfig = TorchConfig()
    """The `torch` engine."""
