"""Fabric in loops that are not as the guide has them: rolled back, seen by one rank alone, set up twice or in parts."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lightning_adpsgd import AdaptivePeriod
from lightning_adpsgd.fabric import ADPSGDStrategy, CommunicationMonitor
from tests.fabric.test_fabric import loss_of, momentum_sgd, new_fabric, new_loader, new_model, state_of
from tests.training import identical

pytestmark = pytest.mark.workers


def set_up(strategy: Any) -> tuple[Any, Any, Any]:
    fabric = new_fabric(strategy)
    model = new_model()
    return fabric, *fabric.setup(model, momentum_sgd(model))


def train(fabric: Any, model: Any, optimizer: Any, steps: int) -> None:
    for batch in new_loader(fabric, steps):
        optimizer.zero_grad()
        fabric.backward(loss_of(model, batch))
        optimizer.step()


def roll_back(options: dict[str, Any], folder: str) -> list[dict[str, torch.Tensor]]:
    fabric, model, optimizer = set_up(ADPSGDStrategy(4, **options))
    state = {"model": model, "optimizer": optimizer}
    train(fabric, model, optimizer, 3)
    fabric.save(Path(folder, "good.ckpt"), state)
    results = []
    for _ in range(2):
        train(fabric, model, optimizer, 6)
        fabric.strategy.average("train_end")
        results.append(state_of(model))
        train(fabric, model, optimizer, 5)  # the second load comes while fragments are in flight
        fabric.load(Path(folder, "good.ckpt"), state)
        assert fabric.strategy.local_sgd[0].steps == 3
    return results


@pytest.mark.parametrize(
    "options",
    [{}, {"stagger": True, "overlap": 1}, {"overlap": 3, "reduce_dtype": "int4"}],
    ids=str,
)
def test_a_run_can_be_rolled_back_at_any_step(pool, tmp_path, options):
    for first, again in pool.run_trainer(roll_back, options, str(tmp_path)):
        assert identical([first, again])


def one_rank_looks() -> list[Any]:
    fabric, model, optimizer = set_up(ADPSGDStrategy(2))
    train(fabric, model, optimizer, 4)
    if fabric.global_rank == 1:
        model(torch.randn(8, 8))  # moves BatchNorm's statistics
    asked = [fabric.strategy.average(), fabric.strategy.average()]
    fabric.barrier()
    return [asked, state_of(model)]


def test_a_forward_pass_of_one_rank_alone_does_not_hold_up_the_others(pool):
    (asked, seen), (_, also) = pool.run_trainer(one_rank_looks)
    assert asked == [True, False]
    assert identical([seen, also])


def among_some() -> float:
    fabric, model, optimizer = set_up(ADPSGDStrategy(3))
    train(fabric, model, optimizer, 2)
    groups = [dist.new_group([rank]) for rank in range(2)]
    reduced = 0.0
    if fabric.global_rank == 0:
        reduced = float(fabric.all_reduce(torch.ones(1), group=groups[0]))
        fabric.all_gather(torch.ones(1), group=groups[0])
    fabric.barrier()
    return reduced


def test_what_some_ranks_reduce_among_themselves_concerns_no_others(pool):
    assert pool.run_trainer(among_some) == [1.0, 0.0]


def set_up_in_two_fabrics() -> list[int]:
    model = new_model()
    optimizer = momentum_sgd(model)
    strategies = [ADPSGDStrategy(2), ADPSGDStrategy(4)]
    for strategy in strategies:
        fabric = new_fabric(strategy)
        train(fabric, *fabric.setup(model, optimizer), 4)
    return [strategy.local_sgd[0].steps for strategy in strategies]


def test_an_optimizer_is_counted_by_the_fabric_that_has_set_it_up_last(pool):
    assert pool.run_trainer(set_up_in_two_fabrics) == [[4, 4]] * 2


def set_up_twice() -> list[int]:
    fabric = new_fabric(ADPSGDStrategy(2))
    model = new_model()
    optimizer = momentum_sgd(model)
    wrapped, _ = fabric.setup(model, optimizer)
    train(fabric, wrapped, fabric.setup_optimizers(optimizer), 4)
    return [local_sgd.steps for local_sgd in fabric.strategy.local_sgd]


def test_an_optimizer_that_is_set_up_twice_is_one(pool):
    assert pool.run_trainer(set_up_twice) == [[4]] * 2


def length_after_loading(folder: str) -> tuple[Any, Any]:
    fabric, model, optimizer = set_up(ADPSGDStrategy(AdaptivePeriod(), total_steps=16))
    state = {"model": model, "optimizer": optimizer}
    train(fabric, model, optimizer, 6)
    fabric.save(Path(folder, "last.ckpt"), state)
    saved = fabric.strategy.local_sgd[0].state_dict()
    fabric, model, optimizer = set_up("adpsgd")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the length that it does not know yet
        fabric.load(Path(folder, "last.ckpt"), {"model": model, "optimizer": optimizer})
    fabric.strategy.set_total_steps(16)
    return saved, fabric.strategy.local_sgd[0].state_dict()


def test_the_length_can_be_told_after_a_checkpoint_was_loaded(pool, tmp_path):
    for saved, loaded in pool.run_trainer(length_after_loading, str(tmp_path)):
        assert saved == loaded


def warnings_of(monitored: bool, told: bool, with_optimizer: bool) -> tuple[list[str], int]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        monitor = CommunicationMonitor()
        fabric = new_fabric(ADPSGDStrategy(2), callbacks=[monitor] if monitored else [])
        model = new_model()
        optimizer = momentum_sgd(model)
        wrapped = fabric.setup_module(model)
        if with_optimizer:
            optimizer = fabric.setup_optimizers(optimizer)
        if told:
            fabric.call("on_after_setup", fabric=fabric, module=wrapped)
        train(fabric, wrapped, optimizer, 4)
    return [str(each.message) for each in caught], len(monitor.rounds)


def test_a_monitor_that_was_not_told_of_the_set_up_says_so_once(pool):
    told, rounds = pool.run_trainer(warnings_of, True, False, True)[0]
    assert len([each for each in told if 'fabric.call("on_after_setup"' in each]) == 1
    assert rounds == 0
    told, rounds = pool.run_trainer(warnings_of, True, True, True)[0]
    assert not any("CommunicationMonitor" in each for each in told)
    assert rounds == 2


def test_training_without_an_optimizer_that_was_set_up_is_warned_of_once(pool):
    told, _ = pool.run_trainer(warnings_of, False, False, False)[0]
    assert len([each for each in told if "no optimizer was set up" in each]) == 1
    assert not pool.run_trainer(warnings_of, False, False, True)[0][0]
