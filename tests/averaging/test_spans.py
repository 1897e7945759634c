"""A profiler shows the stages of a round by name, for every kind of round."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from lightning_adpsgd import LocalSGD
from lightning_adpsgd.averaging.spans import span

PLAIN = {"handshake", "pack", "reduce", "measure", "unpack"}


def stages(options: dict[str, Any]) -> set[str]:
    parameter = nn.Parameter(torch.zeros(10))
    local_sgd = LocalSGD(torch.optim.SGD([parameter], lr=0.1), 2, **options)
    local_sgd.broadcast()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(5):
            local_sgd.step()
    names = [event.key for event in profiled.key_averages()]
    return {name.removeprefix("adpsgd::") for name in names if name.startswith("adpsgd::")}


@pytest.mark.workers
@pytest.mark.parametrize("spread", [{}, {"stagger": True, "overlap": 1}])
@pytest.mark.parametrize(("codec", "more"), [({}, set()), ({"reduce_dtype": "bf16"}, {"encode", "decode"})])
def test_every_stage_has_its_span(pool, spread, codec, more):
    for found in pool.run(stages, {**spread, **codec}):
        assert found == PLAIN | more


def test_a_span_is_nothing_without_a_profiler():
    assert span("pack") is span("reduce")
