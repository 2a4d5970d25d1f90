"""Dependencies point inward, and what is heavy is imported where it is needed: checked on the source itself."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = (ROOT / "services", ROOT / "clients")
HEAVY = ("torch", "vllm", "transformers")
SERVICES = ("poise.generation", "poise.value", "poise.learner")
TOPS = ("poise.orchestrator", "poise.local", "poise.cli")
SHARED = ("poise.algorithms", "poise.errors", "poise.queue", "poise.runtime")


@dataclass(frozen=True)
class Rule:
    """Modules within `who` import nothing within `never`, unless it is within `but`."""

    who: str
    never: tuple[str, ...]
    but: tuple[str, ...] = ()


RULES = (
    Rule("poise.algorithms", never=("poise", "poise_client", "poise_proto", "grpc", *HEAVY), but=("poise.algorithms",)),
    *(Rule(shared, never=(*SERVICES, *TOPS)) for shared in SHARED),
    *(Rule(service, never=(*SERVICES, *TOPS), but=(service,)) for service in SERVICES),
    Rule("poise.orchestrator", never=(*SERVICES, "poise.local", "poise.cli", "poise.queue")),
    Rule("poise.report", never=(*SERVICES, *TOPS, "poise.queue")),
    Rule("poise_client", never=("poise", *HEAVY)),
    Rule("poise_proto", never=("poise", "poise_client", *HEAVY)),
)

MAY_BE_HEAVY = (
    "poise.generation.engines.*",
    "poise.generation.weights.process_group",  # receives beside the model
    "poise.generation.prompts.tokenizer",  # which both engines share
    "poise.generation.prompts.template_worker",  # a process that imports nothing else
    "poise.learner.*",
    "poise.runtime.network.broadcast_group",  # groups of processes, which both sides of a push are members of
    "poise.local.models.*",
)


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def imports(source: str, module: str, is_package: bool) -> Iterator[str]:
    """Yield the full name of all that is imported anywhere in a module, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            base = parts[: len(parts) - node.level + is_package] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in (
            "import_module",
            "__import__",
        ):
            yield from (str(name.value) for name in node.args[:1] if isinstance(name, ast.Constant))


def modules(sources: tuple[Path, ...]) -> Iterator[tuple[str, Path]]:
    for source in sources:
        for path in sorted(source.rglob("*.py")):
            parts = path.relative_to(source).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def violations(*sources: Path) -> list[str]:
    """Return each import that breaks a rule, as "module imports other"."""
    found = []
    for module, path in modules(sources):
        for imported in imports(path.read_text(encoding="utf-8"), module, path.stem == "__init__"):
            forbidden = any(
                within(module, rule.who)
                and any(within(imported, package) for package in rule.never)
                and not any(within(imported, package) for package in rule.but)
                for rule in RULES
            )
            heavy = any(within(imported, package) for package in HEAVY)
            if forbidden or (heavy and not any(fnmatchcase(module, pattern) for pattern in MAY_BE_HEAVY)):
                found.append(f"{module} imports {imported}")
    return found


def test_every_import_points_inward():
    assert len(list(modules(SOURCES))) > 50
    assert violations(*SOURCES) == []


def write(root: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")


def test_a_tree_that_keeps_the_rules_passes(tmp_path):
    write(
        tmp_path,
        {
            "poise/algorithms/baselines.py": "import numpy\nfrom poise.algorithms import b\nfrom . import b",
            "poise/generation/servicer.py": "from poise.algorithms import features\nfrom poise_client import codec",
            "poise/generation/engines/vllm/engine.py": "import vllm",
            "poise/learner/training/losses.py": "def f():\n    import torch",
            "poise/value/app.py": "from poise.value.store import Store\nfrom .store import Store\nimport poise.queue",
            "poise/orchestrator/loop.py": "from poise_client import AsyncValueClient\nimport poise.errors",
            "poise/local/up.py": "from poise.value.config import ValueConfig\nimport torchlight",
            "poise_client/_client.py": "import grpc\nfrom poise_client.types import Group",
        },
    )
    assert violations(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "source", "imported"),
    [
        ("poise/algorithms/a.py", "import poise.errors", "poise.errors"),
        ("poise/algorithms/a.py", "from poise import errors", "poise.errors"),
        ("poise/algorithms/a.py", "from ..errors import NotFound", "poise.errors.NotFound"),
        ("poise/algorithms/__init__.py", "from ..runtime import app", "poise.runtime.app"),
        ("poise/algorithms/a.py", "import grpc.aio", "grpc.aio"),
        ("poise/algorithms/a.py", "import torch", "torch"),
        ("poise/generation/app.py", "def f():\n    from poise.value import store", "poise.value.store"),
        ("poise/value/app.py", "from poise.learner.training.losses import loss", "poise.learner.training.losses.loss"),
        ("poise/learner/app.py", "from poise import generation", "poise.generation"),
        ("poise/learner/app.py", "import importlib\nimportlib.import_module('poise.value')", "poise.value"),
        ("poise/learner/app.py", "from ..orchestrator import loop", "poise.orchestrator.loop"),
        ("poise/orchestrator/loop.py", "import poise.learner.core as core", "poise.learner.core"),
        ("poise/orchestrator/loop.py", "from poise.generation.config import C", "poise.generation.config.C"),
        ("poise/runtime/server.py", "from poise.value.app import build", "poise.value.app.build"),
        ("poise/generation/servicer.py", "import transformers", "transformers"),
        ("poise/value/estimators/probe/model.py", "def f():\n    from torch import nn", "torch.nn"),
        ("poise/orchestrator/loop.py", "from vllm.config import X", "vllm.config.X"),
        ("poise/cli.py", "import torch", "torch"),
        ("poise_client/codec/_tensor.py", "from poise.errors import NotFound", "poise.errors.NotFound"),
        ("poise_client/_client.py", "import torch.nn", "torch.nn"),
    ],
)
def test_an_import_that_breaks_a_rule_is_found(tmp_path, name, source, imported):
    write(tmp_path, {name: source})
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    assert violations(tmp_path) == [f"{module} imports {imported}"]


def loaded_by(statement: str, *packages: str) -> list[str]:
    """Return which of the packages an interpreter of its own holds after a statement."""
    code = f"{statement}\nimport sys\nprint(*sorted(set({packages!r}) & sys.modules.keys()))"
    environment = {"PYTHONPATH": ":".join(map(str, SOURCES)), "PATH": ""}
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    return output.stdout.split()


def test_the_check_of_what_is_loaded_sees_what_is_loaded():
    assert loaded_by("import poise_client, numpy", "numpy", "poise_client", "torch") == ["numpy", "poise_client"]


def test_the_sdk_loads_neither_torch_nor_the_services():
    assert loaded_by("import poise_client, poise_client.codec, poise_client.types", "poise", *HEAVY) == []


@pytest.mark.parametrize(
    "module",
    [name for name, _ in modules(SOURCES) if name == "poise.cli" or name.endswith((".__main__", ".config"))],
)
def test_commands_and_settings_load_nothing_heavy(module):
    assert loaded_by(f"import {module}", "sklearn", *HEAVY) == []
