"""An optimizer's state shared by several real processes, against values computed by hand."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_adpsgd.averaging import Workers, forget, share_state

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD with momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "plain SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, amsgrad=True),
    "NAdam": lambda parameters: torch.optim.NAdam(parameters, lr=0.01),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.1),
    "Adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=0.01),
    "Rprop": lambda parameters: torch.optim.Rprop(parameters, lr=0.01),
    "LBFGS": lambda parameters: torch.optim.LBFGS(parameters, lr=0.1, max_iter=3),
}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        batch = torch.randn(5, 3, generator=generator)

        def closure(batch: Tensor = batch) -> Tensor:
            optimizer.zero_grad()
            loss = net(batch).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)


def state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    entries = copy.deepcopy(optimizer.state_dict()["state"])
    return {f"{place}.{name}": value for place, entry in entries.items() for name, value in entry.items()}


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, list):
        return len(one) == len(other) and all(equal(a, b) for a, b in zip(one, other, strict=True))
    return one == other


def share(name: str) -> dict:
    net = model()
    optimizer = OPTIMIZERS[name](net.parameters())
    train(net, optimizer, 2 + dist.get_rank(), seed=dist.get_rank())
    before = state(optimizer)
    pointers = {
        id(value) for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)
    }
    workers = Workers()
    share_state(optimizer, workers, 20)
    kept = {id(value) for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)}
    after = state(optimizer)
    train(net, optimizer, 1, seed=7)  # what has been put there is of use
    return {"before": before, "after": after, "in_place": pointers == kept, "sent": workers.payload_bytes}


@pytest.mark.workers
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_all_workers_have_the_same_state_afterwards(pool, name):
    outcomes = pool.run(share, name, workers=3)
    for outcome in outcomes:
        assert outcome["after"].keys() == outcomes[0]["after"].keys()
        assert all(equal(value, outcomes[0]["after"][key]) for key, value in outcome["after"].items())
        assert outcome["in_place"] or name == "LBFGS"
    assert bool(outcomes[0]["after"]) == (name != "plain SGD")


@pytest.mark.workers
@pytest.mark.parametrize("name", ["SGD with momentum", "Adam", "Adafactor"])
def test_floating_state_is_the_mean_and_step_counters_are_the_first_workers(pool, name):
    outcomes = pool.run(share, name, workers=3)
    for key, value in outcomes[0]["after"].items():
        befores = [outcome["before"][key] for outcome in outcomes]
        if key.endswith(".step"):
            assert equal(value, befores[0])
            assert not equal(value, befores[1])
        else:
            torch.testing.assert_close(value, torch.stack(befores).mean(dim=0))


@pytest.mark.workers
def test_a_history_that_cannot_be_averaged_is_the_first_workers_whole(pool):
    outcomes = pool.run(share, "LBFGS", workers=3)
    assert outcomes[0]["after"].keys() == outcomes[0]["before"].keys()
    assert all(equal(value, outcomes[0]["before"][key]) for key, value in outcomes[0]["after"].items())


def share_with_gaps() -> dict:
    net = model()
    rank = dist.get_rank()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    if rank != 1:  # the second worker's first layer never has a gradient
        train(net, optimizer, 3, seed=rank)
    else:
        net[0].requires_grad_(False)
        train(net, optimizer, 3, seed=rank)
        net[0].requires_grad_(True)
    before = state(optimizer)
    share_state(optimizer, Workers(), 2**20)
    return {"before": before, "after": state(optimizer)}


@pytest.mark.workers
def test_a_worker_without_state_for_a_parameter_takes_the_mean_of_those_that_have_some(pool):
    outcomes = pool.run(share_with_gaps, workers=3)
    assert "0.exp_avg" not in outcomes[1]["before"]
    for outcome in outcomes:
        for key, value in outcome["after"].items():
            assert equal(value, outcomes[0]["after"][key])
            befores = [o["before"][key] for o in outcomes if key in o["before"]]
            if not key.endswith(".step"):
                torch.testing.assert_close(value, torch.stack(befores).mean(dim=0))
        assert outcome["after"]["0.step"] == 3


def share_laid_out_differently() -> dict:
    parameter = nn.Parameter(torch.arange(6.0).reshape(2, 3))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    momentum = torch.arange(6.0).reshape(2, 3) * (1 + dist.get_rank())
    if dist.get_rank() == 1:
        momentum = momentum.t().contiguous().t()
    optimizer.state[parameter]["momentum_buffer"] = momentum
    share_state(optimizer, Workers(), 2**20)
    return state(optimizer)


@pytest.mark.workers
def test_elements_meet_their_like_even_if_one_worker_has_them_in_another_order_in_memory(pool):
    for outcome in pool.run(share_laid_out_differently, workers=2):
        assert torch.equal(outcome["0.momentum_buffer"], torch.arange(6.0).reshape(2, 3) * 1.5)


def share_what_is_the_same() -> int:
    net = model()
    optimizer = OPTIMIZERS["Adam"](net.parameters())
    train(net, optimizer, 2, seed=dist.get_rank())
    workers = Workers()
    share_state(optimizer, workers, 2**20, {id(v) for entry in optimizer.state.values() for v in entry.values()})
    return workers.payload_bytes


@pytest.mark.workers
def test_what_is_known_to_be_the_same_is_not_sent_again(pool):
    assert pool.run(share_what_is_the_same) == [2 * 3 * 8] * 2


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "plain SGD"])
def test_an_optimizer_that_has_forgotten_does_what_a_new_one_does(name):
    net = model()
    optimizer = OPTIMIZERS[name](net.parameters())
    made_at_once = set(optimizer.state)
    train(net, optimizer, 3, seed=0)
    forget(optimizer, made_at_once)
    other = copy.deepcopy(net)
    train(net, optimizer, 2, seed=1)
    train(other, OPTIMIZERS[name](other.parameters()), 2, seed=1)
    for mine, theirs in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
