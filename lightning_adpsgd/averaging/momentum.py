"""What is known of optimizers: which of their state are moments, and how far momentum will carry parameters."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

Group = Mapping[str, Any]
"""A parameter group, with its settings."""


class _Momentum(NamedTuple):
    """A first moment, m_t = β m_{t−1} + κ g_t after t steps, of which step t is −(a g_t + b_t m_t), times its size."""

    decay: float
    """β."""
    gain: float
    """κ."""
    kept: Callable[[int], float]
    """b_t; NaN for steps whose size has nothing to do with the latest one's."""
    newest: float = 0.0
    """a, at the latest step."""


class Known(NamedTuple):
    """What is known of an optimizer."""

    moments: Callable[[Group], Mapping[str, float | None]]
    """Entries of a parameter's state that are moments, or that count their steps; and what they are before the first
    step: None if they are not there."""
    momentum: Callable[[Group, int], _Momentum | None] = lambda group, steps: None
    """The first moment of a group after a number of steps, if every step repeats a part of it."""
    made_at_once: bool = False
    """Whether state is made when the optimizer is constructed, not at a parameter's first step."""


def known(optimizer: Optimizer) -> Known | None:
    """What is known of an optimizer of torch.optim, or of one that is derived from one; None of any other."""
    for class_ in type(optimizer).__mro__:
        if class_.__module__.split(".")[:2] == ["torch", "optim"] and class_.__name__ in _KNOWN:
            return _KNOWN[class_.__name__]
    return None


def check_known_moments(optimizer: Optimizer) -> None:
    """Make sure that it is known which of an optimizer's state are moments.

    Raises:
        ValueError: if it is not.
    """
    if known(optimizer) is None:
        class_ = type(optimizer)
        raise ValueError(
            f'optimizer_state="reset" with {class_.__module__}.{class_.__qualname__}: expected an optimizer of'
            " torch.optim, or one derived from one. Which of another one's state are moments is not known, and setting"
            ' anything else to zero could end training. Use optimizer_state="local" or "average".'
        )


class LookAhead:
    """How far momentum will carry an optimizer's parameters, as a multiple of their latest step.

    Args:
        optimizer: whose momentum.
        steps: says for how many steps its moments have been gathered. Asked only where the optimizer does not count
            them itself, or does so on a device: reading that would have to wait for the device.
    """

    def __init__(self, optimizer: Optimizer, steps: Callable[[], int]) -> None:
        self._optimizer = optimizer
        self._steps = steps
        self._read: dict[int, tuple[Tensor, int, float]] = {}  # settings that are tensors

    def factors(self, delay: int) -> list[float]:
        r"""The multiple of the latest step that the next ``delay`` steps are expected to add up to, by momentum alone.

        That is what they add up to on average if gradients to come are as likely to point one way as the other, and as
        large as those before, so that second moments (bias corrected) stay what they are. In torch's optimizers
        (source: the algorithms in the documentation of ``torch.optim``) the first moment is m_t = β m_{t−1} + κ g_t,
        and a step is Δ_t ∝ a g_t + b_t m_t; so the next d add up to Σ_{j=1…d} b_{t+j} β^j m_t. Where a = 0, that is

            Σ_{j=1…d} (b_{t+j} / b_t) β^j · Δ_t,

        exactly. Where the gradient itself is a part of the step (a > 0), m_t is not known from Δ_t. Closest to it in
        the mean square, for gradients that are independent from step to step as the noise of mini-batches is, comes
        c · Δ_t (in place of 1 / b_t · Δ_t) with

            c = E[m_t Δ_t] / E[Δ_t²] = (a κ + b_t s) / (a² + 2 a b_t κ + b_t² s),   s = κ² (1 − β^{2t}) / (1 − β²),

        which is exact at the first step.

        ============================= ===== ======= ============================== ==========================
        optimizer                     β     κ       b_t                            a
        ============================= ===== ======= ============================== ==========================
        SGD, RMSprop with momentum    μ     1       1                              0
        SGD with Nesterov's momentum  μ     1       μ                              1
        Adam, AdamW, Adamax           β₁    1 − β₁  1 / (1 − β₁^t)                 0
        RAdam                         β₁    1 − β₁  rectification / (1 − β₁^t)     0
        NAdam                         β₁    1 − β₁  μ_{t+1} / (1 − μ_1 … μ_{t+1})  (1 − μ_t) / (1 − μ_1 … μ_t)
        ============================= ===== ======= ============================== ==========================

        RAdam's steps before its rectification begins say nothing of those after it, whose size is another one. Any
        other optimizer has no momentum that its steps repeat (Adagrad, Rprop), or only where a gradient is not zero
        (SparseAdam), or not in this way (Muon), or it is not known (Lion, Adan, schedule-free ones): 0.

        Args:
            delay: d, how many steps.

        Returns:
            A factor for each parameter group, ≥ 0.
        """
        kind = known(self._optimizer)
        if kind is None or delay < 1:
            return [0.0] * len(self._optimizer.param_groups)
        groups = self._optimizer.param_groups
        return [_factor(kind, self._plain(group), self._steps_of(group), delay) for group in groups]

    def _steps_of(self, group: Group) -> int:
        """How many steps the moments of a group have been gathered for, at least 1."""
        for parameter in group["params"]:
            state = self._optimizer.state.get(parameter)
            step = state.get("step") if isinstance(state, dict) else None
            if isinstance(step, Tensor) and step.device.type != "cpu":
                return max(1, self._steps())
            if step is not None:
                return max(1, int(step))
        return max(1, self._steps())

    def _plain(self, group: Group) -> Group:
        """A group's settings as numbers; those that are tensors are read again only after they have been changed."""
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


def _factor(kind: Known, group: Group, steps: int, delay: int) -> float:
    momentum = kind.momentum(group, steps)
    if momentum is None or momentum.decay <= 0.0:
        return 0.0
    a, b, gain = momentum.newest, momentum.kept(steps), momentum.gain
    if a == 0.0:
        c = 1.0 / b
    else:
        variance = gain**2 * _geometric(momentum.decay**2, steps)
        c = (a * gain + b * variance) / (a**2 + 2 * a * b * gain + b**2 * variance)
    terms = (c * momentum.kept(steps + j) * momentum.decay**j for j in range(1, delay + 1))
    return sum(term for term in terms if math.isfinite(term))


def _geometric(ratio: float, terms: int) -> float:
    """1 + q + … + q^(n−1)."""
    return float(terms) if ratio >= 1.0 else (1.0 - ratio**terms) / (1.0 - ratio)


def _velocity(group: Group, steps: int) -> _Momentum:
    momentum = group["momentum"]
    if not group.get("nesterov"):
        return _Momentum(momentum, 1.0, lambda t: 1.0)
    return _Momentum(momentum, 1.0, lambda t: momentum, newest=1.0)


def _adam(group: Group, steps: int) -> _Momentum:
    beta = group["betas"][0]
    return _Momentum(beta, 1.0 - beta, lambda t: 1.0 / (1.0 - beta**t))


def _radam(group: Group, steps: int) -> _Momentum:
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

    return _Momentum(beta, 1.0 - beta, kept)


def _nadam(group: Group, steps: int) -> _Momentum:
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

    newest = (1.0 - mu(steps)) / (1.0 - product(steps))
    return _Momentum(beta, 1.0 - beta, lambda t: mu(t + 1) / (1.0 - product(t + 1)), newest)


def _start(**values: float) -> Callable[[Group], Mapping[str, float | None]]:
    return lambda group: values


def _start_of_sgd(group: Group) -> Mapping[str, float | None]:
    # Its first step takes the whole gradient, whatever the dampening: that is another thing than from a velocity of 0.
    return {"momentum_buffer": None if group["dampening"] else 0.0}


_ADAM = Known(_start(exp_avg=0.0, exp_avg_sq=0.0, max_exp_avg_sq=0.0, step=0.0), _adam)

# Counters of steps are those that a bias correction goes by; others (of a decay of the learning rate) are no moments.
_KNOWN = {
    "ASGD": Known(_start()),  # a mean of parameters, and what becomes of the learning rate
    "Adadelta": Known(_start(square_avg=0.0, acc_delta=0.0)),
    "Adafactor": Known(_start(row_var=0.0, col_var=0.0, variance=0.0, step=0.0)),
    "Adagrad": Known(lambda group: {"sum": group["initial_accumulator_value"]}, made_at_once=True),
    "Adam": _ADAM,
    "AdamW": _ADAM,
    "Adamax": Known(_start(exp_avg=0.0, exp_inf=0.0, step=0.0), _adam),
    "LBFGS": Known(_start()),  # differences of gradients and of parameters
    "Muon": Known(_start(momentum_buffer=0.0)),
    "NAdam": Known(_start(exp_avg=0.0, exp_avg_sq=0.0, mu_product=1.0, step=0.0), _nadam),
    "RAdam": Known(_start(exp_avg=0.0, exp_avg_sq=0.0, step=0.0), _radam),
    "RMSprop": Known(_start(square_avg=0.0, grad_avg=0.0, momentum_buffer=0.0), _velocity),
    "Rprop": Known(_start()),  # step sizes, and the latest gradient, whose signs they go by
    "SGD": Known(_start_of_sgd, _velocity),
    "SparseAdam": Known(_start(exp_avg=0.0, exp_avg_sq=0.0, step=0.0)),
}
