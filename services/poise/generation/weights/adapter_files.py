"""Adapter folders in peft's format: writes and reads them, and checks that their tensors fit a model.

Shapes: r the adapter's rank; a linear module's weight is [out, in], its lora_A [r, in], its lora_B [out, r].
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from poise.errors import BackendDown, InvalidRequest
from poise.generation.weights.manifest import check_shapes
from poise.runtime.files.scratch import ScratchFolder
from poise_client.types import Adapter

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
PREFIX = "base_model.model."
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"


def adapted_modules(names: Iterable[str]) -> set[str]:
    """Return the names of the model's modules that an adapter's tensors belong to."""
    return {
        name.removeprefix(PREFIX).removesuffix(side)
        for name in names
        for side in (LORA_A, LORA_B)
        if name.startswith(PREFIX) and name.endswith(side)
    }


def check_adapter(model: Mapping[str, tuple[int, ...]], adapter: Mapping[str, tuple[int, ...]], rank: int) -> None:
    """Raise `InvalidRequest` that lists the adapter's missing, misshapen and unknown tensors.

    Args:
        model: shapes of the model's parameters, by name.
        adapter: shapes of the adapter's tensors, by their names in peft's files.
        rank: r.
    """
    expected: dict[str, tuple[int, ...]] = {}
    for module in adapted_modules(adapter):
        shape = model.get(f"{module}.weight", ())
        if len(shape) == 2:
            expected[f"{PREFIX}{module}{LORA_A}"] = (rank, shape[1])
            expected[f"{PREFIX}{module}{LORA_B}"] = (shape[0], rank)
    check_shapes(expected, adapter)


@contextlib.contextmanager
def adapter_folder(weights: Path, names: Iterable[str], adapter: Adapter, scratch: ScratchFolder) -> Iterator[Path]:
    """Move an adapter's tensors into a new folder in peft's format. Remove the folder if the context raises.

    Raises:
        BackendDown: the folder cannot be written.
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
    """Return rank and alpha of the adapter in a folder. Raises `InvalidRequest` if they cannot be read."""
    try:
        config = json.loads((folder / CONFIG_FILE).read_bytes())
        return int(config["r"]), float(config["lora_alpha"])
    except (OSError, ValueError, KeyError) as error:
        raise InvalidRequest.field("adapter", f"{folder / CONFIG_FILE} cannot be read: {error}") from error


def _peft_config(names: Iterable[str], adapter: Adapter) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "target_modules": sorted(adapted_modules(names)),
    }
