"""A low-rank adapter as engines are given it: a folder as peft writes them. Knows neither torch nor vLLM.

Shapes: r the adapter's rank; a linear module's weight is [out, in], its lora_A [r, in], its lora_B [out, r].
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from poise.errors import BackendDown, InvalidRequest, VersionMismatch
from poise.generation.config import GenerationConfig
from poise.generation.weights.manifest import check_weights
from poise.runtime.files.scratch import ScratchFolder
from poise_client.types import Adapter

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
PREFIX = "base_model.model."
DOWN, UP = ".lora_A.weight", ".lora_B.weight"


def admit_adapter(adapter: Adapter | None, config: GenerationConfig, base_digest: bytes) -> None:
    """Check that a push brings what this replica takes: adapters over its base where `lora` is set, else none.

    Raises:
        InvalidRequest: it brings the other, or an adapter that cannot be.
        VersionMismatch: the adapter belongs to another model.
    """
    if config.lora is None:
        if adapter is not None:
            raise InvalidRequest.field("manifest.adapter", "is set; this replica takes whole parameters: set `lora`")
        return
    if adapter is None:
        raise InvalidRequest.field(
            "manifest.adapter",
            "is unset; this replica takes adapters alone, for `lora` is set: push.transport is `lora`",
        )
    if not 1 <= adapter.rank <= config.lora.max_rank:
        raise InvalidRequest.field(
            "manifest.adapter.rank", f"is {adapter.rank}; required: 1 to {config.lora.max_rank} (lora.max_rank)"
        )
    if not (math.isfinite(adapter.alpha) and adapter.alpha > 0):
        raise InvalidRequest.field("manifest.adapter.alpha", f"is {adapter.alpha:g}; required: above 0")
    if adapter.base_digest != base_digest:
        raise VersionMismatch(
            f"the adapter belongs to base {adapter.base_digest.hex()[:16]}, and this replica started from "
            f"{config.model}, which is {base_digest.hex()[:16]}",
            remedy="Start the replica and the learner from the same model.",
        )


def adapted_modules(names: Iterable[str]) -> set[str]:
    """Return the modules that an adapter's tensors belong to, by their names in the model."""
    return {
        name.removeprefix(PREFIX).removesuffix(side)
        for name in names
        for side in (DOWN, UP)
        if name.startswith(PREFIX) and name.endswith(side)
    }


def check_adapter(parameters: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]], rank: int) -> None:
    """Raise `InvalidRequest` naming what of an adapter is missing, of another shape, or of no linear module.

    Args:
        parameters: shapes of the model's, by name.
        given: shapes of the adapter's tensors, by name in peft's files.
        rank: r.
    """
    expected: dict[str, tuple[int, ...]] = {}
    for module in adapted_modules(given):
        shape = parameters.get(f"{module}.weight", ())
        if len(shape) == 2:
            expected[f"{PREFIX}{module}{DOWN}"] = (rank, shape[1])
            expected[f"{PREFIX}{module}{UP}"] = (shape[0], rank)
    check_weights(expected, given)


@contextlib.contextmanager
def laid_out(weights: Path, names: Iterable[str], adapter: Adapter, scratch: ScratchFolder) -> Iterator[Path]:
    """Give a folder as peft writes it, of a file of an adapter's tensors. Removed if the context ends in an error.

    Raises:
        BackendDown: there is no room for it.
    """
    folder = None
    try:
        try:
            folder = Path(tempfile.mkdtemp(prefix="adapter-", dir=scratch.ensure()))
            weights.rename(folder / WEIGHTS_FILE)
            (folder / CONFIG_FILE).write_text(json.dumps(_peft_config(names, adapter)), encoding="utf-8")
        except OSError as error:
            raise BackendDown(f"the adapter cannot be stored in {scratch.parent}: {error.strerror}") from error
        yield folder
    except BaseException:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def read_config(folder: Path) -> tuple[int, float]:
    """Return rank and alpha of the adapter in a folder. Raises `InvalidRequest` when they cannot be read."""
    try:
        config = json.loads((folder / CONFIG_FILE).read_bytes())
        return int(config["r"]), float(config["lora_alpha"])
    except (OSError, ValueError, KeyError) as error:
        raise InvalidRequest.field("adapter", f"cannot be read: {error}") from error


def _peft_config(names: Iterable[str], adapter: Adapter) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "target_modules": sorted(adapted_modules(names)),
    }
