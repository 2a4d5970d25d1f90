"""Generate values.schema.json and the settings table of the chart's README from helm/poise/values.yaml.

In values.yaml the comment above a key describes it. A comment after its value may restrict it: `one of: a, b`,
`min: 1`, `quantity` (a Kubernetes size), `of: string` (elements of a list), `free` (any keys; checked elsewhere).

    generate_chart_docs.py           write both
    generate_chart_docs.py --check   fail if either is out of date
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parents[1] / "helm" / "poise"
BEGIN, END = "<!-- settings: generated -->", "<!-- settings: end -->"

_KEY = re.compile(r"(?P<indent> *)(?P<name>[A-Za-z0-9]+):(?P<value>[^#]*)(?:# (?P<rule>.*))?$")
_QUANTITY = r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"


@dataclass
class Setting:
    """One key of values.yaml."""

    name: str
    path: str
    default: Any
    about: str
    rule: str
    children: list[Setting] = field(default_factory=list)


def read_settings(text: str) -> list[Setting]:
    """Return the keys with their comments, as a tree."""
    top: list[Setting] = []
    open_settings: list[tuple[int, Setting]] = []
    comment: list[str] = []
    values = yaml.safe_load(text)
    for line in text.splitlines():
        if line.strip().startswith("#"):
            comment.append(line.strip().removeprefix("#").strip())
            continue
        match = _KEY.match(line)
        if match is None:
            comment = []
            continue
        indent = len(match["indent"])
        while open_settings and open_settings[-1][0] >= indent:
            open_settings.pop()
        path = ".".join([*(setting.name for _, setting in open_settings), match["name"]])
        setting = Setting(match["name"], path, _at(values, path), " ".join(comment), (match["rule"] or "").strip())
        (open_settings[-1][1].children if open_settings else top).append(setting)
        open_settings.append((indent, setting))
        comment = []
    return top


def _at(values: Any, path: str) -> Any:
    for name in path.split("."):
        values = values[name]
    return values


def schema_of(settings: list[Setting]) -> dict[str, Any]:
    """Return a strict JSON schema, which rejects unknown keys."""
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {setting.name: _schema(setting) for setting in settings},
    }


def _schema(setting: Setting) -> dict[str, Any]:
    about = {"description": setting.about}
    if setting.children:
        return about | schema_of(setting.children)
    if setting.rule.startswith("one of: "):
        options = [option.strip().strip('"') for option in setting.rule.removeprefix("one of: ").split(",")]
        return about | {"enum": options}
    if setting.rule == "quantity":
        return about | {"type": "string", "pattern": _QUANTITY}
    kind = _TYPES[type(setting.default)]
    schema = about | {"type": kind}
    if setting.rule.startswith("min: "):
        schema["minimum"] = int(setting.rule.removeprefix("min: "))
    if setting.rule == "of: string":
        schema["items"] = {"type": "string"}
    return schema


_TYPES = {str: "string", bool: "boolean", int: "integer", list: "array", dict: "object"}


def table_of(settings: list[Setting]) -> str:
    """Return the Markdown table of all settings."""
    rows = [f"| `{leaf.path}` | `{json.dumps(leaf.default)}` | {leaf.about} |" for leaf in _leaves(settings)]
    return "\n".join(["| setting | default | meaning |", "| --- | --- | --- |", *rows])


def _leaves(settings: list[Setting]) -> Iterator[Setting]:
    for setting in settings:
        if setting.children:
            yield from _leaves(setting.children)
        else:
            yield setting


def generated() -> dict[Path, str]:
    """Return the text of each generated file."""
    settings = read_settings((CHART / "values.yaml").read_text())
    schema = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "poise"} | schema_of(settings)
    # Helm itself passes `global`.
    schema["properties"]["global"] = {"type": "object"}
    readme = (CHART / "README.md").read_text()
    before, rest = readme.split(BEGIN)
    after = rest.split(END)[1]
    return {
        CHART / "values.schema.json": json.dumps(schema, indent=2) + "\n",
        CHART / "README.md": f"{before}{BEGIN}\n{table_of(settings)}\n{END}{after}",
    }


def main() -> int:
    """Write the files, or with --check fail if one is out of date."""
    outdated = [path for path, text in generated().items() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv[1:]:
        for path in outdated:
            print(f"{path} is out of date: run `make chart`", file=sys.stderr)
        return 1 if outdated else 0
    for path, text in generated().items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
