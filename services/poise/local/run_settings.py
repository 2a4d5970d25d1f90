"""run.yaml as one typed tree: shared settings at the top level, then a section for each program.

run:            {name, dir}
model: engine: seed: dtype: max_staleness: lora:        shared by the programs
generation: value: learner: train:                      every other setting of that program
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Optional

from pydantic import ConfigDict, Field, create_model
from pydantic_settings import SettingsConfigDict

from poise.generation.config import GenerationConfig
from poise.learner.config import LearnerConfig, LoraSettings
from poise.orchestrator.config import OrchestratorConfig
from poise.runtime.config.settings import Settings, StrictModel
from poise.value.config import ValueConfig

CONFIGS: Mapping[str, type[Settings]] = {
    "generation": GenerationConfig,
    "value": ValueConfig,
    "learner": LearnerConfig,
    "train": OrchestratorConfig,
}
"""The settings of each program."""

PROGRAMS = tuple(CONFIGS)

SHARED: Mapping[str, tuple[str, ...]] = {
    "run.name": ("train.run_id",),
    "run.dir": ("train.run_dir",),
    "model": ("generation.model", "learner.model"),
    "engine": ("generation.engine",),
    "seed": ("learner.seed", "train.seed"),
    "dtype": ("generation.dtype", "learner.dtype"),
    "max_staleness": ("learner.max_staleness", "train.max_staleness"),
    "lora": ("generation.lora", "learner.lora"),
}
"""Settings that run.yaml states once, each with the programs' settings that get its value."""

_LISTENING = ("grpc.port", "admin.port", "auth.token_file")

FILLED_IN: Mapping[str, tuple[str, ...]] = {
    "generation": (*_LISTENING, "wait_for_learner"),
    "value": (*_LISTENING, "state_dir", "queue.url"),
    "learner": (*_LISTENING, "state_dir", "export_dir", "replicas", "replica_token_file", "replica_ca_file"),
    "train": tuple(f"endpoints.{name}" for name in ("generation", "value", "learner", "token_file", "ca_file")),
}
"""Settings of each program that the run fills in if its file leaves them out."""


class RunSection(StrictModel):
    """Name and folder."""

    MOVED: ClassVar[Mapping[str, str]] = {"seed": "`seed` at the top level"}

    name: str = Field("run", pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}$")
    """Name of the run. The same name in the same folder resumes."""
    dir: Path | None = None
    """Folder of the run; null means runs/<name>."""


class SharedSettings(Settings):
    """Settings that run.yaml states once for all programs."""

    run: RunSection = RunSection()
    """Name and folder."""
    model: str
    """Model to train: a name that `poise models` lists, a Hugging Face folder, or a name on the hub."""
    engine: Literal["vllm", "torch"] = "vllm"
    """Engine that samples: `vllm`, or `torch` (transformers; exact and slow)."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the prompts of every step, the sampling, and the initial adapters."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Data type in which engine and learner compute. Null: the engine uses the checkpoint's, the learner float32."""
    max_staleness: int = Field(0, ge=0, le=64)
    """Steps that may be sampled ahead of the learner. The learner accepts rollouts up to this many versions old. 0 is
    exactly on-policy."""
    lora: LoraSettings | None = None
    """Train low-rank adapters instead of the whole model, such as {rank: 32, alpha: 64}."""


class _Section(StrictModel):
    """Base of the sections below. They are created at run time, so there are no docstrings to extract."""

    model_config = ConfigDict(use_attribute_docstrings=False)


class _RunFile(SharedSettings):
    model_config = SettingsConfigDict(use_attribute_docstrings=False)


def shared_by(program: str) -> Iterator[tuple[str, str]]:
    """Yield each setting of a program that is at the top level of run.yaml: its name in the program, and there."""
    for name, settings in SHARED.items():
        for setting in settings:
            if setting.startswith(f"{program}."):
                yield setting.removeprefix(f"{program}."), name


def _section(program: str) -> type[StrictModel]:
    """Return the section of a program: its settings except those at the top level, all optional."""
    cls, moved = CONFIGS[program], dict(shared_by(program))
    fields: dict[str, Any] = {}
    for name, field in cls.model_fields.items():
        if field.is_required():
            fields[name] = (Optional[field.annotation], Field(None, description=field.description))  # noqa: UP045
        else:
            fields[name] = (field.annotation, field)
    section = create_model(
        f"{program.capitalize()}Section",
        __base__=_Section,
        __doc__=cls.__doc__,
        **{name: field for name, field in fields.items() if name not in moved},
    )
    section.RENAMED = cls.RENAMED
    section.MOVED = {
        name: f"`{shared}` at the top level, which reaches every program" for name, shared in moved.items()
    }
    return section


_SECTIONS: dict[str, Any] = {
    program: (section, Field(default_factory=section, description=section.__doc__))
    for program in PROGRAMS
    for section in [_section(program)]
}

RunFile: type[SharedSettings] = create_model("RunFile", __base__=_RunFile, **_SECTIONS)
"""What run.yaml may contain."""

RunFile.MOVED = {
    name: " or ".join(f"`{program}.{name}`" for program, cls in CONFIGS.items() if name in cls.model_fields)
    for name in {name for cls in CONFIGS.values() for name in cls.model_fields} - RunFile.model_fields.keys()
}
