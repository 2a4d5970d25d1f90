"""Settings as text: all defaults, and what a run resolves to."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import yaml

from poise.local.run_file import CONFIGS, LocalRun, RunFile
from poise.runtime.config.text import defaults_yaml, redacted

_FILLED_IN = {
    "generation": ("model", "engine", "wait_for_learner", "grpc.port", "admin.port", "auth.token_file"),
    "value": ("state_dir", "queue.url", "grpc.port", "admin.port", "auth.token_file"),
    "learner": (
        *("model", "state_dir", "export_dir", "replicas", "replica_token_file", "replica_ca_file", "seed"),
        *("grpc.port", "admin.port", "auth.token_file"),
    ),
    "train": (
        *("run_id", "run_dir", "seed", "endpoints.generation", "endpoints.value", "endpoints.learner"),
        *("endpoints.token_file", "endpoints.ca_file"),
    ),
}
"""What follows from the run, where its file does not say otherwise."""


def defaults_text(program: str | None) -> str:
    """Return every setting of a program, or of run.yaml with all programs, with its default and meaning."""
    if program is not None:
        return defaults_yaml(CONFIGS[program])
    top = [line for line in defaults_yaml(RunFile).splitlines() if not line.endswith(": {}")]
    sections = []
    for name, cls in CONFIGS.items():
        while f"# {RunFile.model_fields[name].description}" in top:
            top.remove(f"# {RunFile.model_fields[name].description}")
        sections += [
            f"# {RunFile.model_fields[name].description}",
            f"# Filled in where not given: {', '.join(_FILLED_IN[name])}.",
            f"{name}:",
            *(f"  {line}" for line in _without(defaults_yaml(cls), _FILLED_IN[name])),
        ]
    return "\n".join([*top, *sections])


def resolved_text(run: LocalRun, program: str | None) -> str:
    """Return a run's settings as its programs see them, secrets masked."""
    names = [program] if program else list(CONFIGS)
    return yaml.safe_dump({name: redacted(getattr(run, name)) for name in names}, sort_keys=False).rstrip()


def _without(text: str, names: Collection[str]) -> Iterator[str]:
    """Yield the lines of commented YAML, less some settings, by path, and what is said of them."""
    path: list[str] = []
    comments: list[str] = []
    for line in text.splitlines():
        name = line.lstrip()
        if name.startswith("#"):
            comments.append(line)
            continue
        path[(len(line) - len(name)) // 2 :] = [name.partition(":")[0]]
        if ".".join(path) not in names:
            yield from (*comments, line)
        comments.clear()
