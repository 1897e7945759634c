"""Seeds to train with, and the file and the page of results."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.clients.page import read_results, write_page, write_results


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seeds", default="1", help="seeds to train each client with, such as '1 2 3'")


@pytest.fixture(scope="session")
def seeds(request: pytest.FixtureRequest) -> list[int]:
    return [int(seed) for seed in request.config.getoption("--seeds").split()]


@pytest.fixture(scope="session")
def results() -> Iterator[dict[str, Any]]:
    """What has come of each client; written to a file at the end, and from there to the page."""
    new: dict[str, Any] = {}
    yield new
    write_results(read_results() | new)
    write_page()
