"""What a worker of the tests does: it trains a small network on data of its own, and tells where it stands."""

import os
import signal
import warnings
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import nn

from lightning_adpsgd import AdaptivePeriod, LocalSGD
from lightning_adpsgd.elastic import ElasticLocalSGD
from lightning_adpsgd.workers.reduction import CollectiveError, Reduction

DEAD_AFTER_MS = 1000
"""Without a heartbeat for this long, the lighthouse takes a worker for dead."""


def serve_lighthouse(pipe: Connection, join_timeout_ms: int, port: int, min_replicas: int) -> None:
    from torchft.coordination import LighthouseServer

    server = LighthouseServer(
        bind=f"[::]:{port}",
        min_replicas=min_replicas,
        join_timeout_ms=join_timeout_ms,
        quorum_tick_ms=20,
        heartbeat_timeout_ms=DEAD_AFTER_MS,
    )
    pipe.send(int(server.address().rpartition(":")[2]))
    signal.pause()


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))


def batch(worker: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * worker + step)
    x = torch.randn(16, 4, generator=generator)
    return x, x.sum(dim=1, keepdim=True) + 0.1 * torch.randn(16, 1, generator=generator)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, worker: int, step: int) -> None:
    x, y = batch(worker, step)
    optimizer.zero_grad()
    nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()


class Fault:
    """Stands in for a method: its next call kills this process, or fails after it has been done."""

    def __init__(self, method: Any, kind: str) -> None:
        self.method, self.kind = method, kind

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        result = self.method(*args, **kwargs)
        if self.kind == "fail":
            self.kind = ""
            if isinstance(result, Reduction):
                result.wait()
            raise CollectiveError("a fault that the test has asked for")
        return result


def snapshot(local_sgd: LocalSGD, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {
        "weights": [tensor.clone() for tensor in model.state_dict().values()],
        "momentum": [state["momentum_buffer"].clone() for state in optimizer.state.values()],
        "steps": local_sgd.steps,
        "rule": local_sgd.state_dict()["period"],
        "first_workers": local_sgd.state_dict()["first_workers"],
    }


def make(worker: int, period: Any, plain: bool = False, **options: Any) -> Any:
    torch.set_num_threads(1)
    model = network(worker)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    if plain:
        local_sgd = LocalSGD(optimizer, period, module=model, total_steps=60)
    else:
        local_sgd = ElasticLocalSGD(
            optimizer,
            period,
            module=model,
            total_steps=60,
            worker_id=f"w{worker}",
            hostname="localhost",
            round_timeout=timedelta(seconds=20),
            join_timeout=timedelta(seconds=60),
            **{"quorum_timeout": timedelta(seconds=20), **options},
        )
    return model, optimizer, local_sgd


def rule() -> AdaptivePeriod:
    return AdaptivePeriod(initial=4, sampling=0.25)


def follow(
    worker: int,
    pipe: Connection,
    address: str,
    period: Any = 4,
    restarts: int = 0,
    **options: Any,
) -> None:
    """Take as many steps as the test says, one message each, and answer with what this worker holds.

    Args:
        worker: its number.
        pipe: to the test.
        address: the lighthouse's.
        period: the averaging period, or None for the adaptive rule.
        restarts: how often a launcher has started it again.
        options: further arguments of :class:`ElasticLocalSGD`.
    """
    os.environ["ADPSGD_RESTARTS"] = str(restarts)
    model, optimizer, local_sgd = make(worker, rule() if period is None else period, lighthouse=address, **options)
    records: list[Any] = []
    local_sgd.subscribe(records.append)
    taken = 0
    warned: list[str] = []
    warnings.showwarning = lambda message, *_, **__: warned.append(str(message))
    for command in iter(pipe.recv, "end"):
        if command == "join":
            local_sgd.broadcast()
        elif isinstance(command, tuple):
            kind, method = command  # of the group of workers
            setattr(local_sgd.workers, method, Fault(getattr(local_sgd.workers, method), kind))
        elif command == "average":
            local_sgd.average()
        elif command != "look":
            for _ in range(command):
                train_step(model, optimizer, worker, taken)
                taken += 1
                local_sgd.step()
        told = [record._replace(seconds=0.0) for record in records]
        pipe.send({"records": told, "taken": taken, "warned": warned, **snapshot(local_sgd, model, optimizer)})
    local_sgd.close()


def plain(steps: int, period: Any) -> dict[str, Any]:
    """The same training with :class:`LocalSGD`, on a rank of a process group."""
    worker = torch.distributed.get_rank()
    model, optimizer, local_sgd = make(worker, rule() if period is None else period, plain=True)
    records: list[Any] = []
    local_sgd.subscribe(records.append)
    local_sgd.broadcast()
    for step in range(steps):
        train_step(model, optimizer, worker, step)
        local_sgd.step()
    local_sgd.average()
    told = [record._replace(seconds=0.0) for record in records]
    return {"records": told, "taken": steps, **snapshot(local_sgd, model, optimizer)}
