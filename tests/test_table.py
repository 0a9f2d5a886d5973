"""The table of methods: every row says what it assumes, when to use it and what it costs."""

from pathlib import Path

import pytest

from upweight.cli.methods import BEGIN, END, markdown, update
from upweight.linalg import Load
from upweight.methods import METHODS, Method

PAGE = Path(__file__).parent.parent / "docs" / "methods.md"
COMMAND = "python -m upweight.cli.methods docs/methods.md"


@pytest.mark.parametrize("name", METHODS)
def test_every_row_says_what_a_user_must_know(name):
    row = METHODS[name]
    for text in (row.summary, row.assumes, row.when, row.cost):
        assert text == text.strip() != ""
        assert "\n" not in text
        assert not text.endswith(".")
        assert len(text) <= 200
    assert row.name == name


@pytest.mark.parametrize("name", METHODS)
def test_every_solver_of_the_table_says_what_it_takes(name):
    row = METHODS[name]
    if isinstance(row, Method) and row.solver is not None:
        assert row.solver.cost(Load(size=50, rows=3, examples=20)) is not None


def test_the_page_has_the_table_of_the_code(tmp_path):
    text = PAGE.read_text(encoding="utf-8")
    assert text.split(BEGIN)[1].split(END)[0] == f"\n{markdown()}\n", f"run: {COMMAND}"
    assert COMMAND in text
    for name in METHODS:
        assert text.count(f"| `{name}` |") == 1
    copy = tmp_path / "methods.md"
    copy.write_text(text, encoding="utf-8")
    assert not update(copy)
    copy.write_text(text.replace("| `exact` |", "| `old` |"), encoding="utf-8")
    assert update(copy)
    assert copy.read_text(encoding="utf-8") == text


def test_the_rows_that_the_page_advises_are_there():
    advice = PAGE.read_text(encoding="utf-8").split("## All methods")[0]
    for name in ("exact", "cg", "ekfac", "ggn_cg", "last_layer", "relatif", "cosine", "loss"):
        assert f"`{name}`" in advice
        assert name in METHODS
