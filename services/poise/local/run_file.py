"""The one file of a run on this machine: `run.yaml`, and what each process is told because of it.

    run:        {name, dir, seed}
    model:      a known name (`poise models`), a Hugging Face folder or a name on the hub
    engine:     vllm | torch
    generation: value: learner: train:      any setting of that program

Owns the filling-in: addresses, folders, the queue. Starts nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError

from poise.generation.config import GenerationConfig
from poise.learner.config import LearnerConfig
from poise.local.models import model_folder
from poise.orchestrator.config import OrchestratorConfig
from poise.runtime.config import ConfigError, Settings, StrictModel, explain, parse_config, parse_overrides, read_yaml
from poise.runtime.files import write_file
from poise.value.config import ValueConfig

C = TypeVar("C", bound=Settings)

SERVICES = ("generation", "value", "learner")


class RunSection(StrictModel):
    """The run."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}$")
    """Names the run. The same name in the same folder resumes."""
    dir: Path | None = None
    """Its folder; null means runs/<name>."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Prompts and sampling follow from it."""


class RunFile(StrictModel):
    """What run.yaml holds."""

    run: RunSection = RunSection()
    """The run."""
    model: str
    """A known name (see `poise models`), a Hugging Face folder, or a name on the hub."""
    engine: Literal["vllm", "torch"] = "vllm"
    """What samples: vLLM, or transformers (exact and slow)."""
    generation: dict[str, Any] = Field({})
    """Settings of the generation service."""
    value: dict[str, Any] = Field({})
    """Settings of the value service."""
    learner: dict[str, Any] = Field({})
    """Settings of the learner service."""
    train: dict[str, Any] = Field({})
    """Settings of the training run."""


@dataclass(frozen=True)
class LocalRun:
    """A run on this machine, resolved and checked."""

    name: str
    dir: Path
    generation: GenerationConfig
    value: ValueConfig
    learner: LearnerConfig
    train: OrchestratorConfig
    trees: Mapping[str, Mapping[str, Any]]
    """What each program's settings file holds, by program."""
    socket: Path
    """Of the embedded Valkey."""

    @property
    def services_dir(self) -> Path:
        """Where the processes keep their settings, state and addresses."""
        return self.dir / "services"

    def log(self, process: str) -> Path:
        """A process's log."""
        return self.dir / "logs" / f"{process}.log"

    def grpc_address(self, service: str) -> str:
        """host:port of a service's gRPC."""
        return _address(self.trees[service])

    def admin_address(self, service: str) -> str:
        """host:port of a service's admin app."""
        config: GenerationConfig | ValueConfig | LearnerConfig = getattr(self, service)
        return f"{config.admin.host}:{config.admin.port}"


def preset_names() -> list[str]:
    """Return the presets that ship with the package."""
    return sorted(
        path.name.removesuffix(".yaml")
        for path in (resources.files("poise.local") / "presets").iterdir()
        if path.name.endswith(".yaml")
    )


def preset_path(name: str) -> Path:
    """Return a preset's file. Raises `ConfigError` for an unknown name."""
    if name not in preset_names():
        raise ConfigError(f"preset {name!r} is unknown; there are: {', '.join(preset_names())}")
    return Path(str(resources.files("poise.local") / "presets" / f"{name}.yaml"))


def load_run(path: Path, overrides: Sequence[str] = ()) -> LocalRun:
    """Read run.yaml, make its model ready, and resolve every program's settings.

    Raises:
        ConfigError: anything wrong, with the field's path and the remedy.
    """
    file = _parse(read_yaml(path), overrides, str(path))
    folder = (file.run.dir or Path("runs") / file.run.name).resolve()
    model = model_folder(file.model)
    trees = _fill_in(file, folder, str(model), _ports(folder), socket_path := _socket_path(folder))
    problems: list[str] = []
    generation = _resolve(GenerationConfig, trees, "generation", path, problems)
    value = _resolve(ValueConfig, trees, "value", path, problems)
    learner = _resolve(LearnerConfig, trees, "learner", path, problems)
    train = _resolve(OrchestratorConfig, trees, "train", path, problems)
    if generation is None or value is None or learner is None or train is None:
        raise ConfigError("\n".join(problems))
    return LocalRun(file.run.name, folder, generation, value, learner, train, trees, socket_path)


def _parse(values: dict[str, Any], overrides: Sequence[str], source: str) -> RunFile:
    try:
        return RunFile(**_merged(values, parse_overrides(overrides)))
    except ValidationError as error:
        raise ConfigError("\n".join(f"{source}: {line}" for line in explain(error, RunFile))) from None


def _fill_in(
    file: RunFile, folder: Path, model: str, ports: Mapping[str, int], socket_path: Path
) -> dict[str, dict[str, Any]]:
    """Return each program's settings: what follows from the run, under what the file says."""
    services = folder / "services"

    def listens(service: str) -> dict[str, Any]:
        return {"grpc": {"port": ports[f"{service}.grpc"]}, "admin": {"port": ports[f"{service}.admin"]}}

    generation = _merged(
        listens("generation") | {"model": model, "engine": file.engine, "wait_for_learner": True}, file.generation
    )
    value = _merged(
        listens("value") | {"state_dir": str(services / "value"), "queue": {"url": f"unix://{socket_path}"}},
        file.value,
    )
    learner = _merged(
        listens("learner")
        | {
            "model": model,
            "state_dir": str(services / "learner"),
            "export_dir": str(folder),
            "replicas": [_address(generation)],
            "seed": file.run.seed,
        },
        file.learner,
    )
    train = _merged(
        {
            "run_id": file.run.name,
            "run_dir": str(folder),
            "seed": file.run.seed,
            "endpoints": {
                "generation": [_address(generation)],
                "value": _address(value),
                "learner": _address(learner),
            },
        },
        file.train,
    )
    return {"generation": generation, "value": value, "learner": learner, "train": train}


def _address(tree: Mapping[str, Any]) -> str:
    return f"{tree['grpc'].get('host', '127.0.0.1')}:{tree['grpc']['port']}"


def _resolve(cls: type[C], trees: Mapping[str, Any], name: str, path: Path, problems: list[str]) -> C | None:
    """Return a program's settings; None, with what is wrong added to `problems`, when they cannot be."""
    try:
        return parse_config(cls, trees[name], source=f"{path}: {name}")
    except ConfigError as error:
        problems.append(str(error))
        return None


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return `below` with `above` laid over it, section by section."""
    result = dict(below)
    for key, value in above.items():
        known = result.get(key)
        result[key] = _merged(known, value) if isinstance(known, Mapping) and isinstance(value, Mapping) else value
    return result


def _ports(folder: Path) -> dict[str, int]:
    """Return the run's ports: chosen once, so that a restarted process is found where it was."""
    path = folder / "services" / "ports.json"
    names = [f"{service}.{kind}" for service in SERVICES for kind in ("grpc", "admin")]
    if path.exists():
        try:
            ports: dict[str, int] = json.loads(path.read_text())
        except ValueError:
            ports = {}
        if ports.keys() == set(names):
            return ports
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in names]  # all at once: none is chosen twice
    ports = {name: listener.getsockname()[1] for name, listener in zip(names, listeners, strict=True)}
    for listener in listeners:
        listener.close()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(ports).encode())
    return ports


def _socket_path(folder: Path) -> Path:
    """Return where the Valkey's socket goes: a path within a socket's limit of about 100 characters."""
    name = hashlib.sha256(str(folder).encode()).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"poise-{os.getuid()}-{name}" / "valkey.sock"
