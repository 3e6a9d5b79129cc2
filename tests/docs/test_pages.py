"""The pages of docs/, README.md and CONTRIBUTING.md: what they point to is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    *(f"docs/{page.name}" for page in sorted(DOCS.glob("*.md"))),
]
FOLDERS = {
    *("models", "runtime", "builder", "server", "trimrt"),
    *("tests", "docs", "deploy", "examples", "benchmarks", "experiments"),
}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    path = ROOT / page
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    assert not [link for link in links if "://" not in link and not (path.parent / link).exists()]


def named(page: str) -> list[str]:
    """Files and folders of the project's that a page names."""
    found = re.findall(r"`([\w.-]+/[\w./-]*)`", (ROOT / page).read_text(encoding="utf-8"))
    return [name for name in found if name.split("/")[0] in FOLDERS and "NAME" not in name]


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_is_named_exists(page: str) -> None:
    assert not [path for path in named(page) if not (ROOT / path).exists()]


def test_the_collection_sees_the_pages() -> None:
    assert all(len(named(page)) >= 10 for page in ("CONTRIBUTING.md", "docs/architecture.md"))


def test_the_index_has_every_page() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    others = {page.name for page in DOCS.glob("*.md")} - {"README.md"}
    assert not [name for name in others if f"({name})" not in index]
