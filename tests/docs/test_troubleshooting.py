"""docs/troubleshooting.md has every message of the library's errors, and no other."""

from __future__ import annotations

import ast
import re

import pytest

from tests.docs.messages import PAGE, _Reader, cell, explained, messages


def test_every_message_has_its_cause_and_remedy():
    """`python -m tests.docs.messages` prints the rows to add."""
    wanted = {cell(text): file for text, file in messages().items()}
    assert len(wanted) > 300
    there = explained()
    assert {row: file for row, file in wanted.items() if row not in there} == {}
    assert [row for row in there if row not in wanted] == []
    assert len(there) == len({*there})


def test_no_row_is_without_a_cause_or_a_remedy():
    rows = re.findall(r"^\| `.*?` \| (.*) \| (.*) \|$", PAGE.read_text(), re.M)
    assert len(rows) == len(explained())
    for cause, remedy in rows:
        assert cause.strip().endswith((".", "`")), cause
        assert remedy.strip().endswith((".", "`")), remedy
        assert "CAUSE" not in cause + remedy


CODE = """
CONSTANT = "the constant says what is wrong"

def plain(x):
    raise ValueError(f"{x}: expected a number, got {x!r}")

def assigned(x):
    what = "of one sort" if x else "of another sort"
    raise RuntimeError("expected something " + what)

def called(x):
    raise ValueError(made(x))

def made(x):
    return f"{x} was made elsewhere"

def passed(message):
    raise RuntimeError(message)

def caller():
    passed(CONSTANT)
"""


@pytest.mark.parametrize(
    "text",
    [
        "…: expected a number, got …",
        "expected something of one sort",
        "expected something of another sort",
        "… was made elsewhere",
        "the constant says what is wrong",
    ],
)
def test_messages_are_found_however_they_are_made(text):
    tree = ast.parse(CODE)
    functions: dict[str, list[ast.FunctionDef]] = {
        node.name: [node] for node in tree.body if isinstance(node, ast.FunctionDef)
    }
    found = {*_Reader("code.py", {"code.py": tree}, functions).messages()}
    assert text in found
    assert len(found) == 5
