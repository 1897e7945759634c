import time

import torch

from lightning_adpsgd.averaging import Stopwatch


def test_it_runs_from_when_it_is_made_until_it_is_stopped():
    stopwatch = Stopwatch(torch.device("cpu"))
    time.sleep(0.02)
    stopwatch.stop()
    taken = stopwatch.seconds
    time.sleep(0.02)
    assert stopwatch.seconds == taken >= 0.02
