"""The one file of a run on this machine: `run.yaml`, and what each process is told because of it.

    run:        {name, dir, seed}
    model:      a known name (`poise models`), a Hugging Face folder or a name on the hub
    engine:     vllm | torch
    generation: value: learner: train:      any setting of that program

Owns the filling-in: addresses, folders, the queue. Starts nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError

from poise.generation.config import GenerationConfig
from poise.learner.config import LearnerConfig
from poise.local.addresses import SERVICES, address, run_ports, socket_path
from poise.local.credentials import wanted_by
from poise.local.models.catalog import locate_model
from poise.local.token import missing_tokens
from poise.orchestrator.config import OrchestratorConfig
from poise.runtime.config.merge import merged
from poise.runtime.config.settings import (
    ConfigError,
    ServiceConfig,
    Settings,
    StrictModel,
    parse_config,
    parse_overrides,
    read_yaml,
)
from poise.runtime.config.text import explain
from poise.value.config import ValueConfig

C = TypeVar("C", bound=Settings)

CONFIGS: Mapping[str, type[Settings]] = {
    "generation": GenerationConfig,
    "value": ValueConfig,
    "learner": LearnerConfig,
    "train": OrchestratorConfig,
}
"""What each program's settings are."""

PROGRAMS = tuple(CONFIGS)


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
    model: str
    """As the file names it."""
    generation: GenerationConfig
    value: ValueConfig
    learner: LearnerConfig
    train: OrchestratorConfig
    trees: Mapping[str, Mapping[str, Any]]
    """What each program's settings file holds, by program."""
    overrides: Mapping[str, Sequence[str]]
    """What each program's command line says besides, by program."""
    socket: Path
    """Of the embedded Valkey."""

    @property
    def services_dir(self) -> Path:
        """Where the processes keep their settings, state and addresses."""
        return self.dir / "services"

    @property
    def drain_timeout_s(self) -> float:
        """How long the services may take to finish their work in hand, s."""
        return max(self._service(name).drain_timeout_s for name in SERVICES)

    def log(self, process: str) -> Path:
        """A process's log."""
        return self.dir / "logs" / f"{process}.log"

    def grpc_address(self, service: str) -> str:
        """host:port where this machine reaches a service's gRPC."""
        return address(self._service(service).grpc)

    def admin_address(self, service: str) -> str:
        """host:port where this machine reaches a service's admin app."""
        return address(self._service(service).admin)

    def _service(self, name: str) -> ServiceConfig:
        config: ServiceConfig = getattr(self, name)
        return config


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
    """Read run.yaml and resolve every program's settings.

    Raises:
        ConfigError: anything wrong, with the field's path and the remedy.
    """
    _refuse_stray_variables(os.environ)
    own, by_program = _split(overrides)
    file = _parse(read_yaml(path), own, str(path))
    folder = (file.run.dir or Path("runs") / file.run.name).expanduser().resolve()
    resolver = _Resolver(file, by_program, str(path))
    services, model = folder / "services", str(locate_model(file.model))
    ports, valkey_socket = run_ports(folder), socket_path(folder)

    tokens: dict[str, dict[str, Any]] = {}

    def listens(service: str) -> dict[str, Any]:
        ports_of = {"grpc": {"port": ports[f"{service}.grpc"]}, "admin": {"port": ports[f"{service}.admin"]}}
        return ports_of | tokens.get(service, {})

    def resolve_generation() -> GenerationConfig | None:
        own = {"model": model, "engine": file.engine, "wait_for_learner": True}
        return resolver.resolve(GenerationConfig, "generation", listens("generation") | own)

    def resolve_value() -> ValueConfig | None:
        own = {"state_dir": str(services / "value"), "queue": {"url": f"unix://{valkey_socket}"}}
        return resolver.resolve(ValueConfig, "value", listens("value") | own)

    def of_learner() -> dict[str, Any]:
        return listens("learner") | {
            "model": model,
            "state_dir": str(services / "learner"),
            "export_dir": str(folder),
            "replicas": [address(generation.grpc)] if generation else [],
            "seed": file.run.seed,
        }

    generation, value = resolve_generation(), resolve_value()
    learner = resolver.resolve(LearnerConfig, "learner", of_learner())
    if generation is not None and value is not None and learner is not None:
        auths = {"generation": generation.auth, "value": value.auth, "learner": learner.auth}
        tokens = missing_tokens(auths, folder)
        generation, value = resolve_generation(), resolve_value()
    of_replicas = wanted_by({"generation": generation})
    for_learner = of_learner() | of_replicas.settings("replica_")
    learner = resolver.resolve(LearnerConfig, "learner", for_learner)
    endpoints = {"value": value, "learner": learner}
    of_all = wanted_by({"generation": generation, **endpoints})
    here = {name: address(config.grpc) for name, config in endpoints.items() if config}

    def resolve_train(access: Mapping[str, str]) -> OrchestratorConfig | None:
        replicas = {"generation": [address(generation.grpc)]} if generation else {}
        own = {"run_id": file.run.name, "run_dir": str(folder), "seed": file.run.seed}
        return resolver.resolve(OrchestratorConfig, "train", own | {"endpoints": {**here, **replicas, **access}})

    train = resolve_train(of_all.settings())
    is_elsewhere = train is not None and not {train.endpoints.value, train.endpoints.learner} & {*here.values()}
    if is_elsewhere:  # other services have no use for what these want
        train = resolve_train({})
    if learner is not None and train is not None:  # the file goes before what belongs to the algorithm
        of_algorithm = train.algorithm.learner_settings(train.sampling.max_tokens)
        learner = resolver.resolve(LearnerConfig, "learner", merged(for_learner, of_algorithm))
    if generation is None or value is None or learner is None or train is None:
        raise ConfigError("\n".join(resolver.problems))
    lacking = [
        *of_replicas.missing("learner.replica_", learner.replica_token_file, learner.replica_ca_file),
        *(
            ()
            if is_elsewhere
            else of_all.missing("train.endpoints.", train.endpoints.token_file, train.endpoints.ca_file)
        ),
    ]
    if lacking:
        raise ConfigError("\n".join(lacking))
    return LocalRun(
        name=file.run.name,
        dir=folder,
        model=file.model,
        generation=generation,
        value=value,
        learner=learner,
        train=train,
        trees=resolver.trees,
        overrides=by_program,
        socket=valkey_socket,
    )


class _Resolver:
    """Each program's settings, and what is wrong in any of them."""

    def __init__(self, file: RunFile, overrides: Mapping[str, Sequence[str]], source: str) -> None:
        self._file = file
        self._overrides = overrides
        self._source = source
        self.trees: dict[str, dict[str, Any]] = {}
        self.problems: list[str] = []

    def resolve(self, cls: type[C], name: str, filled_in: Mapping[str, Any]) -> C | None:
        """Return a program's settings: what the file says over what follows from the run. None when they are wrong."""
        section: dict[str, Any] = getattr(self._file, name)
        fields = cls.model_fields
        # `tasks:` with nothing behind it, as the defaults are shown, sets nothing.
        given = {k: v for k, v in section.items() if v is not None or k not in fields or not fields[k].is_required()}
        self.trees[name] = merged(filled_in, given)
        try:
            return parse_config(cls, self.trees[name], self._overrides[name], source=f"{self._source}: {name}")
        except ConfigError as error:
            if str(error) not in self.problems:  # it is resolved again once more is known
                self.problems.append(str(error))
            return None


def _refuse_stray_variables(environment: Mapping[str, str]) -> None:
    prefixes = [*(cls.model_config.get("env_prefix", "") for cls in CONFIGS.values()), "POISE_CHECK_"]
    for name in environment:
        if name.startswith("POISE_") and "__" in name and not name.startswith(tuple(prefixes)):
            raise ConfigError(f"{name} (environment): no program's setting; they begin with {', '.join(prefixes)}")


def _split(overrides: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Return the overrides of the run file itself, and those of each program's settings, without its name.

    The latter go to the program as they are: its environment stands between them and the file.
    """
    own: list[str] = []
    by_program: dict[str, list[str]] = {program: [] for program in PROGRAMS}
    for override in overrides:
        program, dot, rest = override.strip().partition(".")
        if dot and program in by_program:
            by_program[program].append(rest)
        else:
            own.append(override)
    return own, by_program


def _parse(values: dict[str, Any], overrides: Sequence[str], source: str) -> RunFile:
    given = {name: value for name, value in values.items() if value is not None}  # `learner:` and nothing below it
    try:
        return RunFile(**merged(given, parse_overrides(overrides)))
    except ValidationError as error:
        lines = [f"{source}: {line}" for line in explain(error, RunFile)]
        unknown = (str(problem["loc"][0]) for problem in error.errors() if problem["type"] == "extra_forbidden")
        lines += [hint for name in unknown if (hint := _programs_with(name))]
        raise ConfigError("\n".join(lines)) from None


def _programs_with(name: str) -> str:
    """Return a line that names the programs which have a setting; empty where none has."""
    programs = [f"{program}.{name}" for program, cls in CONFIGS.items() if name in cls.model_fields]
    return f"{name} is a setting of programs: give {' or '.join(programs)}" if programs else ""
