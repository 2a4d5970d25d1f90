"""What the processes of a local run inherit of the environment: all but what is meant for other programs."""

from __future__ import annotations

import os
from collections.abc import Mapping

_OTHERS = (
    # torchrun's and SLURM's, of a job that `poise` was started in: the learner would take itself for a part of it.
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK"),
    *("ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
    # Of networks between machines, while all processes of a run are on this one.
    *("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "VLLM_HOST_IP", "VLLM_PORT"),
    # A process would wait for input at its end, and exit with status 0.
    "PYTHONINSPECT",
)
_OTHERS_PREFIX = "TORCHELASTIC_"


def inherited(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment of a process of a run, which reads and writes UTF-8 under any locale."""
    kept = {k: v for k, v in environment.items() if k not in _OTHERS and not k.startswith(_OTHERS_PREFIX)}
    return kept | {"PYTHONUTF8": "1"}
