"""The Trainer that benchmarks train with, and what they attach to it."""

import inspect
import itertools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy
from torch import Tensor, nn

from benchmarks.frame.device import Device
from lightning_adpsgd import ADPSGDStrategy, AveragingRound

NEVER = 10**9  # an averaging period that never ends


def new_trainer(strategy: Strategy, *callbacks: Callback, **options: Any) -> L.Trainer:
    """A Trainer that does nothing but train; on one CPU process per host unless the options say otherwise."""
    return L.Trainer(
        strategy=strategy,
        callbacks=[*callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"accelerator": "cpu", "devices": 1, **options},
    )


def new_device_trainer(strategy: Strategy | None, device: Device, *callbacks: Callback) -> L.Trainer:
    """A Trainer on a rank that shares the device with the others.

    The strategy is made with :func:`all_ranks`; None is a single device's, which knows of no other rank.
    """
    options: dict[str, Any] = {"max_epochs": 1, "use_distributed_sampler": False}
    if strategy is None:
        strategy, options["plugins"] = SingleDeviceStrategy(device.torch), [LightningEnvironment()]
    return new_trainer(strategy, *callbacks, accelerator="gpu" if device.is_cuda else "cpu", **options)


def all_ranks(device: Device) -> dict[str, Any]:
    """Arguments that tell a strategy that all ranks are on one device, which Lightning would not assume."""
    return {
        "parallel_devices": [device.torch] * int(os.environ["WORLD_SIZE"]),
        "process_group_backend": torch.distributed.get_backend(),
    }


def unknown_options(options: Mapping[str, Any]) -> str | None:
    """Which of these options of `ADPSGDStrategy` this version of the package does not have; None if it has all."""
    known = inspect.signature(ADPSGDStrategy).parameters
    unknown = [f"{option}={value!r}" for option, value in options.items() if option not in known]
    return f"this version of lightning_adpsgd does not have {', '.join(unknown)}" if unknown else None


VARIANTS: dict[str, dict[str, Any]] = {
    "adpsgd": {},
    "adpsgd-overlap": {"overlap": 1},
    "adpsgd-stagger": {"stagger": True},
    "adpsgd-stagger-overlap": {"stagger": True, "overlap": 1},
    "adpsgd-bf16": {"reduce_dtype": "bf16"},
}
"""Contenders of this package that several benchmarks have, and their options of `ADPSGDStrategy`."""


class Sent(NamedTuple):
    """What a rank has communicated since a run began."""

    rounds: int = 0  # averages of the model or of its gradient over all ranks
    bytes: int = 0  # as the contender counts them, or what a ring all-reduce sends for what was reduced


class Rounds(Callback):
    """Keeps the averaging rounds of a fit; none if the strategy is not `ADPSGDStrategy`."""

    def __init__(self) -> None:
        self.kept: list[AveragingRound] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Subscribe."""
        if isinstance(trainer.strategy, ADPSGDStrategy):
            trainer.strategy.subscribe(self.kept.append)

    def between(self, first: int, last: int) -> list[AveragingRound]:
        """Those that the period triggered after steps ``first`` + 1 to ``last``."""
        return [each for each in self.kept if each.trigger == "period" and first < each.step <= last]

    def sent(self) -> Sent:
        """The number of rounds and the bytes that they sent."""
        return Sent(len(self.kept), sum(each.sent_bytes for each in self.kept))


class Losses(Callback):
    """Keeps the training losses, as tensors, so that nothing waits for them."""

    def __init__(self) -> None:
        self.of_steps: list[Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        """Keep one."""
        self.of_steps.append(outputs["loss"].detach())


@dataclass
class Batches:
    """The same batch, ``count`` times, at no cost."""

    batch: Any
    count: int

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        return itertools.repeat(self.batch, self.count)


def parameter_count(network: nn.Module) -> int:
    """How many parameters a network has."""
    return sum(parameter.numel() for parameter in network.parameters())


def whole_batch(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The ``collate_fn`` for data sets that return whole batches."""
    return batch
