import sys

import pytest
import torch

from benchmarks.frame.device import Device, Extra


def test_extra_memory_of_an_accelerator_is_where_the_model_is():
    assert Extra(host_bytes=5, device_bytes=7, kept_bytes=6).bytes == 7
    assert Extra(host_bytes=5, device_bytes=None, kept_bytes=4).bytes == 5


def test_function_is_timed():
    timing = Device().time(lambda: torch.ones(10**6).sum())
    assert timing.seconds == timing.ended - timing.began > 0
    assert timing.cpu_seconds > 0
    assert timing.device_seconds is None


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells how much memory a process takes")
@pytest.mark.workers
def test_memory_is_what_a_function_takes_and_keeps(pool):
    ((extra, kept),) = pool.run(take_memory, workers=1)
    assert 1.5e8 < extra.bytes < 1.9e8  # three times 40 MB, and a copy of a third
    assert 3.5e7 < extra.kept_bytes < 6e7
    assert kept == 10**7


def take_memory():
    kept = []
    extra = Device().extra_memory(lambda: kept.append(torch.ones(3 * 10**7)[: 10**7].clone()))
    return extra, len(kept[0])
