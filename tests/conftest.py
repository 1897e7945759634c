from collections.abc import Iterator

import pytest

from tests.workers import WorkerPool


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    """Processes that run a function side by side."""
    pool = WorkerPool()
    yield pool
    pool.close()
