"""Names of version 0.1 still work, with a warning that gives the new one."""

import pytest
import torch
from torch import nn

import lightning_adpsgd
from lightning_adpsgd import ADPSGDStrategy, LocalSGD, NodeWorkerGroup, WorkerGroup
from lightning_adpsgd.rounds.handshake import SignalFlags


def local_sgd(**options):
    return LocalSGD(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1), 4, **options)


@pytest.mark.parametrize(("former", "new"), [("Workers", "WorkerGroup"), ("NodeWorkers", "NodeWorkerGroup")])
def test_classes(former, new):
    with pytest.warns(FutureWarning, match=f"is now called {new}"):
        assert getattr(lightning_adpsgd, former) is getattr(lightning_adpsgd, new)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = lightning_adpsgd.Nothing


def test_attributes_and_methods():
    plain = local_sgd(overlap=1)
    with pytest.warns(FutureWarning, match=r"is now called LocalSGD\.options\.overlap"):
        assert plain.overlap == 1
    plain.step()
    with pytest.warns(FutureWarning, match="is now called LocalSGD.mark_synchronized"):
        plain.start_from_the_same()
    assert plain.local_steps == 0
    with pytest.raises(AttributeError, match="'LocalSGD' object has no attribute 'cycles'"):
        _ = plain.cycles
    assert NodeWorkerGroup(1).ranks_per_node == 1
    with pytest.warns(FutureWarning, match="is now called ADPSGDStrategy.handshake"):
        ADPSGDStrategy().meet("a validation")


def test_arguments():
    flags = SignalFlags()
    with pytest.warns(FutureWarning, match=r"LocalSGD\(notice=\.\.\.\) is now called LocalSGD\(flags=\.\.\.\)"):
        plain = local_sgd(notice=flags)
    flags.raised = 3
    plain.step()
    plain.average()
    assert flags.agreed == 3
    with pytest.warns(FutureWarning, match="async_group"):
        local_sgd(carrier=WorkerGroup())
    with pytest.raises(TypeError, match="unexpected keyword argument 'carriers'"):
        local_sgd(carriers=None)
