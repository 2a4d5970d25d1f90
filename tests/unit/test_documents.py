"""Documents link only to what exists, and code names only documents that exist."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path
    for folder in ("", "benchmarks", "deploy", "docs/**", "helm/**")
    for path in ROOT.glob(f"{folder}/*.md" if folder else "*.md")
)
SOURCES = [
    path
    for folder in ("services", "clients/poise_client", "protos", "benchmarks", "deploy", "helm", "tools", "tests")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".md", ".py", ".proto", ".yaml", ".tpl", ".txt", ".json") and "results" not in path.parts
]


def prose(page: Path) -> str:
    """Return a page without its code blocks."""
    return re.sub(r"^( *)```.*?^\1```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    texts = (re.sub(r"\[([^]]+)]\([^)]*\)", r"\1", heading).strip().lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", text).replace(" ", "-") for text in texts}


def links(page: Path) -> Iterator[str]:
    """Yield the relative links and pictures of a page."""
    for link in re.findall(r"]\(([^)\s]+)\)", prose(page)):
        if not link.startswith(("http://", "https://", "mailto:")):
            yield link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_resolves(page: Path) -> None:
    for link in links(page):
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{link}: no such file"
        if anchor:
            assert anchor in anchors(path), f"{link}: no such heading; there are {sorted(anchors(path))}"


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_document_is_listed_in_the_index(page: Path) -> None:
    index = ROOT / "docs" / "README.md"
    listed = {(index.parent / link.partition("#")[0]).resolve() for link in links(index)}
    assert page == index or page in listed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_in_documents_exist(page: Path) -> None:
    """Paths from the root, and modules such as `value/store` below services/poise."""
    package = ROOT / "services" / "poise"
    for path in re.findall(r"`([\w.]+(?:/[\w.]+)+)`", prose(page)):
        first = path.split("/")[0]
        if first in ("benchmarks", "clients", "deploy", "docs", "helm", "protos", "services", "tests", "tools"):
            assert (ROOT / path).exists(), path
        elif (package / first).is_dir():
            assert (package / path).is_dir() or (package / f"{path}.py").exists(), path


def test_documents_named_in_code_exist() -> None:
    named = {name for path in SOURCES for name in re.findall(r"\bdocs/[\w/]+\.(?:md|png|py)\b", path.read_text())}
    assert named and not sorted(name for name in named if not (ROOT / name).exists())
