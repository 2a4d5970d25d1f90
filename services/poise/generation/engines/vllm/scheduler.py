"""vLLM's scheduler, reading the prefix cache up to the tokens whose states are pooled. Imported inside vLLM, by name.

What is read from the cache does not go through the model and gives no states. So the search for cached blocks ends
before a prompt's last tokens, those that `prompt_hidden` averages: siblings share their prompt, and different prompts
their beginning, and each rollout still sees all the states it must pool. A prompt's end is computed at least from its
first pooled token's block on: on a GPU, at most 15 tokens more than are pooled; on a CPU, 127.

vLLM empties the cache itself when it pauses for new weights, and fails the update if it cannot.
"""

from __future__ import annotations

import logging
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler


class _SparesPooled:
    """Keeps the cache from a prompt's pooled tokens. What a rollout that goes on has cached, it has recorded."""

    def _get_local_prefix_cache_hit(self: Any, request: Any) -> tuple[Any, int, int, bool]:
        """Return the cached blocks, the tokens in them, where a shared prefix ends that some layers lack, and False."""
        if request.num_output_tokens:
            return super()._get_local_prefix_cache_hit(request)  # type: ignore[misc, no-any-return]
        manager = self.kv_cache_manager
        limit = request.num_prompt_tokens - request.sampling_params.extra_args["poise_pool_tokens"]
        if limit <= 0 or not manager.prefix_cache_lookup_enabled(request):
            return manager.empty_kv_cache_blocks, 0, 0, False
        blocks, num_cached, num_lacked = manager.coordinator.find_longest_cache_hit(request.block_hashes, limit)
        shared_end = num_cached + num_lacked if num_lacked else 0
        return manager.create_kv_cache_blocks(blocks), num_cached, shared_end, False


class _Scheduler(_SparesPooled, Scheduler):  # type: ignore[misc]
    pass


class _AsyncScheduler(_SparesPooled, AsyncScheduler):  # type: ignore[misc]
    pass


class PoiseScheduler:
    """Becomes the scheduler for how vLLM will step: ahead of the device, as on GPUs, or not, as on CPUs."""

    def __new__(cls, *, vllm_config: Any, **arguments: Any) -> Any:
        """See vLLM."""
        chosen = _AsyncScheduler if vllm_config.scheduler_config.async_scheduling else _Scheduler
        return chosen(vllm_config=vllm_config, **arguments)


def _is_true(record: logging.LogRecord) -> bool:
    """Whether a record is not vLLM's warning that stepping ahead is off with a scheduler that is not its own."""
    return not str(record.msg).startswith("Using custom scheduler class")


# Here, for vLLM's engine process imports this module with its settings, and warns next.
logging.getLogger("vllm.config.scheduler").addFilter(_is_true)
