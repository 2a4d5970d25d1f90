"""Settings as text: all defaults, and what a run resolves to."""

from __future__ import annotations

import yaml
from pydantic import BaseModel

from poise.generation.config import GenerationConfig
from poise.learner.config import LearnerConfig
from poise.local.run_file import LocalRun, RunFile
from poise.orchestrator.config import OrchestratorConfig
from poise.runtime.config import defaults_yaml, redacted
from poise.value.config import ValueConfig

_PROGRAMS: dict[str, type[BaseModel]] = {
    "generation": GenerationConfig,
    "value": ValueConfig,
    "learner": LearnerConfig,
    "train": OrchestratorConfig,
}


def defaults_text(program: str | None) -> str:
    """Return every setting of a program, or of run.yaml with all programs, with its default and meaning."""
    if program is not None:
        return defaults_yaml(_PROGRAMS[program])
    top = [line for line in defaults_yaml(RunFile).splitlines() if not line.endswith(": {}")]
    sections = []
    for name, cls in _PROGRAMS.items():
        while f"# {RunFile.model_fields[name].description}" in top:
            top.remove(f"# {RunFile.model_fields[name].description}")
        sections += [f"# {RunFile.model_fields[name].description}", f"{name}:", defaults_yaml(cls, indent=1)]
    return "\n".join([*top, *sections])


def resolved_text(run: LocalRun, program: str | None) -> str:
    """Return a run's settings as its programs see them, secrets masked."""
    names = [program] if program else list(_PROGRAMS)
    return yaml.safe_dump({name: redacted(getattr(run, name)) for name in names}, sort_keys=False).rstrip()
