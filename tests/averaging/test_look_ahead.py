"""How far momentum carries parameters, compared with torch's optimizers themselves."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_adpsgd.averaging.look_ahead import LookAhead
from lightning_adpsgd.averaging.momentum import MomentumReader

DELAYS = (1, 2, 4)
STEPS = (1, 2, 3, 8, 30)

MOMENTUM: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("SGD", {"lr": 0.1, "momentum": 0.9}),
    "SGD, dampened": ("SGD", {"lr": 0.1, "momentum": 0.8, "dampening": 0.3}),
    "RMSprop": ("RMSprop", {"lr": 0.1, "momentum": 0.7}),
    "Adam": ("Adam", {"lr": 0.01}),
    "Adam, whose rate is a tensor": ("Adam", {"lr": torch.tensor(0.01, dtype=torch.float64)}),
    "AdamW": ("AdamW", {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.0}),
    "Adamax": ("Adamax", {"lr": 0.01}),
    "RAdam": ("RAdam", {"lr": 0.01, "betas": (0.9, 0.99)}),
}
WITH_THE_GRADIENT: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD with Nesterov's momentum": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "NAdam": ("NAdam", {"lr": 0.01}),
    "NAdam with much momentum": ("NAdam", {"lr": 0.01, "momentum_decay": 2.0}),
}
NO_MOMENTUM: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("SGD", {"lr": 0.1}),
    "RMSprop": ("RMSprop", {"lr": 0.1}),
    "Adagrad": ("Adagrad", {"lr": 0.1}),
    "Adadelta": ("Adadelta", {}),
    "ASGD": ("ASGD", {}),
    "Rprop": ("Rprop", {}),
    "Adafactor": ("Adafactor", {}),
    "Adam without": ("Adam", {"betas": (0.0, 0.9)}),
}


def signs(generator: torch.Generator, count: int) -> Tensor:
    """Gradients whose squares are all the same, so that second moments stay what they are."""
    return torch.randint(0, 2, (count,), generator=generator, dtype=torch.float64) * 2 - 1


def trained(kind: tuple[str, dict[str, Any]], steps: int, count: int) -> tuple[Optimizer, nn.Parameter, Tensor]:
    """An optimizer after some steps, its parameter, and the parameter's value before the latest step."""
    parameter = nn.Parameter(torch.zeros(count, dtype=torch.float64))
    optimizer = getattr(torch.optim, kind[0])([parameter], **kind[1])
    generator = torch.Generator().manual_seed(steps)
    for _ in range(steps):
        before = parameter.detach().clone()
        parameter.grad = signs(generator, count)
        optimizer.step()
    return optimizer, parameter, before


def go_on(optimizer: Optimizer, parameter: nn.Parameter, steps: int, like_before: bool) -> Tensor:
    """Take further steps: with gradients like before, or with gradients of 0 and second moments held constant."""
    generator = torch.Generator().manual_seed(100)
    state = optimizer.state[parameter]
    for _ in range(steps):
        parameter.grad = signs(generator, len(parameter)) if like_before else torch.zeros_like(parameter)
        if not like_before:
            hold_second_moments(optimizer, state)
        optimizer.step()
    return parameter.detach().clone()


def hold_second_moments(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Set second moments so that after a step with a gradient of 0 they are those of squares that are all 1."""
    group = optimizer.param_groups[0]
    if "exp_avg_sq" in state:
        beta = group["betas"][1]
        state["exp_avg_sq"].fill_((1 - beta ** (int(state["step"]) + 1)) / beta)
    if "exp_inf" in state:
        state["exp_inf"].fill_(1 / group["betas"][1])


def factor(optimizer: Optimizer, delay: int, steps: int) -> float:
    [found] = LookAhead(optimizer, MomentumReader(optimizer, lambda: steps)).factors(delay)
    return found


@pytest.mark.parametrize("name", MOMENTUM)
def test_the_factor_is_what_the_optimizer_does_with_gradients_of_zero(name):
    for steps, delay in itertools.product(STEPS, DELAYS):
        if name == "RAdam" and steps <= 5 < steps + delay:
            continue  # its steps change when rectification begins: see below
        optimizer, parameter, before = trained(MOMENTUM[name], steps, 20)
        ahead = factor(optimizer, delay, steps)
        after = parameter.detach().clone()
        moved = go_on(optimizer, parameter, delay, like_before=False) - after
        torch.testing.assert_close(moved, ahead * (after - before), rtol=1e-6, atol=1e-9)


def test_radams_rectified_steps_are_not_predicted_before_they_begin():
    optimizer, _, _ = trained(MOMENTUM["RAdam"], 4, 3)  # rectified from the sixth step on
    one, two = (factor(optimizer, delay, 4) for delay in (1, 2))
    assert one > 0
    assert one == two


@pytest.mark.parametrize("name", WITH_THE_GRADIENT)
def test_at_the_first_step_the_factor_is_exact_even_if_steps_contain_the_gradient(name):
    for delay in DELAYS:
        optimizer, parameter, before = trained(WITH_THE_GRADIENT[name], 1, 20)
        ahead = factor(optimizer, delay, 1)
        after = parameter.detach().clone()
        moved = go_on(optimizer, parameter, delay, like_before=False) - after
        torch.testing.assert_close(moved, ahead * (after - before), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", [*MOMENTUM, *WITH_THE_GRADIENT])
def test_with_noisy_gradients_the_factor_is_the_best_multiple_of_the_latest_step(name):
    for steps, delay in ((1, 2), (3, 2), (20, 4)):
        optimizer, parameter, before = trained({**MOMENTUM, **WITH_THE_GRADIENT}[name], steps, 20_000)
        ahead = factor(optimizer, delay, steps)
        after = parameter.detach().clone()
        latest = after - before
        moved = go_on(optimizer, parameter, delay, like_before=True) - after
        assert ahead == pytest.approx((moved @ latest / (latest @ latest)).item(), abs=0.05)
        assert ahead > 0.05


@pytest.mark.parametrize("name", NO_MOMENTUM)
def test_the_factor_of_optimizers_without_momentum_is_zero(name):
    optimizer, _, _ = trained(NO_MOMENTUM[name], 3, 4)
    assert factor(optimizer, 2, 3) == 0.0


class Lion(Optimizer):
    """Its first beta mixes the gradient in for one step; momentum goes by the second one."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1, "betas": (0.9, 0.99), "momentum": 0.9})


class Own(torch.optim.AdamW):
    """A user's own class, derived from a known one."""


def test_the_factor_of_an_unknown_optimizer_is_zero_and_a_derived_one_has_that_of_its_base():
    parameters = [nn.Parameter(torch.ones(2))]
    assert factor(Lion(parameters), 2, 50) == 0.0
    assert factor(Own(parameters), 2, 50) == factor(torch.optim.AdamW(parameters), 2, 50) > 1.5


def test_each_group_has_its_own_factor():
    one, two = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([{"params": [one], "momentum": 0.5}, {"params": [two]}], lr=0.1)
    assert LookAhead(optimizer, MomentumReader(optimizer, lambda: 9)).factors(2) == [0.75, 0.0]


def test_settings_that_are_tensors_are_read_again_when_they_have_changed():
    beta = torch.tensor(0.5)
    optimizer = torch.optim.Adam([nn.Parameter(torch.ones(2))], lr=0.1, betas=(beta, torch.tensor(0.9)), foreach=False)
    ahead = LookAhead(optimizer, MomentumReader(optimizer, lambda: 1000))
    assert ahead.factors(1) == [pytest.approx(0.5)]
    beta.fill_(0.25)
    assert ahead.factors(1) == [pytest.approx(0.25)]
