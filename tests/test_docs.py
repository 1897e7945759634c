"""The tests that the documentation names exist."""

import ast
import re
from pathlib import Path

import pytest

from tests.clients import page as clients

ROOT = Path(__file__).parent.parent
TABLES = {"features.md": ROOT / "tests" / "features", "reliability.md": ROOT}


def named_tests(page: str) -> list[tuple[Path, str]]:
    """The tests a page names, as ``file.py::test``, or as ``::test`` of the file named before."""
    found, file = [], None
    for path, name in re.findall(r"`([\w./]*)::(test_\w+)`", (ROOT / "docs" / page).read_text()):
        file = (TABLES[page] / path).resolve() if path else file
        assert file is not None, name
        found.append((file, name))
    return found


def defined_tests(file: Path) -> set[str]:
    return {node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("page", TABLES)
def test_every_test_that_a_page_names_exists(page):
    tests = named_tests(page)
    assert len(tests) > 10
    assert [name for file, name in tests if name not in defined_tests(file)] == []


@pytest.mark.parametrize("page", TABLES)
def test_every_row_that_promises_something_names_its_test(page):
    lines = (ROOT / "docs" / page).read_text().splitlines()
    starts = [index for index, line in enumerate(lines) if re.fullmatch(r"\| .*\| (test|held by) \|", line)]
    assert starts
    for start in starts:
        for line in lines[start + 2 :]:
            if not line.startswith("|"):
                break
            assert "::test_" in line or "(#faults)" in line or "[below]" in line, line


def test_the_page_on_clients_says_what_their_latest_results_say():
    text = clients.PAGE.read_text()
    results = clients.read_results()
    assert {*results} == {client.name for client in clients.CLIENTS}
    assert clients.page(text, results) == text
