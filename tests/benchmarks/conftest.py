import pytest

from benchmarks.frame.errors import HostsUnavailableError
from benchmarks.frame.hosts import hosts


@pytest.fixture(scope="session")
def namespaces():
    """Skips, with the reason, where no hosts can be made."""
    try:
        with hosts(2, rate_mbit=1000):
            pass
    except HostsUnavailableError as error:
        pytest.skip(str(error))
