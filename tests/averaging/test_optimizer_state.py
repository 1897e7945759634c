"""Optimizer state shared between several real processes, compared with values computed by hand."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_adpsgd import LocalSGD
from lightning_adpsgd.averaging.optimizer_state import forget, share_state, state_at_start
from lightning_adpsgd.workers.group import WorkerGroup

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD with momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "plain SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, amsgrad=True),
    "NAdam": lambda parameters: torch.optim.NAdam(parameters, lr=0.01),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.1, initial_accumulator_value=0.1),
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
    if isinstance(one, list | tuple):
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
    workers = WorkerGroup()
    share_state(optimizer, workers, 20)
    kept = {id(value) for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)}
    after = state(optimizer)
    train(net, optimizer, 1, seed=7)  # the optimizer can use the shared state
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
def test_a_history_that_cannot_be_averaged_comes_whole_from_the_first_worker(pool):
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
    share_state(optimizer, WorkerGroup(), 2**20)
    return {"before": before, "after": state(optimizer)}


@pytest.mark.workers
def test_a_worker_without_state_for_a_parameter_takes_the_mean_of_the_others(pool):
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
    share_state(optimizer, WorkerGroup(), 2**20)
    return state(optimizer)


@pytest.mark.workers
def test_state_in_another_memory_order_on_one_worker_is_averaged_element_by_element(pool):
    for outcome in pool.run(share_laid_out_differently, workers=2):
        assert torch.equal(outcome["0.momentum_buffer"], torch.arange(6.0).reshape(2, 3) * 1.5)


def share_what_is_the_same() -> int:
    net = model()
    optimizer = OPTIMIZERS["Adam"](net.parameters())
    train(net, optimizer, 2, seed=dist.get_rank())
    workers = WorkerGroup()
    share_state(optimizer, workers, 2**20, {id(v) for entry in optimizer.state.values() for v in entry.values()})
    return workers.payload_bytes


@pytest.mark.workers
def test_state_that_is_known_to_be_the_same_is_not_sent_again(pool):
    assert pool.run(share_what_is_the_same) == [2 * 3 * 8] * 2


class Quantized(torch.optim.Optimizer):
    """Keeps the momentum of matrices in 8 bits, with a scale per row and a residual; that of vectors in full."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> None:
        with torch.enable_grad():
            closure()
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            state["step"] = state.get("step", torch.tensor(0)) + 1
            if parameter.dim() < 2:
                state["momentum"] = 0.9 * state.get("momentum", 0.0) + parameter.grad
                parameter -= 0.1 * state["momentum"]
                continue
            momentum = 0.9 * self.momentum_of(parameter) + parameter.grad if "codes" in state else parameter.grad
            state["scale"] = momentum.abs().amax(dim=1, keepdim=True) / 127
            state["codes"] = (momentum / state["scale"]).round().to(torch.int8)
            state["cut off"] = momentum - state["codes"] * state["scale"]
            parameter -= 0.1 * momentum

    def momentum_of(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        return state["codes"] * state["scale"] + state["cut off"]


class Columns(nn.Module):
    """The second layer's weight is one column, so its scales have its shape. The first worker does not train it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 1), nn.Linear(1, 2)

    def forward(self, batch: Tensor) -> Tensor:
        one = self.one(batch)
        return one if dist.get_rank() == 0 else self.two(one)


def share_quantized(policy: str, trigger: str) -> dict:
    torch.manual_seed(0)
    net = Columns()
    optimizer = Quantized(net.parameters())
    local_sgd = LocalSGD(optimizer, 100, module=net, optimizer_state=policy)
    for step in range(3):
        train(net, optimizer, 1, seed=10 * step + dist.get_rank())
        local_sgd.step()
    before = state(optimizer)
    local_sgd.average(trigger)
    after = state(optimizer)
    train(net, optimizer, 1, seed=7)
    return {"before": before, "after": after}


@pytest.mark.workers
@pytest.mark.parametrize("policy", ["local", "average"])
def test_quantized_state_comes_from_one_worker_whole_at_a_checkpoint(pool, policy):
    outcomes = pool.run(share_quantized, policy, "checkpoint", workers=3)
    befores = [outcome["before"] for outcome in outcomes]
    for outcome in outcomes:
        after = outcome["after"]
        assert after.keys() == outcomes[0]["after"].keys()
        for name in ("step", "scale", "codes", "cut off"):
            assert equal(after[f"0.{name}"], befores[0][f"0.{name}"])
            assert equal(after[f"2.{name}"], befores[1][f"2.{name}"])
        for name, owners in (("1.momentum", befores), ("3.momentum", befores[1:])):
            torch.testing.assert_close(after[name], torch.stack([before[name] for before in owners]).mean(dim=0))


@pytest.mark.workers
def test_quantized_state_stays_each_workers_own_where_moments_are_averaged(pool):
    outcomes = pool.run(share_quantized, "average", "train_end", workers=3)
    befores = [outcome["before"] for outcome in outcomes]
    for outcome in outcomes:
        for name in ("step", "scale", "codes", "cut off"):
            assert equal(outcome["after"][f"0.{name}"], outcome["before"][f"0.{name}"])
            # A worker that has none takes it from the first that has.
            assert equal(outcome["after"][f"2.{name}"], outcome["before"].get(f"2.{name}", befores[1][f"2.{name}"]))
        mean = torch.stack([before["1.momentum"] for before in befores]).mean(dim=0)
        torch.testing.assert_close(outcome["after"]["1.momentum"], mean)


class Bare(torch.optim.Optimizer):
    """A parameter's state is a bare tensor, its momentum; a count of steps is under a key that is no parameter."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.state["steps"] = torch.zeros(2)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> None:
        with torch.enable_grad():
            closure()
        self.state["steps"] += 1
        for parameter in self.param_groups[0]["params"]:
            velocity = self.state.get(parameter)
            self.state[parameter] = parameter.grad.clone() if velocity is None else 0.9 * velocity + parameter.grad
            parameter -= 0.1 * self.state[parameter]


def share_bare(policy: str, trigger: str) -> dict:
    net = model()
    optimizer = Bare(net.parameters())
    local_sgd = LocalSGD(optimizer, 100, module=net, optimizer_state=policy, on_divergence="drop")
    train(net, optimizer, 1 + dist.get_rank(), seed=dist.get_rank())
    local_sgd.step()
    before = copy.deepcopy(optimizer.state_dict()["state"])
    if trigger == "drop":
        net[0].weight.data.fill_(float("nan") if dist.get_rank() == 1 else 1.0)
    local_sgd.average("train_end" if trigger == "drop" else trigger)
    return {"before": before, "after": copy.deepcopy(optimizer.state_dict()["state"])}


@pytest.mark.workers
def test_state_may_be_a_tensor_or_of_no_parameter(pool):
    for policy, trigger in (("local", "checkpoint"), ("average", "checkpoint"), ("average", "train_end")):
        outcomes = pool.run(share_bare, policy, trigger)
        for rank, outcome in enumerate(outcomes):
            mean = (outcomes[0]["before"][2] + outcomes[1]["before"][2]) / 2
            torch.testing.assert_close(outcome["after"][2], mean)
            steps = 1 if trigger == "checkpoint" else 1 + rank
            assert torch.equal(outcome["after"]["steps"], torch.full((2,), float(steps)))
    first, second = pool.run(share_bare, "local", "drop")
    assert equal([*first["after"].values()], [*first["before"].values()])
    assert equal([*second["after"].items()], [("steps", torch.zeros(2))])


def share_where_one_has_lost_its_own(name: str, trigger: str) -> dict:
    net = model()
    optimizer = OPTIMIZERS[name](net.parameters())
    local_sgd = LocalSGD(optimizer, 100, module=net, optimizer_state="average", on_divergence="drop")
    net[1].bias.requires_grad_(dist.get_rank() == 0)  # the others have no state for it
    train(net, optimizer, 3 + dist.get_rank(), seed=dist.get_rank())
    net[1].bias.requires_grad_(True)
    local_sgd.step()
    before = state(optimizer)
    if dist.get_rank() == 0:
        net[0].weight.data.fill_(float("nan"))
        for entry in optimizer.state.values():
            for value in entry.values():
                value.fill_(float("nan"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        local_sgd.average(trigger)
    return {"before": before, "after": state(optimizer)}


@pytest.mark.workers
def test_a_dropped_worker_takes_all_state_from_the_others_if_state_is_averaged(pool):
    for name, trigger in (("Adafactor", "train_end"), ("Adagrad", "train_end"), ("Adagrad", "checkpoint")):
        lost, *others = pool.run(share_where_one_has_lost_its_own, name, trigger, workers=3)
        assert ("3.step" in lost["after"]) == (name == "Adagrad")  # which makes its state in the constructor
        for key, value in lost["after"].items():
            if key.startswith("3."):
                assert value.isfinite().all()
                continue
            mean = torch.stack([other["before"][key] for other in others]).mean(dim=0)
            if key.endswith("step"):
                assert value == 4  # of the first worker that has any
            elif name == "Adagrad" or key.endswith("variance"):
                torch.testing.assert_close(value, mean)
            else:
                assert equal(value, others[0]["after"][key])  # of another shape than its parameter: not averaged


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "plain SGD"])
def test_after_forget_an_optimizer_does_what_a_new_one_does(name, late):
    net = model()
    optimizer = OPTIMIZERS[name](net.parameters())
    if late:
        train(net, optimizer, 3, seed=2)
    at_start = state_at_start(optimizer)
    train(net, optimizer, 3, seed=0)
    forget(optimizer, at_start)
    other = copy.deepcopy(net)
    train(net, optimizer, 2, seed=1)
    train(other, OPTIMIZERS[name](other.parameters()), 2, seed=1)
    for mine, theirs in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_forget_restores_the_initial_state_of_a_third_party_optimizer():
    net = model()
    optimizer = Bare(net.parameters())
    at_start = state_at_start(optimizer)
    train(net, optimizer, 3, seed=0)
    for _ in range(2):
        forget(optimizer, at_start)
        assert equal([*optimizer.state.items()], [("steps", torch.zeros(2))])
        train(net, optimizer, 1, seed=1)
