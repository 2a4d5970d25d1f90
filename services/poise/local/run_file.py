"""Load run.yaml, and resolve the settings of every program of the run: addresses, folders, the queue, tokens.

Starts nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from poise.generation.config import GenerationConfig
from poise.learner.config import LearnerConfig
from poise.local.addresses import SERVICES, address, run_ports, socket_path
from poise.local.credentials import common_credentials, missing_tokens
from poise.local.models.catalog import locate_model
from poise.local.run_settings import CONFIGS, PROGRAMS, SHARED, RunFile, SharedSettings, shared_by
from poise.orchestrator.config import OrchestratorConfig
from poise.orchestrator.errors import SettingsError
from poise.orchestrator.run_checks import check_estimators
from poise.runtime.config.load import merged, parse_config, parse_overrides, read_yaml
from poise.runtime.config.settings import ConfigError, ServiceConfig
from poise.value.config import ValueConfig


@dataclass(frozen=True)
class LocalRun:
    """A run on this machine, resolved and checked."""

    shared: SharedSettings
    """Settings that the programs share, with the folder resolved."""
    generation: GenerationConfig
    value: ValueConfig
    learner: LearnerConfig
    train: OrchestratorConfig
    trees: Mapping[str, Mapping[str, Any]]
    """Content of each program's settings file."""
    overrides: Mapping[str, Sequence[str]]
    """`--set` arguments of each program's command line."""
    socket: Path
    """Socket of the embedded Valkey."""

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.shared.run.name

    @property
    def dir(self) -> Path:
        """Folder of the run."""
        return self.train.run_dir

    @property
    def model(self) -> str:
        """The model as run.yaml names it."""
        return self.shared.model

    @property
    def services_dir(self) -> Path:
        """Folder of the processes' settings, state and addresses."""
        return self.dir / "services"

    @property
    def drain_timeout_s(self) -> float:
        """How long the services may take to finish running requests, s."""
        return max(self._service(name).drain_timeout_s for name in SERVICES)

    def log(self, process: str) -> Path:
        """Return the path of a process's log."""
        return self.dir / "logs" / f"{process}.log"

    def grpc_address(self, service: str) -> str:
        """Return host:port at which this machine reaches a service's gRPC."""
        return address(self._service(service).grpc)

    def admin_address(self, service: str) -> str:
        """Return host:port at which this machine reaches a service's admin app."""
        return address(self._service(service).admin)

    def _service(self, name: str) -> ServiceConfig:
        config: ServiceConfig = getattr(self, name)
        return config


def preset_names() -> list[str]:
    """Return the names of the presets in this package."""
    return sorted(
        path.name.removesuffix(".yaml")
        for path in (resources.files("poise.local") / "presets").iterdir()
        if path.name.endswith(".yaml")
    )


def preset_path(name: str) -> Path:
    """Return a preset's file. Raises `ConfigError` for an unknown name."""
    if name not in preset_names():
        raise ConfigError(f"preset {name!r} is unknown; known: {', '.join(preset_names())}")
    return Path(str(resources.files("poise.local") / "presets" / f"{name}.yaml"))


def load_run(path: Path, overrides: Sequence[str] = ()) -> LocalRun:
    """Read run.yaml and resolve every program's settings.

    Raises:
        ConfigError: names every problem, with its path and the remedy.
    """
    _reject_variables(os.environ)
    values = {name: value for name, value in read_yaml(path).items() if value is not None}  # `learner:` sets nothing
    shared = parse_config(RunFile, values, overrides, file=str(path))
    folder = (shared.run.dir or Path("runs") / shared.run.name).expanduser().resolve()
    shared = shared.model_copy(update={"run": shared.run.model_copy(update={"dir": folder})})
    programs = _Programs(path, merged(values, parse_overrides(_of_run(overrides))), overrides)
    ports, socket = run_ports(folder), socket_path(folder)
    listening = {
        name: {"grpc": {"port": ports[f"{name}.grpc"]}, "admin": {"port": ports[f"{name}.admin"]}} for name in SERVICES
    }
    services = folder / "services"
    programs.resolve(
        {
            "generation": listening["generation"] | _shared(shared, "generation") | {"wait_for_learner": True},
            "value": listening["value"] | {"state_dir": str(services / "value"), "queue": {"url": f"unix://{socket}"}},
            "learner": listening["learner"]
            | _shared(shared, "learner")
            | {"state_dir": str(services / "learner"), "export_dir": str(folder)},
            "train": _shared(shared, "train"),
        }
    )
    programs.resolve(missing_tokens({name: getattr(programs, name).auth for name in SERVICES}, folder))
    if shared.lora is not None and programs.learner.push.transport == "lora":
        programs.resolve({"generation": {"lora": {"max_rank": shared.lora.rank}}})
    generation, value = programs.generation, programs.value
    by_replicas = common_credentials({"generation": generation})
    replicas = [address(generation.grpc)]
    programs.resolve({"learner": {"replicas": replicas} | by_replicas.settings("replica_")})
    here = {"value": address(value.grpc), "learner": address(programs.learner.grpc)}
    programs.resolve({"train": {"endpoints": here | {"generation": replicas}}})
    endpoints = programs.train.endpoints
    is_elsewhere = not {endpoints.value, endpoints.learner} & {*here.values()}
    by_all = common_credentials({"generation": generation, "value": value, "learner": programs.learner})
    if not is_elsewhere:  # other services do not accept this run's credentials
        programs.resolve({"train": {"endpoints": by_all.settings()}})
        endpoints = programs.train.endpoints
    train = programs.train
    programs.resolve(
        {
            "learner": train.algorithm.learner_settings(train.sampling.max_tokens),
            "value": train.algorithm.value_settings(),
        }
    )
    learner = programs.learner
    if endpoints.value == here["value"]:
        try:
            check_estimators(train, programs.value.estimator, programs.value.estimator_by_domain)
        except SettingsError as error:
            raise ConfigError(f"{path}: {error}") from error
    missing = [*by_replicas.missing("learner.replica_", learner.replica_token_file, learner.replica_ca_file)]
    if not is_elsewhere:
        missing += by_all.missing("train.endpoints.", endpoints.token_file, endpoints.ca_file)
    if missing:
        raise ConfigError("\n".join(missing))
    return LocalRun(shared, generation, programs.value, learner, train, programs.trees, programs.overrides, socket)


class _Programs:
    """The settings of each program, completed step by step."""

    generation: GenerationConfig
    value: ValueConfig
    learner: LearnerConfig
    train: OrchestratorConfig

    def __init__(self, path: Path, sections: Mapping[str, Any], overrides: Sequence[str]) -> None:
        self._path = path
        self._sections = {program: _without_unset(program, sections.get(program, {})) for program in PROGRAMS}
        self._filled_in: dict[str, dict[str, Any]] = {program: {} for program in PROGRAMS}
        self.overrides = {
            # Passed on unchanged: the program's environment overrides the file, and these override both.
            program: [text.strip().removeprefix(f"{program}.") for text in overrides if _is_of(text, program)]
            for program in PROGRAMS
        }
        self.trees: dict[str, dict[str, Any]] = {}

    def resolve(self, filled_in: Mapping[str, Mapping[str, Any]]) -> None:
        """Fill in settings of some programs that the file does not set, and resolve these programs again.

        Raises:
            ConfigError: names the problems of all of them.
        """
        problems = []
        for program, tree in filled_in.items():
            self._filled_in[program] = merged(self._filled_in[program], tree)
            self.trees[program] = merged(self._filled_in[program], self._sections[program])
            try:
                config = parse_config(
                    CONFIGS[program],
                    self.trees[program],
                    self.overrides[program],
                    file=str(self._path),
                    section=program,
                )
                setattr(self, program, config)
            except ConfigError as error:
                problems.append(str(error))
        if problems:
            raise ConfigError("\n".join(problems))


def _shared(shared: SharedSettings, program: str) -> dict[str, Any]:
    """Return the settings of a program that are at the top level of run.yaml."""
    values: dict[str, Any] = {
        "run.name": shared.run.name,
        "run.dir": str(shared.run.dir),
        "model": str(locate_model(shared.model)),
        "engine": shared.engine,
        "seed": shared.seed,
        "dtype": shared.dtype,
        "max_staleness": shared.max_staleness,
        "lora": None if shared.lora is None else shared.lora.model_dump(mode="json"),
    }
    if program == "generation":
        values["lora"] = None  # set later if the learner pushes adapters
    return {name: values[key] for name, key in shared_by(program) if values[key] is not None}


def _without_unset(program: str, section: Mapping[str, Any]) -> dict[str, Any]:
    """Return a section without required settings that are null: an empty `tasks:` sets nothing."""
    required = {name for name, field in CONFIGS[program].model_fields.items() if field.is_required()}
    return {name: value for name, value in section.items() if value is not None or name not in required}


def _is_of(override: str, program: str) -> bool:
    return override.strip().startswith(f"{program}.")


def _of_run(overrides: Sequence[str]) -> list[str]:
    """Return the overrides that do not belong to a single program."""
    return [text for text in overrides if not any(_is_of(text, program) for program in PROGRAMS)]


def _reject_variables(environment: Mapping[str, str]) -> None:
    """Reject variables that are not a program's setting, or that contradict the top level of run.yaml."""
    prefixes = {program: cls.model_config.get("env_prefix", "") for program, cls in CONFIGS.items()}
    known = (*prefixes.values(), "POISE_CHECK_")
    for variable in environment:
        if variable.startswith("POISE_") and "__" in variable and not variable.startswith(known):
            raise ConfigError(
                f"{variable} (environment): is not a program's setting; those begin with {', '.join(known)}"
            )
        for name, settings in SHARED.items():
            for setting in settings:
                program, _, field = setting.partition(".")
                if f"{variable}__".startswith(f"{prefixes[program]}{field.upper()}__"):
                    raise ConfigError(
                        f"{variable} (environment): sets {setting} of one program only. Set `{name}` in run.yaml, "
                        "which reaches every program"
                    )
