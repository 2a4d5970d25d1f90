from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from poise.errors import BackendDown
from poise.runtime.models.checkpoint_digest import checkpoint_digest
from poise_client import weights_digest
from poise_client.types import WeightArray

ARRAYS = {"b.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "a.weight": np.ones(5, np.float32)}
DIGEST = weights_digest({name: WeightArray(array, "float32") for name, array in ARRAYS.items()})


def test_digest_equals_that_of_a_push(tmp_path: Path) -> None:
    save_file(ARRAYS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert checkpoint_digest(str(tmp_path)) == DIGEST


def test_sharded_files_have_the_same_digest(tmp_path: Path) -> None:
    for i, (name, array) in enumerate(ARRAYS.items()):
        save_file({name: array}, tmp_path / f"model-{i}.safetensors")
    index = {"weight_map": {name: f"model-{i}.safetensors" for i, name in enumerate(ARRAYS)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert checkpoint_digest(str(tmp_path)) == DIGEST


def test_changed_value_changes_the_digest(tmp_path: Path) -> None:
    save_file(ARRAYS | {"a.weight": np.zeros(5, np.float32)}, tmp_path / "model.safetensors")
    assert checkpoint_digest(str(tmp_path)) != DIGEST


@pytest.mark.parametrize("content", [None, b"", b"\xff" * 8])
def test_folder_without_safetensors_is_rejected(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(BackendDown, match=str(tmp_path)):
        checkpoint_digest(str(tmp_path))
