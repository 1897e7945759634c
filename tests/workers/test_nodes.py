"""Nodes as workers: their ranks average gradients at every step, and parameters are sent once per node."""

import os
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_adpsgd import ADPSGDStrategy, CommunicationMonitor
from lightning_adpsgd.averaging.averager import ParameterAverager, Terms
from lightning_adpsgd.averaging.layout import FlatLayout
from lightning_adpsgd.workers.contribution import Contribution
from lightning_adpsgd.workers.nodes import NodeWorkerGroup
from tests.training import Classifier, fit, floats, identical, loader, weights

pytestmark = pytest.mark.workers


def average_over_nodes(length: int, dropped: bool) -> dict:
    workers = NodeWorkerGroup(2)
    node = workers.worker_of(workers.rank)
    tensor = torch.arange(length, dtype=torch.float32) * (node + 1)
    share = Contribution(1, 0 if node == 0 else None) if dropped else None
    before = workers.payload_bytes
    averager = ParameterAverager(FlatLayout([tensor], [0]), 1, workers, 40)
    deviation = averager.average(None if share is None else Terms(share))
    small = workers.launch_mean([float(node)], share).wait()
    return {
        "tensor": tensor,
        "deviation": deviation.item(),
        "small": small.item(),
        "bytes": workers.payload_bytes - before,
        "count": (workers.count, workers.size),
    }


@pytest.mark.parametrize("length", [1, 7, 64])
@pytest.mark.parametrize("dropped", [False, True], ids=["all nodes", "the first node alone"])
def test_mean_is_that_of_the_nodes_and_each_rank_sends_its_slice(pool, length, dropped):
    outcomes = pool.run(average_over_nodes, length, dropped, workers=6)
    values = torch.arange(length, dtype=torch.float32)
    for rank, outcome in enumerate(outcomes):
        mean = values if dropped else values * 2
        torch.testing.assert_close(outcome["tensor"], mean)
        own = values * (rank // 2 + 1)
        assert outcome["deviation"] == pytest.approx((own - mean).square().sum().item(), rel=1e-5, abs=1e-6)
        assert outcome["small"] == pytest.approx(0.0 if dropped else 1.0)
        assert outcome["count"] == (3, 6)
    for node in range(3):
        sent = sum(outcome["bytes"] for outcome in outcomes[2 * node : 2 * node + 2])
        assert sent == 4 * length + 2 * 8  # one tensor per node, and two small means


class Fed(Classifier):
    """Each of four sources feeds one rank, or two of them one rank."""

    def __init__(self, sources: int) -> None:
        super().__init__(momentum=0.9, batch_norm=False)
        self.sources = sources

    def training_step(self, batch: Any) -> Tensor:
        each = []
        for source in range(self.sources):
            seed = 1000 * (self.global_rank * self.sources + source) + self.trainer.global_step
            each.append(torch.randn(8, 8, generator=torch.Generator().manual_seed(seed)))
        inputs = torch.cat(each)
        return self.loss((inputs, inputs[:, :3].argmax(dim=1)))


def announce_nodes(nodes: list[int]) -> None:
    """Put this rank on the node that the list says, as torchrun would."""
    rank = int(os.environ["RANK"])
    node = nodes[rank]
    os.environ.update(
        GROUP_RANK=str(node), LOCAL_RANK=str(nodes[:rank].count(node)), LOCAL_WORLD_SIZE=str(nodes.count(node))
    )


def train_nodes(options: dict) -> dict:
    announce_nodes([0, 0, 1, 1])
    return train(Fed(1), {"devices": 2, "num_nodes": 2}, worker="node", **options)


def train_devices(options: dict) -> dict:
    return train(Fed(2), {}, **options)


def train(model: Fed, trainer: dict, **options: Any) -> dict:
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    monitor = CommunicationMonitor()
    strategy = ADPSGDStrategy(4, **options)
    fit(strategy, model, callbacks=[monitor], max_steps=14, loaders={"train_dataloaders": loader(800)}, **trainer)
    return {
        "weights": weights(model),
        "rounds": [(r.step, r.trigger, r.variance, r.ratio) for r in monitor.rounds],
        "bytes": sum(r.payload_bytes for r in monitor.rounds),
        "wrapped": type(strategy.model).__name__,
    }


@pytest.mark.parametrize(
    "options",
    [{}, {"stagger": True, "overlap": 1}, {"optimizer_state": "average"}, {"reduce_dtype": "bf16"}],
    ids=str,
)
def test_nodes_end_with_the_weights_of_single_devices_with_all_their_data(pool, options):
    nodes = pool.run_trainer(train_nodes, options, workers=4)
    devices = pool.run_trainer(train_devices, options, workers=2)
    assert identical([outcome["weights"] for outcome in nodes])
    tolerance = {"atol": 2e-3, "rtol": 0} if "reduce_dtype" in options else {"atol": 1e-5, "rtol": 1e-4}
    for name, tensor in floats(devices[0]["weights"]).items():
        torch.testing.assert_close(nodes[0]["weights"][name], tensor, **tolerance)
    for ours, theirs in zip(nodes[0]["rounds"], devices[0]["rounds"], strict=True):
        assert ours[:2] == theirs[:2]
        assert ours[2:] == pytest.approx(theirs[2:], rel=0.05 if "reduce_dtype" in options else 1e-3)
    tables = 14 * 13 * 8 * 4 * 3
    assert abs(nodes[0]["bytes"] + nodes[1]["bytes"] - devices[0]["bytes"]) < tables


def one_node(kind: str) -> dict:
    torch.manual_seed(0)
    model, monitor = Fed(1), CommunicationMonitor()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        strategy = ADPSGDStrategy(4, worker="node") if kind == "node" else "ddp"
        loaders = {"train_dataloaders": loader(800)}
        fit(strategy, model, callbacks=[monitor], max_steps=9, loaders=loaders)
    return {
        "weights": weights(model),
        "warned": [str(w.message) for w in caught if 'worker="node") on one node' in str(w.message)],
        "sent": sum(round_.sent_bytes for round_ in monitor.rounds),
    }


def test_one_node_is_plain_ddp_with_a_warning(pool):
    ours, theirs = (pool.run_trainer(one_node, kind) for kind in ("node", "ddp"))
    for rank in range(2):
        for name, tensor in floats(theirs[rank]["weights"]).items():
            assert torch.equal(ours[rank]["weights"][name], tensor)
        assert ours[rank]["sent"] == 0
    assert [len(outcome["warned"]) for outcome in ours] == [1, 0]
    assert "a gradient all-reduce at every step" in ours[0]["warned"][0]


def uneven_nodes() -> str:
    announce_nodes([0, 0, 1])
    strategy = ADPSGDStrategy(4, worker="node")
    dist.init_process_group("gloo")
    strategy.cluster_environment = _Placed()
    strategy.parallel_devices = [torch.device("cpu")] * 2
    with pytest.raises(MisconfigurationException) as caught:
        strategy._new_workers("node")
    return str(caught.value)


class _Placed:
    """A cluster as it has placed this rank."""

    def node_rank(self) -> int:
        return int(os.environ["GROUP_RANK"])

    def local_rank(self) -> int:
        return int(os.environ["LOCAL_RANK"])


def test_nodes_with_different_numbers_of_ranks_are_refused_with_those_numbers(pool):
    for message in pool.run_trainer(uneven_nodes, workers=3):
        assert "ranks of node 0: 2, node 1: 1" in message


@pytest.mark.parametrize(("given", "error"), [("2", TypeError), (2.0, TypeError), (0, ValueError), (-1, ValueError)])
def test_ranks_per_node_are_an_int_of_at_least_one(given, error):
    with pytest.raises(error, match=r"NodeWorkerGroup\(ranks_per_node=.*expected an int of at least 1"):
        NodeWorkerGroup(given)
