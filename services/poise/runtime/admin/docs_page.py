"""The `/docs` page: the routes of the OpenAPI document as plain HTML without external resources."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
}

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "code{background:#8883;padding:.1em .3em;border-radius:.2em}h2{font-size:1.1rem;margin-bottom:.2rem}"
    "table{border-collapse:collapse}td{padding:.1rem .8rem .1rem 0;vertical-align:top}"
)


def docs_page(document: Mapping[str, Any]) -> str:
    """Return the page of an OpenAPI document."""
    title = escape(document["info"]["title"])
    routes = [
        _route(method, path, operation)
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    ]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f"<h1>{title} {escape(document['info']['version'])}</h1><p>{escape(document['info']['description'])}</p>"
        f'<p>For programs: <a href="/openapi.json">openapi.json</a>.</p>{"".join(routes)}</html>'
    )


def _route(method: str, path: str, operation: Mapping[str, Any]) -> str:
    rows = [
        *(_row(one["name"], f"{one['in']}: {one.get('description', '')}") for one in operation.get("parameters", ())),
        *(_row(status, answer["description"]) for status, answer in operation["responses"].items()),
    ]
    return (
        f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(operation.get('summary', ''))}</p>"
        f"<table>{''.join(rows)}</table>"
    )


def _row(name: str, meaning: str) -> str:
    return f"<tr><td><code>{escape(name)}</code></td><td>{escape(meaning)}</td></tr>"
