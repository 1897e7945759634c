import pytest

from tests.elastic import launching


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's working directory. What a test has started there ends with it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(launching.ROOT))
    yield tmp_path
    launching.end_all()


@pytest.fixture
def torchft():
    pytest.importorskip("torchft", reason="torchft is not installed: pip install 'lightning-adpsgd[elastic]'")
