"""Documentation that runs: every Python block of every page, and every link inside the project."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@each_page
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, page.name, "exec"), names)


@each_page
def test_links_inside_the_project_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@each_page
def test_named_files_exist(page):
    """Paths in code quotes are real: `tests/cases.py`, `solvers/cg.py`."""
    for name in re.findall(r"`([\w/]+\.(?:py|md|toml|txt))`", page.read_text()):
        places = (ROOT / name, ROOT / "src" / "upweight" / name, ROOT / "docs" / name)
        assert any(place.exists() for place in places), f"{page.name} names {name}"
