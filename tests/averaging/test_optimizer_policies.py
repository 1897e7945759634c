"""Every optimizer of torch.optim, with every policy for its state, on several real processes."""

import warnings
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_adpsgd import LocalSGD
from lightning_adpsgd.averaging.momentum import known_names

POLICIES = ("local", "average", "reset")

# Settings that turn on every kind of moment.
SETTINGS: dict[str, dict[str, Any]] = {
    "ASGD": {"lr": 0.1, "t0": 20},
    "Adadelta": {"lr": 1.0, "rho": 0.5, "eps": 1e-3},
    "Adafactor": {"lr": 0.1},
    "Adagrad": {"lr": 0.1, "initial_accumulator_value": 0.1},
    "Adam": {"lr": 0.03, "amsgrad": True},
    "AdamW": {"lr": 0.03},
    "Adamax": {"lr": 0.03},
    "LBFGS": {"lr": 0.3, "max_iter": 3},
    "Muon": {"lr": 0.03, "weight_decay": 0.0},
    "NAdam": {"lr": 0.03},
    "RAdam": {"lr": 0.1, "betas": (0.8, 0.9)},
    "RMSprop": {"lr": 0.003, "alpha": 0.9, "momentum": 0.5, "centered": True},
    "Rprop": {"lr": 0.01},
    "SGD": {"lr": 0.05, "momentum": 0.8, "dampening": 0.2},
    "SparseAdam": {"lr": 0.03},
}
NAMES = [
    name
    for name in dir(torch.optim)
    if isinstance(getattr(torch.optim, name), type) and issubclass(getattr(torch.optim, name), Optimizer)
    if name != "Optimizer"
]


class Task(NamedTuple):
    """A small regression with two layers; without biases for Muon, which takes only matrices."""

    name: str
    model: nn.Module
    optimizer: Optimizer

    @classmethod
    def of(cls, name: str, settings: dict[str, Any] | None = None) -> "Task":
        torch.manual_seed(0)
        bias = name != "Muon"
        model = nn.Sequential(nn.Linear(6, 8, bias=bias), nn.Tanh(), nn.Linear(8, 3, bias=bias))
        return cls(name, model, getattr(torch.optim, name)(model.parameters(), **(settings or SETTINGS[name])))

    def loss(self, seed: int, size: int = 32) -> Tensor:
        inputs = torch.randn(size, 6, generator=torch.Generator().manual_seed(seed))
        return (self.model(inputs) - torch.sin(inputs[:, :3]) - inputs[:, 3:]).square().mean()

    def step(self, seed: int) -> None:
        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = self.loss(seed)
            loss.backward()
            if self.name == "SparseAdam":
                for parameter in self.model.parameters():
                    parameter.grad = parameter.grad.to_sparse()
            return loss

        self.optimizer.step(closure)


def learn(name: str, policy: str) -> dict:
    """The share of the loss that is left after training, and again some steps after a worker has diverged."""
    task, rank = Task.of(name), dist.get_rank()
    local_sgd = LocalSGD(task.optimizer, 4, module=task.model, optimizer_state=policy, on_divergence="drop")
    losses, dropped = [task.loss(-1, 1000).item()], 0
    for step in range(1, 61):
        if step == 42 and rank == 0:
            task.model[2].weight.data[0, 0] = float("nan")  # the next step spreads it to gradients and state
        # L-BFGS is not made for noise: there a worker's data are always the same.
        task.step(rank if name == "LBFGS" else 1000 * step + rank)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            round_ = local_sgd.step()
        dropped += 0 if round_ is None else round_.dropped
        if step in (40, 60):
            losses.append(task.loss(-1, 1000).item())
    return {"learned": losses[1] / losses[0], "recovered": losses[2] / losses[0], "dropped": dropped}


def learn_in_every_way() -> dict[tuple[str, str], dict]:
    ways = [(name, policy) for name in NAMES for policy in POLICIES]
    ways += [(name, "estimate") for name in known_names(lambda kind: kind.first_moment)]
    return {way: learn(*way) for way in ways}


def test_every_optimizer_of_torch_is_tried():
    assert set(NAMES) <= set(SETTINGS)


@pytest.mark.workers
def test_every_optimizer_of_torch_learns_under_every_policy_and_recovers_when_a_worker_is_dropped(pool):
    for outcomes in pool.run(learn_in_every_way):
        assert {what: found for what, found in outcomes.items() if not found["learned"] < 0.3} == {}
        assert {what: found for what, found in outcomes.items() if not found["recovered"] < 0.3} == {}
        assert {what for what, found in outcomes.items() if found["dropped"] != 1} == set()


NO_MOMENTS = {"ASGD", "LBFGS", "Rprop"}
# Other variants of an optimizer, tested in addition
MORE: dict[str, dict[str, Any]] = {
    "Adam": {"lr": 0.03, "fused": True},
    "SGD": {"lr": 0.05, "momentum": 0.8},
    "Adagrad": {"lr": 0.1},
    "RMSprop": {"lr": 0.003},
}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NO_MOMENTS])
def test_after_a_reset_an_optimizer_does_what_a_new_one_does(name):
    for settings in (SETTINGS[name], MORE.get(name, SETTINGS[name])):
        task, other = Task.of(name, settings), Task.of(name, settings)
        local_sgd = LocalSGD(task.optimizer, 5, optimizer_state="reset")
        for step in range(5):
            task.step(step)
            local_sgd.step()
        other.model.load_state_dict(task.model.state_dict())
        for step in range(3):
            task.step(100 + step)
            other.step(100 + step)
        for mine, its in zip(task.model.parameters(), other.model.parameters(), strict=True):
            assert torch.equal(mine, its)


@pytest.mark.parametrize("name", sorted(NO_MOMENTS))
def test_a_reset_changes_nothing_but_moments(name):
    task, other = Task.of(name), Task.of(name)
    local_sgd = LocalSGD(task.optimizer, 3, optimizer_state="reset")
    for step in range(12):
        task.step(0)
        other.step(0)
        if step % 3 == 0:
            local_sgd.average("validation")
        local_sgd.step()
    for mine, its in zip(task.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(mine, its)


class Lookahead(Optimizer):
    """A third-party optimizer, with copies of the weights in its state."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter].setdefault("slow_weights", parameter.detach().clone())


class Mine(torch.optim.AdamW):
    """Derived from a known optimizer."""


def test_a_reset_of_state_that_is_not_known_is_refused_before_training():
    parameters = [nn.Parameter(torch.ones(2))]
    expected = r"optimizer_state=\"reset\" with tests[.a-z_]+[.]Lookahead: expected an optimizer of torch.optim"
    with pytest.raises(ValueError, match=expected) as raised:
        LocalSGD(Lookahead(parameters), 3, optimizer_state="reset")
    assert 'Use optimizer_state="local" or "average".' in str(raised.value)
    for policy in ("local", "average"):
        LocalSGD(Lookahead(parameters), 3, optimizer_state=policy)
    LocalSGD(Mine(parameters), 3, optimizer_state="reset")
