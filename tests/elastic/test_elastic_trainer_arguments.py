"""Wrong arguments of ``ADPSGDStrategy(elastic=...)``, in one process."""

from datetime import timedelta

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import StrategyRegistry
from torch.utils.data import BatchSampler, DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from lightning_adpsgd import ADPSGDStrategy
from lightning_adpsgd.elastic import ElasticOptions
from lightning_adpsgd.elastic.shards import shard

pytest.importorskip("torchft", reason="torchft is not installed: pip install 'lightning-adpsgd[elastic]'")
pytestmark = pytest.mark.usefixtures("alone")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"reduce_dtype": "int4"},
            "reduce_dtype='int4' for elastic workers: expected None, because a worker that joins",
        ),
        ({"stagger": True}, "stagger=True for elastic workers: expected False"),
        ({"overlap": 1}, "overlap=1 for elastic workers: expected 0"),
        ({"optimizer_state": "average"}, "optimizer_state='average' for elastic workers: expected 'local'"),
        ({"on_divergence": "drop"}, "on_divergence='drop' for elastic workers"),
        ({"worker": "node"}, "worker='node' with elastic=...: expected \"device\""),
    ],
)
def test_options_that_elastic_rounds_do_not_support_are_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace("...", r"\.\.\.")):
        ADPSGDStrategy(8, elastic=True, **arguments)


def test_the_argument_is_options_or_a_bool():
    with pytest.raises(TypeError, match=r"elastic='yes'.*expected ElasticOptions\(\.\.\.\), or True"):
        ADPSGDStrategy(elastic="yes")
    assert ADPSGDStrategy(elastic=False).is_global_zero


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"worker": 3, "max_workers": 3}, ValueError, "worker: expected less than max_workers=3|worker=3"),
        ({"worker": -1}, ValueError, "worker"),
        ({"max_workers": 0}, ValueError, "max_workers"),
        ({"min_workers": 0}, ValueError, "min_workers"),
        ({"leave_timeout": 5}, TypeError, "leave_timeout"),
        ({"join_timeout": timedelta(0)}, ValueError, "join_timeout"),
        ({"worker_id": "a b"}, ValueError, "worker_id"),
    ],
)
def test_options_are_checked_when_they_are_made(arguments, error, message):
    with pytest.raises(error, match=message):
        ElasticOptions(**arguments)


def test_the_worker_and_the_number_of_shares_come_from_the_environment(monkeypatch):
    monkeypatch.delenv("REPLICA_GROUP_ID", raising=False)
    monkeypatch.setenv("NUM_REPLICA_GROUPS", "5")
    with pytest.raises(ValueError, match="worker=None, and the environment variable REPLICA_GROUP_ID is not set"):
        ElasticOptions().with_environment()
    monkeypatch.setenv("REPLICA_GROUP_ID", "x")
    with pytest.raises(ValueError, match="REPLICA_GROUP_ID is 'x'"):
        ElasticOptions().with_environment()
    monkeypatch.setenv("REPLICA_GROUP_ID", "5")
    with pytest.raises(ValueError, match="max_workers=5"):
        ElasticOptions().with_environment()
    monkeypatch.setenv("REPLICA_GROUP_ID", "4")
    found = ElasticOptions().with_environment()
    assert (found.worker, found.max_workers, found.name) == (4, 5, "worker-000004")
    assert ElasticOptions(worker=1, max_workers=2).with_environment().worker == 1


class TwoOptimizers(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = torch.nn.Linear(2, 2)

    def training_step(self, batch, _):
        raise AssertionError("training has begun")

    def configure_optimizers(self):
        return [torch.optim.SGD([each], lr=0.1) for each in self.net.parameters()]


def one_worker(**arguments):
    elastic = ElasticOptions(lighthouse="http://localhost:9", worker=0, max_workers=1)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_steps": 2}
    return Trainer(
        strategy=ADPSGDStrategy(2, elastic=elastic), accelerator="cpu", **{"devices": 1, **quiet, **arguments}
    )


def test_several_optimizers_are_refused():
    with pytest.raises(ValueError, match="2 optimizers with elastic workers: expected one"):
        one_worker().fit(TwoOptimizers(), DataLoader(torch.zeros(4, 2)))


def test_pruning_is_refused():
    with pytest.raises(MisconfigurationException, match=r"ModelPruning with ADPSGDStrategy\(elastic=\.\.\.\)"):
        one_worker(callbacks=[ModelPruning("l1_unstructured", amount=0.5)]).fit(BoringModel())


def test_a_worker_without_a_number_is_refused(monkeypatch):
    monkeypatch.delenv("REPLICA_GROUP_ID", raising=False)
    trainer = Trainer(strategy="adpsgd_elastic", accelerator="cpu", devices=1, logger=False)
    with pytest.raises(ValueError, match="each worker trains on its own share of the data"):
        trainer.fit(BoringModel())


def test_the_name_stands_for_workers_that_the_environment_describes():
    assert StrategyRegistry["adpsgd_elastic"]["init_params"] == {"elastic": True}


def share(worker, epoch, batches=0, shuffle=False, workers=3):
    data = TensorDataset(torch.arange(12))
    loader = DataLoader(data, 2, sampler=DistributedSampler(data, workers, worker, shuffle=shuffle))
    shard(loader, epoch, batches)
    return loader


def numbers(loader):
    return [number for (batch,) in loader for number in batch.tolist()]


@pytest.mark.parametrize("shuffle", [False, True])
def test_shares_are_disjoint_in_each_epoch_and_a_missing_workers_samples_are_seen_in_others(shuffle):
    for epoch in (0, 1, 5):
        assert sorted(n for worker in range(3) for n in numbers(share(worker, epoch, shuffle=shuffle))) == [*range(12)]
    two_of_three = {n for epoch in range(3 if not shuffle else 12) for w in (0, 2) for n in numbers(share(w, epoch))}
    assert two_of_three == {*range(12)}


def test_a_share_begins_where_the_others_are_but_only_once():
    whole, later = numbers(share(1, 2)), share(1, 2, batches=1)
    assert numbers(later) == whole[2:]
    assert numbers(later) == whole
    assert len(later) == 2
    later.batch_sampler.sampler.set_epoch(3)
    assert numbers(later) == numbers(share(1, 3))


class Batches(BatchSampler):
    pass


def test_a_share_of_batches_that_a_sampler_of_the_users_makes_begins_there_too():
    data = TensorDataset(torch.arange(12))
    sampler = DistributedSampler(data, 3, 1, shuffle=False)
    loader = DataLoader(data, batch_sampler=Batches(sampler, 2, drop_last=False))
    shard(loader, 2, 1)
    assert numbers(loader) == numbers(share(1, 2))[2:]


def test_loaders_with_samplers_of_their_own_are_left_alone():
    loader = DataLoader(TensorDataset(torch.arange(12)), 2)
    shard(loader, 1, 1)
    assert numbers(loader) == [*range(12)]
    shard([1, 2], 1, 1)
