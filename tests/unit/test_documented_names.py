"""Settings, metrics, commands and options in the documents exist in the code."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from poise.cli import main
from poise.generation.config import GenerationConfig
from poise.learner.config import LearnerConfig
from poise.local.comparison.file import CompareFile
from poise.local.run_settings import RunFile
from poise.orchestrator.config import OrchestratorConfig
from poise.value.config import ValueConfig

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page
    for pattern in ("README.md", "CONTRIBUTING.md", "benchmarks/*.md", "deploy/*.md", "docs/**/*.md", "helm/**/*.md")
    for page in ROOT.glob(pattern)
)
Schema = dict[str, Any]
SERVICES: dict[str, Schema] = {
    "generation": GenerationConfig.model_json_schema(),
    "value": ValueConfig.model_json_schema(),
    "learner": LearnerConfig.model_json_schema(),
    "train": OrchestratorConfig.model_json_schema(),
}
CHART: Schema = yaml.safe_load((ROOT / "helm/poise/values.schema.json").read_text())
TREES: list[Schema] = [RunFile.model_json_schema(), CompareFile.model_json_schema(), *SERVICES.values(), CHART]
METRICS = set(re.findall(r"`(poise_\w+)`", (ROOT / "docs/reference/metrics.md").read_text())) | {
    "poise_learner_waiting_ratio"  # recorded by the alert rules
}


def options(node: Schema, root: Schema) -> Iterator[Schema]:
    """Yield the objects that a schema allows, with references resolved."""
    if reference := node.get("$ref"):
        yield from options(root["$defs"][reference.rsplit("/", 1)[1]], root)
    for key in ("anyOf", "oneOf", "allOf"):
        for option in node.get(key, ()):
            yield from options(option, root)
    if "properties" in node or node.get("additionalProperties"):
        yield node
    if items := node.get("items"):
        yield from options(items, root)


def has(path: list[str], node: Schema, root: Schema) -> bool:
    """Return whether a schema has a setting of that path."""
    if not path:
        return True
    for option in options(node, root):
        if path[0] in option.get("properties", {}):
            child = option["properties"][path[0]]
            if root is CHART and path[0] == "config" and len(path) > 1:
                return any(has(path[1:], tree, tree) for tree in SERVICES.values())
            if child.get("type") == "object" and "properties" not in child:
                return True
            if has(path[1:], child, root):
                return True
        elif option.get("additionalProperties"):
            inner = option["additionalProperties"]
            if inner is True or has(path[1:], inner, root):
                return True
    return False


def exists(setting: str) -> bool:
    return any(has(setting.split("."), tree, tree) for tree in TREES)


def sections() -> set[str]:
    """Return the names of settings that have settings of their own, in any tree."""
    found = set()
    for tree in TREES:
        for node in (tree, *tree.get("$defs", {}).values()):
            for name, child in node.get("properties", {}).items():
                if any(True for _ in options(child, tree)):
                    found.add(name)
    return found


SECTIONS = sections()


def code(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def commands(text: str) -> Iterator[str]:
    """Yield the commands in a page: lines after a prompt, with continuations, and inline code."""
    for block in re.findall(r"```(?:console|sh)\n(.*?)```", text, re.DOTALL):
        yield from re.findall(r"^ *\$ (.*)$", block.replace("\\\n", " "), re.MULTILINE)
    yield from code(text)


def settings(text: str) -> Iterator[str]:
    """Yield the paths of settings in inline code and in `--set`."""
    for span in code(text):
        path = re.fullmatch(r"([a-z]\w*(?:\.[a-zA-Z]\w*)+)(?::.*| above 0)?", span)
        if (
            path
            and path[1].split(".")[0] in SECTIONS
            and not path[1].endswith((".json", ".jsonl", ".yaml", ".py", ".md"))
        ):
            yield path[1]
    for command in commands(text):
        for values in re.findall(r"--set[ =]'?([^\s'\"]+)", command):
            yield from re.findall(r"(?:^|,)([a-zA-Z_][\w.]*)=", values.replace("a.b=value", ""))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_settings_in_documents_exist(page: Path) -> None:
    assert [setting for setting in settings(page.read_text()) if not exists(setting)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_settings_in_yaml_examples_exist(page: Path) -> None:
    def leaves(value: object, path: str) -> Iterator[str]:
        if isinstance(value, dict) and value:
            for name, child in value.items():
                yield from leaves(child, f"{path}.{name}" if path else str(name))
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for child in value:
                yield from leaves(child, path)
        else:
            yield path

    for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL):
        tree = yaml.safe_load(block)
        if isinstance(tree, dict) and set(tree) <= SECTIONS | {"model", "engine", "name", "base", "seeds", "reference"}:
            assert [path for path in leaves(tree, "") if "." in path and not exists(path)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_metrics_in_documents_exist(page: Path) -> None:
    found = set(re.findall(r"\bpoise_(?:generation|value|learner)_\w+", page.read_text()))
    assert {name for name in found if re.sub(r"_(bucket|sum|count)$", "", name) not in METRICS} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_options_in_documents_exist(page: Path) -> None:
    for command in commands(page.read_text()):
        match = re.match(r"(?:\.venv/bin/)?poise ([a-z]+)(?: ([a-z]+))?(.*)$", command.split(" #")[0])
        if match is None:
            continue
        one: click.Command | None = main.commands.get(match[1])
        assert one is not None, command
        if isinstance(one, click.Group) and match[2] in one.commands:
            one = one.commands[match[2]]
        known = {name for parameter in one.params for name in parameter.opts} | {"--help"}
        assert set(re.findall(r"(?<!\S)--[a-z-]+", match[3])) <= known, command


def test_unknown_settings_are_found() -> None:
    assert exists("learner.loss.aggregation") and exists("queue.max_entries") and exists("generation.config.nccl")
    assert not exists("learner.loss.agregation") and not exists("queue.max_entry")
    assert not exists("generation.config.ncl")
