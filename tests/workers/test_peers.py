"""Workers that have ended are named wherever others wait for them, and a run's connections are closed after it."""

import os
import subprocess
import sys
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_adpsgd import ADPSGDStrategy, LocalSGD, WorkerGroup
from lightning_adpsgd.rounds.handshake import KINDS, Handshake, RankState, check_module
from lightning_adpsgd.workers.peers import Peers
from lightning_adpsgd.workers.reduction import CollectiveError
from tests.training import Classifier, fit, identical, loader, weights
from tests.workers.test_nodes import announce_nodes
from tests.workers.test_reduction import Device

pytestmark = pytest.mark.workers


# What ranks post in the store


def statuses_left_behind() -> dict:
    workers = WorkerGroup()
    if workers.rank > 0:
        workers.peers.post_status(f"had enough of rank {workers.rank}")
    dist.barrier()
    workers.peers.abort()
    statuses, answered = workers.peers.statuses(seconds=0.2)
    lingered = []
    for _ in range(2):
        begun = time.monotonic()
        workers.peers.linger(seconds=20.0)
        lingered.append(time.monotonic() - begun)
    return {"statuses": statuses, "answered": answered, "lingered": lingered}


def test_statuses_are_found_once_connections_are_closed_and_ranks_that_linger_are_not_waited_for(pool):
    outcomes = pool.run(statuses_left_behind, workers=3)
    first, second, third = (outcome["statuses"] for outcome in outcomes)
    assert first == {1: "had enough of rank 1", 2: "had enough of rank 2"}
    assert second == {2: "had enough of rank 2"}
    assert third == {1: "had enough of rank 1"}
    assert all(outcome["answered"] and max(outcome["lingered"]) < 20.0 for outcome in outcomes)


def silence_of_the_others() -> list[float]:
    workers = WorkerGroup()
    lingered = []
    for _ in range(2 if workers.rank == 0 else 0):
        begun = time.monotonic()
        workers.peers.linger(seconds=0.4)
        lingered.append(time.monotonic() - begun)
    return lingered


def test_first_rank_lingers_once_for_ranks_that_post_nothing(pool):
    lingered, _ = pool.run(silence_of_the_others)
    assert lingered[0] >= 0.4 > lingered[1]


def wait_for_one_that_has_failed() -> tuple[str, float]:
    workers = WorkerGroup()
    workers.peers.post_status("failed in another run", failed=True)
    dist.barrier()
    workers.peers.clear_status()
    begun = time.monotonic()
    if workers.rank == 1:
        workers.peers.post_status("had ended training")
        time.sleep(1.5)  # ranks that ended normally, or failed in another run, are waited for
        workers.peers.post_status("had failed at step 2: ValueError: boom", failed=True)
        return "", 0.0
    with pytest.raises(CollectiveError) as caught:
        workers.patience.wait_for(Device(), begun)
    return str(caught.value), time.monotonic() - begun


def test_a_wait_for_a_device_ends_for_failures_of_this_run_only(pool):
    (told, seconds), *_ = pool.run(wait_for_one_that_has_failed)
    assert told == "rank 1 has failed meanwhile"
    assert 3.5 < seconds < 30.0


# A process group without a name


def abort_without_a_name() -> dict:
    dist.init_process_group(timeout=timedelta(seconds=30))
    workers = WorkerGroup()
    rows = torch.ones(2, 5, dtype=torch.uint8)
    total = workers.exchange(rows, lambda rows: rows.sum(dim=0).to(torch.uint8), [], [5, 5]).wait()
    begun = time.monotonic()
    if workers.rank == 0:
        workers.peers.abort()
    else:
        with pytest.raises(CollectiveError):
            workers.table([0.0])
    return {"total": total.tolist(), "connected": dist.is_initialized(), "seconds": time.monotonic() - begun}


def test_connections_of_a_group_that_was_made_without_naming_a_backend_are_closed_at_once(pool):
    outcomes = pool.run_trainer(abort_without_a_name)
    assert [outcome["total"] for outcome in outcomes] == [[[2] * 5] * 2] * 2
    assert not outcomes[0]["connected"]
    assert outcomes[1]["seconds"] < 20.0


def test_with_nccl_connections_are_aborted(monkeypatch):
    # There is no GPU, so this tests what torch is asked for.
    done = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: None)
    monkeypatch.setattr(dist, "get_backend_config", lambda group=None: "cpu:gloo,cuda:nccl")
    monkeypatch.setattr(dist, "destroy_process_group", lambda: done.append("destroyed"))
    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", lambda: done.append("aborted"))
    Peers(0, 2, torch.device("cuda")).abort()
    assert done == ["aborted"]
    Peers(0, 2, torch.device("cpu")).abort()
    assert done == ["aborted", "destroyed"]


# A worker that ends where others wait for it, outside a round


class _Cluster:
    """The ranks' placement, as far as a strategy asks for it."""

    def node_rank(self) -> int:
        return 0

    def local_rank(self) -> int:
        return dist.get_rank()


def local_sgd_of(*models: nn.Module, **options: Any) -> LocalSGD:
    parameters = [parameter for model in models for parameter in model.parameters()]
    return LocalSGD(torch.optim.SGD(parameters, lr=0.1), 4, module=models[0], total_steps=100, **options)


# Each is what the first worker does alone; it is told whether it is the one that ends in the middle of it.


def broadcast_the_weights(model: nn.Module, goes: bool) -> None:
    local_sgd = local_sgd_of(model)
    check_module(local_sgd.workers, model) if goes else local_sgd.broadcast()


def compare_the_models(model: nn.Module, goes: bool) -> None:
    if goes:
        Handshake(WorkerGroup(), RankState(KINDS.index("the setup"), 0, fingerprint=1)).complete()
    else:
        check_module(WorkerGroup(), model)


def find_out_about_nodes(model: nn.Module, goes: bool) -> None:
    if not goes:
        strategy = ADPSGDStrategy(2, worker="node", parallel_devices=[torch.device("cpu")] * 2)
        strategy.cluster_environment = _Cluster()
        strategy._new_workers("node")


def connect_the_nodes(model: nn.Module, goes: bool) -> None:
    if goes:
        WorkerGroup().table([0, 1])
    else:
        find_out_about_nodes(model, goes)


def open_further_connections(model: nn.Module, goes: bool) -> None:
    if not goes:
        local_sgd_of(model, stagger=True)


def compare_what_is_averaged(model: nn.Module, goes: bool) -> None:
    local_sgd = local_sgd_of(model, stagger=True)
    if goes:
        call = local_sgd._engine._contact.state("a change of what is averaged", "period", 4, fingerprint=1)
        Handshake(local_sgd.workers, call._replace(step=4)).complete()
    else:
        for _ in range(4):
            local_sgd.step()


PLACES = [
    broadcast_the_weights,
    compare_the_models,
    find_out_about_nodes,
    connect_the_nodes,
    open_further_connections,
    compare_what_is_averaged,
]


def go_at_each_place(folder: str) -> dict[str, tuple[str, str]]:
    rank, told = int(os.environ["RANK"]), {}
    for place in PLACES:
        store = dist.FileStore(f"{folder}/{place.__name__}", 2)
        store.set(
            f"rank {rank} is here", ""
        )  # on a busy machine one may come late, and connecting waits for two seconds
        store.wait(["rank 0 is here", "rank 1 is here"], timedelta(seconds=60))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=2))
        workers = WorkerGroup()
        try:
            place(nn.Linear(3, 2), goes=rank == 1)
            if rank == 1:
                workers.peers.post_status(f"had no wish to {place.__name__}")
        except Exception as error:
            told[place.__name__] = type(error).__name__, str(error)
        workers.peers.abort()
        if rank == 0:
            store.set("next", "")
        else:
            workers.peers.linger(0.0)  # needs no more statuses
            store.wait(["next"], timedelta(seconds=60))
    return told


def test_a_worker_that_ends_is_named_wherever_others_wait_for_it(pool, tmp_path):
    told, gone = pool.run_trainer(go_at_each_place, str(tmp_path))
    assert gone == {}
    for place in PLACES:
        kind, message = told[place.__name__]
        assert kind == "WorkerLostError", (place, kind, message)
        assert f"Rank 1 had no wish to {place.__name__}." in message


class GoesAtTheStart(Classifier):
    def on_train_start(self) -> None:
        if self.global_rank == 1:
            raise ValueError("boom")


def fit_with_one_that_goes_at_the_start() -> None:
    fit(ADPSGDStrategy(2), GoesAtTheStart(), max_steps=4)


def test_a_worker_that_ends_before_the_rules_start_is_named(pool):
    missed, gone = pool.outcomes(fit_with_one_that_goes_at_the_start, trainer=True)
    assert gone.kind == "ValueError"
    assert missed.kind == "WorkerLostError", missed.error
    assert "Rank 1 had failed at step 0, 0 after its latest averaging round: ValueError: boom." in missed.error


# What is opened for a run


class TwoOptimizers(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any) -> None:
        self.manual_backward(self.loss(batch))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(layer.parameters(), lr=0.05) for layer in (self.net[0], self.net[3])]


def several_fits(worker: str, folder: str) -> dict:
    groups, states = [], []
    announce_nodes([0, 1])
    for run in range(3):
        torch.manual_seed(0)
        model = TwoOptimizers()
        strategy = ADPSGDStrategy(4, worker=worker, stagger=True, overlap=1)
        fitted, _ = fit(strategy, model, max_steps=20, devices=1, num_nodes=2)
        groups.append(len(dist.distributed_c10d._world.pg_map))
        states.append(weights(model))
        if run == 1:
            fitted.save_checkpoint(f"{folder}/after.ckpt")
            fitted.fit_loop.max_epochs, fitted.fit_loop.epoch_loop.max_steps = 2, 60
            fitted.fit(model, loader())
            groups.append(len(dist.distributed_c10d._world.pg_map))
            states.append(weights(model))
    return {"groups": groups, "states": states}


@pytest.mark.parametrize("worker", ["device", "node"])
def test_each_fit_closes_the_connections_that_it_has_opened_and_another_one_works(pool, tmp_path, worker):
    outcomes = pool.run_trainer(several_fits, worker, str(tmp_path))
    for outcome in outcomes:
        assert outcome["groups"] == [1] * 4
    for states in zip(*(outcome["states"] for outcome in outcomes), strict=True):
        assert identical(list(states))
    first, second, _, third = outcomes[0]["states"]
    assert identical([first, second, third])


def step_in_different_orders(overlap: int) -> None:
    small, large = nn.Linear(5, 3), nn.Linear(100, 100)
    both = [local_sgd_of(model, stagger=True, overlap=overlap, index=i) for i, model in enumerate((small, large))]
    for step in range(20):
        for local_sgd in reversed(both) if step == 9 and dist.get_rank() == 1 else both:
            local_sgd.step()


def test_ranks_that_step_their_optimizers_in_different_orders_are_told_so(pool):
    # On shared connections, fragments of different sizes would meet, at which gloo ends the process.
    for overlap in (0, 2):
        for outcome in pool.outcomes(step_in_different_orders, overlap):
            assert outcome.kind == "WorkersDisagreeError"
            assert "of optimizer 0" in outcome.error
            assert "of optimizer 1" in outcome.error


# What the host has to read


class Readings(TorchDispatchMode):
    """Counts how often the host asks for a tensor's value, for which it would wait on a GPU."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def train_with_rates(as_tensors: bool, options: dict) -> dict:
    torch.manual_seed(dist.get_rank())
    number = torch.tensor if as_tensors else float
    model = nn.Linear(6, 4)
    groups = [{"params": [model.weight], "lr": number(0.1)}, {"params": [model.bias], "lr": number(0.0)}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    for group in optimizer.param_groups:
        group["betas"] = (number(0.9), number(0.999))  # with which momentum is looked ahead
    local_sgd = LocalSGD(optimizer, 4, module=model, total_steps=40, **options)
    local_sgd.broadcast()
    rounds, readings = [], Readings()
    local_sgd.subscribe(rounds.append)
    for _ in range(20):
        optimizer.zero_grad()
        model(torch.randn(3, 6)).square().mean().backward()
        optimizer.step()
        with readings:
            local_sgd.step()
    return {
        "readings": readings.count,
        "rounds": [(r.step, r.variance, r.ratio, r.learning_rate) for r in rounds],
        "weights": weights(model),
    }


@pytest.mark.parametrize("options", [{}, {"stagger": True}, {"stagger": True, "overlap": 2}], ids=str)
def test_rates_that_are_tensors_are_not_read_by_the_host_and_mean_the_same(pool, options):
    tensors, numbers = (pool.run(train_with_rates, as_tensors, options) for as_tensors in (True, False))
    for with_tensors, with_numbers in zip(tensors, numbers, strict=True):
        # Two betas of two groups are read once at most, not at every step.
        assert with_tensors["readings"] <= with_numbers["readings"] + 4
        assert len(with_tensors["rounds"]) == len(with_numbers["rounds"]) > 2
        for ours, theirs in zip(with_tensors["rounds"], with_numbers["rounds"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-6)
        for name, tensor in with_numbers["weights"].items():
            torch.testing.assert_close(with_tensors["weights"][name], tensor)


THREADS_OF_A_SCRIPT_WITHOUT_LIGHTNING = """
import glob, sys, time
import torch
import torch.distributed as dist
from lightning_adpsgd import LocalSGD

dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
model = torch.nn.Linear(2, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # its first step imports more of torch
local_sgd = LocalSGD(optimizer, total_steps=1)
model(torch.ones(1, 2)).sum().backward()
optimizer.step()
local_sgd.step()
dist.all_reduce(torch.ones(1))
dist.destroy_process_group()
names = [open(file).read() for file in glob.glob("/proc/self/task/*/comm")]
assert names, "no thread was found"
print(sum("gloo_runloop" in name for name in names))
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="lists threads as Linux does")
def test_the_threads_of_a_group_end_when_a_script_without_lightning_destroys_it(tmp_path):
    script = [sys.executable, "-c", THREADS_OF_A_SCRIPT_WITHOUT_LIGHTNING, str(tmp_path / "store")]
    done = subprocess.run(script, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1:] == ["0"], done.stderr  # gloo of older versions prints lines of its own
