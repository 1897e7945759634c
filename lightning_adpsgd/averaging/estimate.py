r"""First moments brought together without being sent: how far a worker has drifted tells how its momentum deviates.

After a round worker i knows how far its parameters were from the mean, w_i − w̄. That is what the deviations of its
gradients from the workers' mean have added up to, ξ_j being that of the gradient of j steps ago. In torch's optimizers
(see :class:`LookAhead` for the symbols) it passes through the linear system

    g = ξ + λ w,    m ← β m + κ g,    w ← (1 − γ λ') w − γ (a g + b m),

λ being coupled and λ' decoupled weight decay, so that at the round V_j ξ_j is left of it in the first moment m, and
W_j ξ_j in the parameters. If gradients' deviations are independent from step to step and equally large, as the noise of
mini-batches is, the best linear estimate of the moment's deviation is K (w_i − w̄) with

    K = Σ_j V_j W_j / Σ_j W_j²,

and the round sets m_i ← m_i − K (w_i − w̄). For SGD with momentum μ at a constant rate γ over p steps that is

    v_i ← v_i + (c / γ) (w_i − w̄),   c = Σ_j μ^j a_j / Σ_j a_j²,   a_j = (1 − μ^{j+1}) / (1 − μ),   j = 0 … p − 1.

It accounts for the share (Σ_j V_j W_j)² / (Σ_j V_j² Σ_j W_j²) of the deviations' variance: all of it for p = 1, and for
μ = 0.9 and p = 2, 4, 8, 16 for 0.88, 0.77, 0.64 and 0.46. Where steps are divided by the root of a second moment
(Adam), w_i − w̄ is multiplied by it, element by element.

Where a round arrives d steps after it was sent, the moment has gone on meanwhile, and V_j is multiplied by β^d. If what
was sent has looked ahead (w + c Δw, with the latest step Δw), so do W_j: for SGD, they are −γ a_{j+d}, as if the steps
that momentum alone would take had been taken already. Looking ahead keeps parameters together while a mean is in
flight, the estimate brings moments together when it arrives: they complement each other.
"""

import math
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_adpsgd.averaging.momentum import Group, Momentum, MomentumReader, State, known, known_names
from lightning_adpsgd.averaging.state_entries import is_plain
from lightning_adpsgd.averaging.tiles import Entry, Tile

_AT_MOST = 4.0  # times a moment's size, that its deviation is believed to be
_REMEMBERED = 4096  # steps whose learning rates are kept; of longer periods, the latest count


def check_known_momentum(optimizer: Optimizer) -> None:
    """Make sure that it is known how an optimizer's first moment moves parameters.

    Raises:
        ValueError: if it is not.
    """
    kind = known(optimizer)
    if kind is None or not kind.first_moment:
        class_ = type(optimizer)
        names = known_names(lambda each: bool(each.first_moment))
        raise ValueError(
            f'optimizer_state="estimate" with {class_.__module__}.{class_.__qualname__}: expected {", ".join(names)} of'
            " torch.optim, or an optimizer derived from one of these, whose momentum follows from how parameters have"
            ' moved. Use optimizer_state="local" or "average".'
        )


class MomentEstimate:
    """Estimates, for one optimizer, how far this worker's first moments are from the workers' mean of them.

    Args:
        optimizer: whose moments; :func:`check_known_momentum` has to accept it.
        reader: of its momentum.
    """

    def __init__(self, optimizer: Optimizer, reader: MomentumReader) -> None:
        kind = known(optimizer)
        assert kind is not None
        self._kind = kind
        self._optimizer = optimizer
        self._reader = reader
        self._rates: deque[tuple[float, ...]] = deque(maxlen=_REMEMBERED)  # of each group; the latest step's come last
        self._left: list[float] = []  # of each group, the variance of moments' deviations after the latest round
        self._drifts: list[float] = []  # of each group, the variance that the latest round's deviations should have

    def note_step(self) -> None:
        """Take note of the learning rates of a step."""
        self._rates.append(tuple(_rate_of(group) for group in self._optimizer.param_groups))

    def factors(self, steps: int, ago: int = 0, ahead: Sequence[float] = ()) -> list[float]:
        """K of each parameter group.

        Args:
            steps: for how many steps what was sent had drifted.
            ago: how many steps ago it was sent.
            ahead: for each group, the multiple of the latest step that was added to what was sent.

        Returns:
            One per group; 0 where there is nothing to estimate. To be divided by a learning rate that is on a device.
        """
        rates = [*self._rates][max(0, len(self._rates) - ago - steps) : len(self._rates) - ago]
        groups = self._optimizer.param_groups
        left, self._left, self._drifts, found = [*self._left, *[0.0] * len(groups)], [], [], []
        for place, group in enumerate(groups):
            mine = [each[place] if place < len(each) else 0.0 for each in reversed(rates)]
            momentum, gathered = self._reader.of(group, ago)
            if momentum is not None and _is_on_device(group["lr"]):  # then its product with the rate is not known
                momentum = momentum._replace(coupled_decay=0.0, decoupled_decay=0.0)
            looked = ahead[place] if place < len(ahead) else 0.0
            response = _Response(0.0, 0.0, 0.0)
            if momentum is not None:
                response = _response(momentum, gathered, mine, ago, looked, left[place])
            found.append(response.factor)
            self._drifts.append(response.drift)
            self._left.append(response.left)
        return found

    def drifts_at(self, rates: Sequence[float]) -> list[float]:
        """The variance of one element of w_i − w that the latest round should have measured, of each parameter group.

        That is Σ_j W_j², and what the rounds before have left in the first moment, for gradients with a variance of 1;
        or whatever it is, where steps are divided by its root.

        Args:
            rates: γ_g of each group.
        """
        groups = zip(self._optimizer.param_groups, self._drifts, rates, strict=False)
        return [drift * rate**2 if _is_on_device(group["lr"]) else drift for group, drift, rate in groups]

    def mark_shared(self) -> None:
        """Take note that moments are the same on all workers."""
        self._left = []

    @torch.no_grad()
    def correct(self, tile: Tile, deviations: Tensor, parameters: Sequence[Tensor], factors: Sequence[float]) -> None:
        """Correct the moments of a tile.

        Args:
            tile: a part of what is averaged.
            deviations: w_i − w̄ of what was sent, shape (len(tile),).
            parameters: all that is averaged, in the order in which it is laid out.
            factors: of :meth:`factors`.
        """
        by_group: dict[int, list[tuple[State, Entry, _Range, Tensor]]] = defaultdict(list)
        for entry, start, stop, deviation in tile.of_groups(deviations):
            group, parameter = entry.group, parameters[entry.place]
            if group is not None and group < len(factors) and factors[group] != 0.0:
                state = self._optimizer.state.get(parameter)
                if state and state.get(self._kind.first_moment) is not None and is_plain(state):
                    here = (start, stop)
                    part = {name: _part(name, value, parameter, entry, here) for name, value in state.items()}
                    moment = Entry.in_order(state[self._kind.first_moment], entry.group, entry.order)
                    by_group[group].append((part, moment, here, deviation))
        for group, found in by_group.items():
            self._correct(self._optimizer.param_groups[group], factors[group], found)

    def _correct(self, group: Group, factor: float, found: "Sequence[tuple[State, Entry, _Range, Tensor]]") -> None:
        targets, states = [part[self._kind.first_moment] for part, *_ in found], [part for part, *_ in found]
        changes = [deviation.to(target) for target, (*_, deviation) in zip(targets, found, strict=True)]
        if self._kind.divisors is not None:
            changes = [*torch._foreach_mul(changes, self._kind.divisors(group, states))]
        if _is_on_device(group["lr"]):
            rate = group["lr"].detach().to(changes[0].dtype)
            changes = [*torch._foreach_mul(changes, torch.where(rate > 0.0, 1.0 / rate, 0.0))]
        # A moment's deviation is a part of it. What is much larger is what rounding has done, divided by a small rate.
        moved, size = (torch.stack(torch._foreach_norm(each)).float().norm() for each in (changes, targets))
        changes = [*torch._foreach_mul(changes, (moved * abs(factor) <= _AT_MOST * size).to(changes[0].dtype))]
        torch._foreach_add_(targets, changes, alpha=-factor)
        for target, (_, moment, here, _) in zip(targets, found, strict=True):
            if moment.flat is None:
                moment.write(*here, target)  # what was changed was a copy


_Range = tuple[int, int]


class _Response(NamedTuple):
    """What gradients whose deviations have a variance of 1 come to in a round."""

    factor: float
    """K."""
    drift: float
    """The variance of the deviations of what was sent."""
    left: float
    """The variance of the first moment's deviations after the round, but for what came after it was sent."""


def _response(
    momentum: Momentum, gathered: int, rates: Sequence[float], ago: int, ahead: float, left: float
) -> _Response:
    """Follow them through the linear system.

    Args:
        momentum: when it was sent.
        gathered: for how many steps, then.
        rates: learning rates of the steps in which what was sent had drifted, the latest first.
        ago: how many steps ago it was sent.
        ahead: how many times the latest step was added to it.
        left: by the round before.
    """
    beta, gain = momentum.decay, momentum.gain
    # What is wanted and what is known, as combinations of (m, w) after a step: at first, after the one before sending.
    moment, sent = (beta**ago, 0.0), (0.0, 1.0 + ahead)
    vv = vw = ww = 0.0
    before = 0.0, 0.0  # the round before was as late, and what it has left has mattered since then
    for age, rate in enumerate(rates[:gathered]):
        if age == len(rates) - ago:
            before = moment[0], sent[0]
        kept = momentum.kept(gathered - age)
        if not math.isfinite(kept):
            break
        size = rate * (momentum.newest(gathered - age) + kept * gain)
        v, w = (row[0] * gain - row[1] * size for row in (moment, sent))
        vv, vw, ww = vv + v * v, vw + v * w, ww + w * w
        pulls = gain * momentum.coupled_decay
        keeps = 1.0 - rate * momentum.decoupled_decay - size * momentum.coupled_decay
        moment, sent = (
            (beta * (row[0] - row[1] * rate * kept), row[0] * pulls + row[1] * keeps) for row in (moment, sent)
        )
        if age == 0:
            sent = (sent[0], sent[1] - ahead)  # the latest step is the difference from w before it
    factor = vw / ww if ww > 0.0 and beta > 0.0 else 0.0  # of a moment of which the next step leaves nothing
    if not math.isfinite(factor):
        return _Response(0.0, 0.0, 0.0)
    if ago == 0:
        before = moment[0], sent[0]
    after = vv - 2.0 * factor * vw + factor**2 * ww + (before[0] - factor * before[1]) ** 2 * left
    return _Response(factor, ww + before[1] ** 2 * left, after)


def _part(name: str, value: Any, parameter: Tensor, entry: Entry, here: _Range) -> Any:
    """Elements of an entry of a parameter's state, or all of it if it has another shape than the parameter."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape or name == "step":
        return value
    return Entry.in_order(value, entry.group, entry.order).read(*here)


def _is_on_device(rate: object) -> bool:
    return isinstance(rate, Tensor) and rate.device.type != "cpu"


def _rate_of(group: Group) -> float:
    # Nobody waits here for a device to read a rate that is there: all steps of a period count as if it had been 1, and
    # what that comes to is divided by it on the device.
    return 1.0 if _is_on_device(group["lr"]) else float(group["lr"])
