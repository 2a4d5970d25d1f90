"""Load a model's generation_config.json without the entries that transformers would not load or save.

The file contains sampling defaults. Of these, only the tokens that end a response matter here, so an invalid entry must
not stop training or sampling.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_FILE = "generation_config.json"

_FIRST = (
    "eos_token_id",
    "bos_token_id",
    "pad_token_id",
    "do_sample",
    "num_beams",
    "return_dict_in_generate",
    "use_cache",
)
"""Entries that are checked first, because the validity of other entries depends on them."""

_TOKEN_IDS = ("eos_token_id", "bos_token_id", "pad_token_id")

_MAX_SHOWN = 5
"""Invalid entries that a message names."""
_MAX_CHARACTERS = 80
"""Characters of a value in a message."""

_INTERNAL = ("_from_model_config", "transformers_version")


def load_generation_config(model: str, make: Callable[..., Any]) -> tuple[Any | None, str]:
    """Return the generation settings of a model, or None if it has no file, and a message about omitted entries.

    Args:
        model: a Hugging Face folder, or a name on the hub.
        make: `transformers.GenerationConfig`.

    Returns:
        Settings that can be saved, and a message that is empty if nothing was omitted.
    """
    try:
        path = _path(model)
        if path is None:
            return None, ""
        values = json.loads(path.read_bytes())
        if not isinstance(values, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        return make(), f"{_FILE} of model {model} cannot be read and is ignored: {error}"
    return repaired(values, model, make)


def repaired(values: Mapping[str, Any], model: str, make: Callable[..., Any]) -> tuple[Any, str]:
    """Return generation settings with all valid `values`, and a message about the omitted ones."""
    whole = _valid(values, make)
    if whole is not None:
        return whole, ""
    kept: dict[str, Any] = {}
    omitted = []
    for name in sorted(values, key=lambda name: (_FIRST.index(name) if name in _FIRST else len(_FIRST), name)):
        if name in _INTERNAL:
            continue
        if _valid({**kept, name: values[name]}, make) is None:
            text = json.dumps(values[name], default=str)
            omitted.append(f"{name} {text if len(text) <= _MAX_CHARACTERS else text[:_MAX_CHARACTERS] + ' …'}")
        else:
            kept[name] = values[name]
    shown = ", ".join(omitted[:_MAX_SHOWN])
    more = f" and {len(omitted) - _MAX_SHOWN} more" if len(omitted) > _MAX_SHOWN else ""
    return _valid(kept, make), (
        f"{_FILE} of model {model} has invalid entries, which exports omit: {shown}{more}. "
        "Training does not use them. Correct the file to keep them"
    )


def _valid(values: Mapping[str, Any], make: Callable[..., Any]) -> Any | None:
    """Return the settings as transformers builds them from `values`; None if it would not load or save them."""
    if not all(_are_ids(values[name]) for name in _TOKEN_IDS if name in values):
        return None
    try:
        config = make(**values)
        config.validate(strict=True)
        config.to_json_string()
    except Exception:  # transformers compares values without checking their types: any exception can occur
        return None
    return config


def _are_ids(value: Any) -> bool:
    """Return whether a value is a token id, several of them, or None. transformers accepts anything."""
    return value is None or all(type(each) is int for each in (value if isinstance(value, list) else [value]))


def _path(model: str) -> Path | None:
    """Return the path of a model's file; None if it has none. Raises `OSError`."""
    if Path(model).is_dir():
        path = Path(model) / _FILE
        return path if path.exists() else None
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(model, _FILE))
    except (OSError, ValueError, huggingface_hub.errors.EntryNotFoundError):  # no network, no such model, or no file
        return None
