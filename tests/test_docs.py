"""The tests that the documentation names exist, and the code that it shows can be used."""

import ast
import doctest
import importlib
import inspect
import json
import re
from pathlib import Path

import pytest

from lightning_adpsgd import ADPSGDStrategy
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


PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


def python_of(page: str) -> list[ast.Module]:
    return [ast.parse(code) for code in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)]


def test_the_readme_shows_code():
    assert len(python_of("README.md")) >= 2


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_parses_and_imports_names_that_exist(page):
    for block in python_of(page):
        for node in ast.walk(block):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_adpsgd"):
                module = importlib.import_module(node.module)
                assert [name.name for name in node.names if not hasattr(module, name.name)] == []


@pytest.mark.parametrize("page", PAGES)
def test_a_page_passes_arguments_that_exist(page):
    """Names of our classes, called with keywords."""
    known = {"ADPSGDStrategy", "AdaptivePeriod", "ConstantPeriod", "CommunicationMonitor", "IntCodec"}
    package = importlib.import_module("lightning_adpsgd")
    for call in (node for block in python_of(page) for node in ast.walk(block) if isinstance(node, ast.Call)):
        if isinstance(call.func, ast.Name) and call.func.id in known:
            takes = inspect.signature(getattr(package, call.func.id)).parameters
            assert [keyword.arg for keyword in call.keywords if keyword.arg not in takes] == [], ast.unparse(call)


@pytest.mark.parametrize("page", ["README.md", "examples/quickstart.ipynb"])
def test_what_a_page_outside_of_the_book_links_to_exists(page):
    text = (ROOT / page).read_text()
    if page.endswith(".ipynb"):
        text = "".join(line for cell in json.loads(text)["cells"] for line in cell["source"])
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("http")]
    assert len(links) >= 4
    assert [link for link in links if not ((ROOT / page).parent / link.partition("#")[0]).exists()] == []


def test_the_examples_of_the_strategys_docstring_do_what_they_say():
    examples = doctest.DocTestFinder(recurse=False).find(ADPSGDStrategy, "ADPSGDStrategy")
    assert sum(len(test.examples) for test in examples) >= 6
    runner = doctest.DocTestRunner()
    for test in examples:
        runner.run(test)
    assert runner.summarize().failed == 0


def test_the_page_on_clients_says_what_their_latest_results_say():
    text = clients.PAGE.read_text()
    results = clients.read_results()
    assert {*results} == {client.name for client in clients.CLIENTS}
    assert clients.page(text, results) == text
