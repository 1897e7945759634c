"""Trains one client as its user would start it, and writes down what has come of it.

Each client is a script: ``python -m tests.clients.gan --strategy adpsgd --seed 1 --results gan.json``.
"""

import argparse
import json
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.distributed as dist
from torch import nn

from lightning_adpsgd import CommunicationMonitor

WORKERS = 2


class Client(NamedTuple):
    """A project, all of which is the same under every strategy."""

    module: L.LightningModule
    data: Any
    """What ``Trainer.fit`` takes: a data loader or a data module; None if the module makes its own."""
    loss: Callable[[], float]
    """The loss of the trained module on data held out."""
    trainer: dict[str, Any]
    """Arguments of the Trainer."""
    validation: Any = None


def run(client: Callable[[], Client], packages: tuple[str, ...]) -> None:
    """Train a client on two CPU workers, as the command line says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--strategy", default="adpsgd")
    parser.add_argument("--seed", default=1, type=int)
    parser.add_argument("--results", type=Path, help="the file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    L.seed_everything(arguments.seed, verbose=False)
    project = client()
    monitor = CommunicationMonitor()
    periodic = arguments.strategy.startswith("adpsgd")
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, **project.trainer}
    callbacks = [*options.pop("callbacks", []), *([monitor] if periodic else [])]
    trainer = L.Trainer(strategy=arguments.strategy, accelerator="cpu", devices=WORKERS, callbacks=callbacks, **options)
    start = time.perf_counter()
    trainer.fit(project.module, project.data, project.validation)
    seconds = time.perf_counter() - start
    frozen = _bytes_of(project.module, lambda parameter: not parameter.requires_grad)
    outcome = {
        "versions": {package: version(package) for package in packages},
        "steps": trainer.global_step,
        "loss": project.loss(),
        "differing": _differing(project.module),
        "seconds": seconds,
        "trained_bytes": _bytes_of(project.module, lambda parameter: parameter.requires_grad),
        "frozen_bytes": frozen,
        "optimizer_bytes": [_bytes_in(optimizer) for optimizer in trainer.optimizers],
        "buffer_bytes": sum(each.nbytes for each in _averaged_buffers(project.module)),
        "rounds": [round_._asdict() for round_ in monitor.rounds],
        "summary": monitor.summary(),
    }
    if trainer.is_global_zero and arguments.results is not None:
        arguments.results.write_text(json.dumps(outcome))


def _differing(module: nn.Module) -> list[str]:
    """The names of floating-point parameters and buffers that are not the same on all workers, bit for bit."""
    mine = {name: tensor for name, tensor in module.state_dict().items() if tensor.is_floating_point()}
    different = []
    for name, tensor in mine.items():
        first = tensor.detach().clone()
        dist.broadcast(first, 0)
        if not torch.equal(first, tensor):
            different.append(name)
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, different)
    return sorted(set().union(*everybody))


def _bytes_of(module: nn.Module, chosen: Callable[[nn.Parameter], bool]) -> int:
    return sum(parameter.nbytes for parameter in module.parameters() if chosen(parameter))


def _bytes_in(optimizer: torch.optim.Optimizer) -> int:
    return sum(p.nbytes for group in optimizer.param_groups for p in group["params"] if p.requires_grad)


def _averaged_buffers(module: nn.Module) -> list[torch.Tensor]:
    kept = {id(tensor) for tensor in module.state_dict(keep_vars=True).values()}
    return [each for each in module.buffers() if each.is_floating_point() and id(each) in kept]
