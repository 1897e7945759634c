"""What a test's function returns from its ranks, and what that is compared with."""

import contextlib
import copy
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from lightning_adpsgd import ADPSGDStrategy
from tests.training import data, fit, floats, identical, weights

Round = tuple[int, int, str]
"""Of which optimizer, after which step, and its trigger."""


def outcome_of(model: L.LightningModule, strategy: Any = None, **options: Any) -> dict:
    """Fit, and return the outcome, for ``check``, which gets those of all ranks."""
    before = weights(model)
    fitted, rounds = fit(strategy or ADPSGDStrategy(4), model, **options)
    return {
        "before": before,
        "weights": weights(model),
        "rounds": [(r.optimizer, r.step, r.trigger) for r in rounds],
        "variances": [r.variance for r in rounds],
        "periods": [r.period for r in rounds],
        "global_step": fitted.global_step,
        "epoch": fitted.current_epoch,
    }


def check(outcomes: list[dict], rounds: list[Round] | None = None) -> None:
    """The ranks agree on everything, had drifted apart in between, have learned something, and averaged as expected."""
    assert identical([outcome["weights"] for outcome in outcomes])
    assert len({tuple(outcome["rounds"]) for outcome in outcomes}) == 1
    assert all(variance > 0 for variance in outcomes[0]["variances"])
    assert not identical([outcomes[0]["before"], outcomes[0]["weights"]])
    if rounds is not None:
        assert outcomes[0]["rounds"] == rounds


def periods(steps: int, period: int = 4, optimizer: int = 0) -> list[Round]:
    """The rounds of a run that only the period and the end of training trigger."""
    rounds = [(optimizer, step, "period") for step in range(period, steps + 1, period)]
    return rounds if steps % period == 0 else [*rounds, (optimizer, steps, "train_end")]


def in_order(size: int = 256, batch_size: int = 8, dtype: torch.dtype = torch.float32) -> DataLoader:
    """This rank's loader, without shuffling (Lightning's own sampler shuffles): each rank's batches are known."""
    dataset = data(size, dtype)
    workers, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    sampler = DistributedSampler(dataset, workers, rank, shuffle=False)
    return DataLoader(dataset, batch_size=batch_size, sampler=sampler, drop_last=True)


def in_order_loaders(**options: Any) -> dict:
    """The loaders of a fit in order."""
    return {"train_dataloaders": in_order(**options)}


def share(
    rank: int, workers: int = 2, size: int = 256, batch_size: int = 8, dtype: torch.dtype = torch.float32
) -> list[tuple[Tensor, Tensor]]:
    """The batches that a rank gets from ``in_order`` in every epoch: each n-th sample, from its own rank on."""
    inputs, labels = (tensor[rank::workers] for tensor in data(size, dtype).tensors)
    return [*zip(inputs.split(batch_size), labels.split(batch_size), strict=True)]


class ByHand(NamedTuple):
    """What a run should result in."""

    weights: dict[str, Tensor]
    variances: list[float]


def by_hand(
    model: L.LightningModule,
    steps: Sequence[Sequence[int]],
    averaged_after: Collection[int],
    *,
    batches: Sequence[Sequence[Any]] | None = None,
    divisor: int | None = None,
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    clip: Callable[[nn.Module], Any] = lambda replica: None,
    skipped: Callable[[int, int], bool] = lambda rank, step: False,
    before_step: Callable[[nn.Module, torch.optim.Optimizer, int, int], Any] = lambda *_: None,
) -> ByHand:
    """Textbook local SGD, by a plain loop over replicas in one process, without Lightning or this package.

    Args:
        model: has a ``loss(batch)`` and returns an optimizer from ``configure_optimizers``.
        steps: for every optimizer step, the batches it is made of.
        averaged_after: the steps, counted from 1, that are followed by a round.
        batches: those of each worker; by default what two ranks get from ``in_order``.
        divisor: what the loss of a batch is divided by; by default the number of batches in the step.
        autocast: makes the context of the forward pass.
        clip: is given the replica once it has gradients.
        skipped: whether the step of a rank is not taken.
        before_step: is given replica, optimizer, rank and step, counted from 1.
    """
    batches = batches or [share(0), share(1)]
    replicas = [copy.deepcopy(model) for _ in batches]
    optimizers: list[torch.optim.Optimizer] = [replica.configure_optimizers() for replica in replicas]
    variances = []
    for number, step in enumerate(steps, start=1):
        for rank, (replica, optimizer) in enumerate(zip(replicas, optimizers, strict=True)):
            before_step(replica, optimizer, rank, number)

            def closure(rank: int = rank, replica: Any = replica, optimizer: Any = optimizer, step: Any = step) -> Any:
                optimizer.zero_grad()
                for index in step:
                    with autocast():
                        loss = replica.loss(batches[rank][index]) / (divisor or len(step))
                    loss.backward()
                clip(replica)
                return loss

            if skipped(rank, number):
                closure()
            else:
                optimizer.step(closure)
        if number in averaged_after:
            variances.append(_average(replicas, optimizers))
    return ByHand(weights(replicas[0]), variances)


def check_by_hand(outcomes: list[dict], expected: ByHand) -> None:
    """Weights and variances are those computed by hand; integers are not averaged, and stay each rank's own."""
    for outcome in outcomes:
        assert outcome["weights"].keys() == expected.weights.keys()
        for name, tensor in floats(expected.weights).items():
            torch.testing.assert_close(outcome["weights"][name], tensor, msg=lambda text, name=name: f"{name}: {text}")
        torch.testing.assert_close(outcome["variances"], expected.variances, rtol=1e-4, atol=1e-12)


@contextlib.contextmanager
def warnings_kept(texts: list[str]) -> Iterator[None]:
    """Append all warnings to ``texts``."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    texts += [str(warning.message) for warning in caught]


def replace_by_mean(same: Iterable[Tensor]) -> float:
    """Replace one tensor of all replicas by its mean; returns what it adds to the variance."""
    same = [*same]
    wide = torch.stack([tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in same])
    mean = wide.mean(dim=0)
    for tensor in same:
        tensor.data.copy_(mean)
    return (wide - mean).double().square().sum().item() / len(same)


def _average(replicas: list[nn.Module], optimizers: list[torch.optim.Optimizer]) -> float:
    trained = [[p for group in o.param_groups for p in group["params"] if p.requires_grad] for o in optimizers]
    statistics = [[buffer for buffer in replica.buffers() if buffer.is_floating_point()] for replica in replicas]
    variance = sum(replace_by_mean(same) for same in zip(*trained, strict=True))
    for same in zip(*statistics, strict=True):
        replace_by_mean(same)
    return variance
