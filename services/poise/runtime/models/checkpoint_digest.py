"""A digest of a model's parameters. Two services compare it to check that they start from the same model."""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterator
from pathlib import Path

from poise.errors import Unusable
from poise_client import combine_digests

EXPORT_MARK = "poise_export.json"
"""File in every exported model with its policy version. A folder without it is never replaced."""

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def checkpoint_digest(model: str) -> bytes:
    """Return the SHA-256 over the SHA-256 of each parameter in the model's safetensors files, in order of name.

    Args:
        model: a Hugging Face folder, or a name on the hub; its files are then downloaded if necessary.

    Raises:
        Unusable: the model does not exist, or has no safetensors files.
    """
    try:
        folder = _folder(model)
        hashes = {name: sha256 for path in _files(folder) for name, sha256 in _hashes(path)}
    except (OSError, ValueError, KeyError) as error:
        raise Unusable(
            f"the parameters of {model} cannot be read: {error}",
            remedy=f"Adapters need a model whose folder has a {_SINGLE} or a {_INDEX}.",
        ) from error
    return combine_digests(hashes)


def _folder(model: str) -> Path:
    if Path(model).is_dir():
        return Path(model)
    import huggingface_hub

    return Path(huggingface_hub.snapshot_download(model, allow_patterns="model*.safetensors*"))


def _files(folder: Path) -> list[Path]:
    """Return the weight files of a folder that transformers loads."""
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    index = json.loads((folder / _INDEX).read_bytes())
    return [folder / name for name in sorted(set(index["weight_map"].values()))]


def _hashes(path: Path) -> Iterator[tuple[str, bytes]]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as content:
        start = 8 + int.from_bytes(content[:8], "little")
        for name, about in json.loads(content[8:start]).items():
            if name != "__metadata__":
                begin, end = about["data_offsets"]
                with memoryview(content) as view, view[start + begin : start + end] as parameter:
                    yield name, hashlib.sha256(parameter).digest()
