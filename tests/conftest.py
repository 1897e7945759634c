import os
import time
from collections.abc import Iterator

import pytest
import torch

from tests.pool import WorkerPool


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    """Processes that run a function side by side."""
    pool = WorkerPool()
    yield pool
    pool.close()


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leave no process group and no variables of Lightning's launcher behind."""
    environment = dict(os.environ)
    for name in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    yield
    if torch.distributed.is_initialized():
        time.sleep(0.05)  # gloo's threads may otherwise never end (seen with torch 2.4)
        torch.distributed.destroy_process_group()
    monkeypatch.undo()
    os.environ.clear()
    os.environ.update(environment)
