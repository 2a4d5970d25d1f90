"""Every name that benchmarks and tools import from the repository exists."""

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCRIPTS = sorted([*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "tools").glob("*.py")])


def imports(source: str) -> Iterator[ast.ImportFrom]:
    """Yield the imports of a script, and of programs that it holds as strings."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            yield node
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "\nfrom poise" in node.value:
            yield from imports(node.value)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_imported_names_exist(script: Path) -> None:
    for node in imports(script.read_text()):
        if (node.module or "").split(".")[0] in ("poise", "poise_client", "tests"):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")
