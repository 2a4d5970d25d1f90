"""Start vLLM's processes quickly.

On a CPU, vLLM spawns them, and each then imports vllm and torch again, for eight seconds of CPU. A fork of the test's
process has them already. `tests/e2e/test_vllm_run.py` spawns them, as in production.

A process whose threads hold gloo's groups must not fork: the child crashes when it frees them. So
`tests/contract/test_weights_over_groups.py` spawns, and its name puts it behind all files that fork.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import warnings
from collections.abc import Iterator

import pytest

from poise.generation.config import GenerationConfig
from poise.generation.engines.vllm.launch import import_vllm


@contextlib.contextmanager
def forked_processes() -> Iterator[None]:
    """Make engines that start meanwhile fork vLLM's processes, without warnings of vLLM's imports."""

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")

        def import_and_patch(config: GenerationConfig) -> None:
            import_vllm(config)
            for module in ("vllm.v1.engine.utils", "vllm.v1.executor.multiproc_executor"):
                patch.setattr(f"{module}.get_mp_context", lambda: multiprocessing.get_context("fork"))

        patch.setattr("poise.generation.engines.vllm.engine.import_vllm", import_and_patch)
        yield
