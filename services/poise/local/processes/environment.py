"""The environment of a local run's processes, without variables that are meant for other programs."""

from __future__ import annotations

import os
from collections.abc import Mapping

_OTHERS = (
    # Set by torchrun or SLURM if `poise` runs in their job: the learner would join it.
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK"),
    *("ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
    # For networks between machines; all processes of a run are on this one.
    *("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "VLLM_HOST_IP", "VLLM_PORT"),
    # A process would wait for input when it ends, and exit with status 0.
    "PYTHONINSPECT",
)
_OTHERS_PREFIX = "TORCHELASTIC_"


def child_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment of a child process, which uses UTF-8 under any locale."""
    kept = {k: v for k, v in environment.items() if k not in _OTHERS and not k.startswith(_OTHERS_PREFIX)}
    return kept | {"PYTHONUTF8": "1"}
