from datetime import timedelta

import pytest
import torch

from lightning_adpsgd import AveragingOptions
from lightning_adpsgd.elastic import ElasticLocalSGD

pytest.importorskip("torchft", reason="torchft is not installed: pip install 'lightning-adpsgd[elastic]'")


def make(**arguments):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    return ElasticLocalSGD(optimizer, 4, **{"lighthouse": "http://localhost:1", **arguments})


@pytest.mark.parametrize(
    "option",
    [{"stagger": True}, {"overlap": 1}, {"reduce_dtype": "int8"}, {"optimizer_state": "average"}],
)
def test_an_option_that_is_not_supported_is_refused_with_the_reason(option):
    with pytest.raises(ValueError, match="Leave it out, or use LocalSGD"):
        make(**option)
    with pytest.raises(ValueError, match=f"{next(iter(option))}="):
        make(options=AveragingOptions(**option))


def test_a_missing_lighthouse_is_named_with_what_to_set(monkeypatch):
    monkeypatch.delenv("TORCHFT_LIGHTHOUSE", raising=False)
    with pytest.raises(ValueError, match="TORCHFT_LIGHTHOUSE is not set: expected the address"):
        make(lighthouse=None)


def test_the_environment_names_the_lighthouse(monkeypatch):
    monkeypatch.setenv("TORCHFT_LIGHTHOUSE", "http://localhost:1")
    assert not make(lighthouse=None).has_joined


@pytest.mark.parametrize(
    ("argument", "error"),
    [
        ({"min_workers": 0}, ValueError),
        ({"start_workers": 1.5}, TypeError),
        ({"quorum_timeout": 5}, TypeError),
        ({"round_timeout": timedelta(0)}, ValueError),
        ({"worker_id": "a:b"}, ValueError),
        ({"lighthouse": 29510}, TypeError),
    ],
)
def test_an_argument_that_cannot_be_used_is_named(argument, error):
    with pytest.raises(error, match=next(iter(argument))):
        make(**argument)


def test_a_process_group_is_refused(pool):
    pool.run(refused, workers=2)


def refused():
    with pytest.raises(ValueError, match="a process group of several ranks: expected none"):
        make()


def test_without_a_lighthouse_that_answers_a_worker_trains_alone():
    local_sgd = make(quorum_timeout=timedelta(seconds=1))
    assert [local_sgd.step() for _ in range(6)] == [None] * 6
    assert local_sgd.local_steps == local_sgd.steps == 6
    local_sgd.close()


def test_also_is_refused():
    with pytest.raises(ValueError, match="also"):
        make().average(also=[torch.ones(1)])
