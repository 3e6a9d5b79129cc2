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
CODE = ["models", "runtime", "builder", "server", "trimrt", "tests", "examples", "benchmarks", "experiments"]


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    path = ROOT / page
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    assert not [link for link in links if "://" not in link and not (path.parent / link).exists()]


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_every_file_that_is_named_exists(page: str) -> None:
    named = re.findall(r"`([\w/]+(?:\.\w+|/))`", (ROOT / page).read_text(encoding="utf-8"))
    paths = [name for name in named if name.split("/")[0] in CODE and "/" in name and "NAME" not in name]
    assert len(paths) >= 10
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_the_index_has_every_page() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    others = {page.name for page in DOCS.glob("*.md")} - {"README.md"}
    assert not [name for name in others if f"({name})" not in index]
