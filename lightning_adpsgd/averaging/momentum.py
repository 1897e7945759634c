"""Known optimizers: which of their state entries are moments, and how momentum moves the parameters."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

Group = Mapping[str, Any]
"""A parameter group, with its settings."""
State = Mapping[str, Any]
"""An optimizer's state of one parameter."""
NOISE = "exp_avg_sq_noise"
"""The entry of a parameter's state that holds what rounds have subtracted from its second moment."""


class Momentum(NamedTuple):
    """A first moment m_t = β m_{t−1} + κ g_t. Step t moves a parameter along −(a_t g_t + b_t m_t)."""

    decay: float
    """β."""
    gain: float
    """κ."""
    kept: Callable[[int], float]
    """b_t; NaN for steps whose size is unrelated to that of the latest step."""
    newest: Callable[[int], float] = lambda steps: 0.0
    """a_t."""
    coupled_decay: float = 0.0
    """λ of weight decay that is part of the gradient, if a step is scaled by the learning rate alone."""
    decoupled_decay: float = 0.0
    """λ of weight decay that multiplies parameters by 1 − γλ."""


class Known(NamedTuple):
    """What is known about an optimizer."""

    moments: Callable[[Group], Mapping[str, float | None]]
    """Entries of a parameter's state that are moments or count their steps, with their values before the first step;
    None: the entry does not exist then."""
    momentum: Callable[[Group, int], Momentum | None] = lambda group, steps: None
    """The first moment of a group after a number of steps, if every step repeats a part of it."""
    made_at_once: bool = False
    """Whether the constructor creates the state, rather than a parameter's first step."""
    first_moment: str = ""
    """The entry that holds the first moment."""
    second_moment: str = ""
    """The entry that holds the mean of squared gradients, whose bias is corrected with β₂."""
    divisors: Callable[[Group, list[State]], list[Tensor]] | None = None
    """What each parameter's steps are divided by, element by element; None: nothing."""


def known(optimizer: Optimizer) -> Known | None:
    """What is known about an optimizer of torch.optim or of a derived class; None for any other."""
    for class_ in type(optimizer).__mro__:
        if class_.__module__.split(".")[:2] == ["torch", "optim"] and class_.__name__ in _KNOWN:
            return _KNOWN[class_.__name__]
    return None


def known_names(has: Callable[[Known], object]) -> list[str]:
    """The names of the known optimizers for which ``has`` is true."""
    return [name for name, kind in _KNOWN.items() if has(kind)]


def check_known_moments(optimizer: Optimizer) -> None:
    """Raise ``ValueError`` if it is not known which of an optimizer's state entries are moments."""
    if known(optimizer) is None:
        class_ = type(optimizer)
        raise ValueError(
            f'optimizer_state="reset" with {class_.__module__}.{class_.__qualname__}: expected an optimizer of'
            " torch.optim or of a derived class. For others it is not known which entries of the state are moments, and"
            ' resetting anything else could ruin training. Use optimizer_state="local" or "average".'
        )


class MomentumReader:
    """Reads an optimizer's current momentum.

    Args:
        optimizer: the optimizer.
        steps: returns the number of steps over which its moments have been accumulated. Called only if the optimizer
            does not count them itself, or counts on a GPU, which the host would have to wait for.
    """

    def __init__(self, optimizer: Optimizer, steps: Callable[[], int]) -> None:
        self._optimizer = optimizer
        self._kind = known(optimizer)
        self._steps = steps
        self._read: dict[int, tuple[Tensor, int, float]] = {}  # of settings that are tensors

    def of(self, group: Group, ago: int = 0) -> tuple[Momentum | None, int]:
        """A parameter group's momentum ``ago`` steps ago, if any is known, and the number of steps it had seen."""
        steps = max(1, self._steps_of(group) - ago)
        momentum = None if self._kind is None else self._kind.momentum(self.plain(group), steps)
        return momentum, steps

    def _steps_of(self, group: Group) -> int:
        for parameter in group["params"]:
            state = self._optimizer.state.get(parameter)
            step = state.get("step") if isinstance(state, dict) else None
            if isinstance(step, Tensor) and step.device.type != "cpu":
                return self._steps()
            if step is not None:
                return int(step)
        return self._steps()

    def plain(self, group: Group) -> Group:
        """A group's settings as numbers. Those that are tensors are read again only if they have changed."""
        return {
            **group,
            **{name: self._number(group[name]) for name in ("momentum", "momentum_decay") if name in group},
            "betas": tuple(map(self._number, group.get("betas", ()))),
        }

    def _number(self, value: Any) -> float:
        if not isinstance(value, Tensor) or value.is_inference():
            return float(value)
        tensor, version, number = self._read.get(id(value), (None, -1, 0.0))
        if tensor is not value or version != value._version:
            number = float(value)
            self._read[id(value)] = (value, value._version, number)
        return number


def _velocity(group: Group, steps: int) -> Momentum:
    momentum, gain = group["momentum"], 1.0 - group.get("dampening", 0.0)
    if not group.get("nesterov"):
        return Momentum(momentum, gain, lambda t: 1.0)
    return Momentum(momentum, 1.0, lambda t: momentum, newest=lambda t: 1.0)


def _velocity_of_sgd(group: Group, steps: int) -> Momentum:
    return _velocity(group, steps)._replace(coupled_decay=group["weight_decay"])


def _adam(group: Group, steps: int) -> Momentum:
    beta = group["betas"][0]
    return Momentum(beta, 1.0 - beta, lambda t: 1.0 / (1.0 - beta**t), decoupled_decay=_decoupled(group))


def _decoupled(group: Group) -> float:
    return group["weight_decay"] if group.get("decoupled_weight_decay") else 0.0


def _radam(group: Group, steps: int) -> Momentum:
    beta, beta2 = group["betas"]
    limit = 2.0 / (1.0 - beta2) - 1.0

    def length(t: int) -> float:
        return float(limit - 2.0 * t * beta2**t / (1.0 - beta2**t))

    def kept(t: int) -> float:
        rho = length(t)
        if (rho > 5.0) != (length(steps) > 5.0):
            return math.nan
        rectification = (rho - 4.0) * (rho - 2.0) * limit / ((limit - 4.0) * (limit - 2.0) * rho) if rho > 5.0 else 1.0
        return float(math.sqrt(rectification) / (1.0 - beta**t))

    return Momentum(beta, 1.0 - beta, kept)


def _nadam(group: Group, steps: int) -> Momentum:
    beta, decay = group["betas"][0], group["momentum_decay"]

    def mu(t: int) -> float:
        return float(beta * (1.0 - 0.5 * 0.96 ** (t * decay)))

    def product(t: int) -> float:
        """μ_1 … μ_t."""
        found = 1.0
        for step in range(1, t + 1):
            found *= mu(step)
            if found < 1e-9:
                return 0.0
        return found

    newest = lambda t: (1.0 - mu(t)) / (1.0 - product(t))  # noqa: E731
    kept = lambda t: mu(t + 1) / (1.0 - product(t + 1))  # noqa: E731
    return Momentum(beta, 1.0 - beta, kept, newest, decoupled_decay=_decoupled(group))


def _roots(group: Group, states: list[State]) -> list[Tensor]:
    """√(second moment / its bias correction) + ε, of Adam and those like it."""
    name = "max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"
    roots = torch._foreach_sqrt([state[name] for state in states])
    beta, steps = group["betas"][1], [state["step"] for state in states]
    if all(isinstance(step, Tensor) and step.device.type != "cpu" for step in steps):
        torch._foreach_div_(roots, [(1.0 - beta**step).sqrt() for step in steps])  # without a device sync
    else:
        torch._foreach_div_(roots, [math.sqrt(1.0 - beta ** float(step)) for step in steps])
    torch._foreach_add_(roots, group["eps"])
    return [*roots]


def _infinity_norms(group: Group, states: list[State]) -> list[Tensor]:
    return [state["exp_inf"] for state in states]


def _start(**values: float) -> Callable[[Group], Mapping[str, float | None]]:
    return lambda group: values


def _start_of_sgd(group: Group) -> Mapping[str, float | None]:
    # The first step takes the whole gradient, whatever the dampening, so it differs from a step from velocity 0.
    return {"momentum_buffer": None if group["dampening"] else 0.0}


_ADAM = Known(
    _start(exp_avg=0.0, exp_avg_sq=0.0, max_exp_avg_sq=0.0, step=0.0, **{NOISE: 0.0}),
    _adam,
    first_moment="exp_avg",
    divisors=_roots,
    second_moment="exp_avg_sq",
)

# Step counters are listed if a bias correction uses them, not if only a decay of the learning rate does.
_KNOWN = {
    "ASGD": Known(_start()),  # a mean of parameters, and the decayed learning rate
    "Adadelta": Known(_start(square_avg=0.0, acc_delta=0.0)),
    "Adafactor": Known(_start(row_var=0.0, col_var=0.0, variance=0.0, step=0.0)),
    "Adagrad": Known(lambda group: {"sum": group["initial_accumulator_value"]}, made_at_once=True),
    "Adam": _ADAM,
    "AdamW": _ADAM,
    "Adamax": Known(
        _start(exp_avg=0.0, exp_inf=0.0, step=0.0), _adam, first_moment="exp_avg", divisors=_infinity_norms
    ),
    "LBFGS": Known(_start()),  # differences of gradients and of parameters
    "Muon": Known(_start(momentum_buffer=0.0)),
    "NAdam": _ADAM._replace(
        moments=_start(exp_avg=0.0, exp_avg_sq=0.0, mu_product=1.0, step=0.0, **{NOISE: 0.0}), momentum=_nadam
    ),
    "RAdam": Known(_start(exp_avg=0.0, exp_avg_sq=0.0, step=0.0), _radam),
    "RMSprop": Known(
        _start(square_avg=0.0, grad_avg=0.0, momentum_buffer=0.0), _velocity, first_moment="momentum_buffer"
    ),
    "Rprop": Known(_start()),  # step sizes, and the latest gradient, whose signs change them
    "SGD": Known(_start_of_sgd, _velocity_of_sgd, first_moment="momentum_buffer"),
    "SparseAdam": Known(_start(exp_avg=0.0, exp_avg_sq=0.0, step=0.0)),
}
