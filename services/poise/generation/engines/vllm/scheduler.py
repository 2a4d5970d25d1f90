"""vLLM's scheduler, changed to never read pooled tokens from the prefix cache. vLLM's processes import it by name.

Cached tokens do not go through the model, so they have no hidden states. The search for cached blocks therefore stops
before the last tokens of a prompt, which `prompt_hidden` averages. Siblings share the rest of their prompt, and other
prompts share common beginnings. Every rollout computes at least the blocks of its pooled tokens: up to 15 extra tokens
on a GPU, and up to 127 on a CPU.

vLLM empties the cache when it pauses for new weights, and fails the update if it cannot.
"""

from __future__ import annotations

import logging
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler


class _ComputesPooledTokens:
    """Never reads pooled prompt tokens from the cache, except after a preemption, when they are already recorded."""

    def _get_local_prefix_cache_hit(self: Any, request: Any) -> tuple[Any, int, int, bool]:
        """Return the cached blocks, their token count, `shared_end`, and False, as vLLM's own method does.

        `shared_end` is the end of a longer prefix that only some layers have cached, or 0.
        """
        if request.num_output_tokens:
            return super()._get_local_prefix_cache_hit(request)  # type: ignore[misc, no-any-return]
        manager = self.kv_cache_manager
        limit = request.num_prompt_tokens - request.sampling_params.extra_args["poise_pool_tokens"]
        if limit <= 0 or not manager.prefix_cache_lookup_enabled(request):
            return manager.empty_kv_cache_blocks, 0, 0, False
        blocks, num_cached, num_missing = manager.coordinator.find_longest_cache_hit(request.block_hashes, limit)
        shared_end = num_cached + num_missing if num_missing else 0
        return manager.create_kv_cache_blocks(blocks), num_cached, shared_end, False


class _Scheduler(_ComputesPooledTokens, Scheduler):  # type: ignore[misc]
    pass


class _AsyncScheduler(_ComputesPooledTokens, AsyncScheduler):  # type: ignore[misc]
    pass


class PoiseScheduler:
    """Constructs the asynchronous (GPU) or synchronous (CPU) scheduler, as vLLM's configuration says."""

    def __new__(cls, *, vllm_config: Any, **arguments: Any) -> Any:
        """See vLLM."""
        chosen = _AsyncScheduler if vllm_config.scheduler_config.async_scheduling else _Scheduler
        return chosen(vllm_config=vllm_config, **arguments)


def _keep_record(record: logging.LogRecord) -> bool:
    """Drop vLLM's warning that custom schedulers disable asynchronous scheduling. This one supports it."""
    return not str(record.msg).startswith("Using custom scheduler class")


# vLLM's engine process imports this module before it logs the warning.
logging.getLogger("vllm.config.scheduler").addFilter(_keep_record)
