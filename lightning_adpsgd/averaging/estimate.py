r"""Estimates how far a worker's first moments are from their mean from how far it has drifted. Nothing is sent.

After a round, worker i knows how far its parameters were from the mean, w_i − w̄. That distance comes from ξ_j, the
deviation of its gradient from the workers' mean j steps ago. In torch's optimizers (symbols as in :class:`LookAhead`)
ξ passes through the linear system

    g = ξ + λ w,    m ← β m + κ g,    w ← (1 − γ λ') w − γ (a g + b m),

where λ is coupled and λ' decoupled weight decay. At the round, V_j ξ_j is left in the first moment m, and W_j ξ_j in
the parameters. If deviations are independent from step to step and equally large, like mini-batch noise, the best
linear estimate of the moment's deviation is K (w_i − w̄) with

    K = Σ_j V_j W_j / Σ_j W_j²,

and the round sets m_i ← m_i − K (w_i − w̄). For SGD with momentum μ at a constant rate γ over p steps that is

    v_i ← v_i + (c / γ) (w_i − w̄),   c = Σ_j μ^j a_j / Σ_j a_j²,   a_j = (1 − μ^{j+1}) / (1 − μ),   j = 0 … p − 1.

The estimate explains (Σ_j V_j W_j)² / (Σ_j V_j² Σ_j W_j²) of the deviations' variance: all of it for p = 1, and for
μ = 0.9 and p = 2, 4, 8, 16 a share of 0.88, 0.77, 0.64 and 0.46. If steps are divided by the root of a second moment
(Adam), w_i − w̄ is multiplied by it, element by element.

If a round arrives d steps after it was sent, the moment has changed since, and V_j is multiplied by β^d. If the values
sent were extrapolated (w + c Δw, with the latest step Δw), so are the W_j: for SGD they are −γ a_{j+d}, as if momentum
had taken the next d steps already. Extrapolation keeps parameters together while a mean is in flight; the estimate
brings moments together when it arrives.
"""

import math
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_adpsgd.averaging.momentum import NOISE, Group, Momentum, MomentumReader, State, known, known_names
from lightning_adpsgd.averaging.second_moments import holds_noise, take_noise
from lightning_adpsgd.averaging.state_entries import is_plain
from lightning_adpsgd.averaging.tiles import Entry, Tile

_AT_MOST = 4.0  # estimates of more than this many times a moment's norm are not used
_LEAST = 1e-36  # D at learning rates of 1e-18, which move no parameter; with less, 1 / D might be infinite
_REMEMBERED = 4096  # steps whose learning rates are kept; of a longer period, only the latest are used


def check_known_momentum(optimizer: Optimizer) -> None:
    """Raise ``ValueError`` if it is not known how an optimizer's first moment moves parameters."""
    kind = known(optimizer)
    if kind is None or not kind.first_moment:
        class_ = type(optimizer)
        names = known_names(lambda each: bool(each.first_moment))
        raise ValueError(
            f'optimizer_state="estimate" with {class_.__module__}.{class_.__qualname__}: expected {", ".join(names)} of'
            " torch.optim, or a class derived from one of these: their momentum can be estimated from how parameters"
            ' have moved. Use optimizer_state="local" or "average".'
        )


class MomentEstimate:
    """Corrects one optimizer's moments after each round.

    Args:
        optimizer: the optimizer, which :func:`check_known_momentum` has accepted.
        reader: reads its momentum.
        workers: n, the number of workers.
    """

    def __init__(self, optimizer: Optimizer, reader: MomentumReader, workers: int) -> None:
        kind = known(optimizer)
        assert kind is not None
        self._kind = kind
        self._optimizer = optimizer
        self._reader = reader
        self._workers = workers
        self._rates: deque[tuple[float, ...]] = deque(maxlen=_REMEMBERED)  # of each group, oldest step first
        self._left: list[float] = []  # of each group, the variance of moments' deviations after the latest round
        self._corrected_at: dict[tuple[int, int], float] = {}  # the step, by (parameter, start of the part)

    def note_step(self) -> None:
        """Record the learning rates of a step."""
        self._rates.append(tuple(_rate_of(group) for group in self._optimizer.param_groups))

    def after(self, steps: int, ago: int = 0, ahead: Sequence[float] = ()) -> "list[Correction]":
        """The correction of each parameter group's moments after a round.

        Args:
            steps: the number of steps over which the values sent had drifted.
            ago: how many steps ago they were sent.
            ahead: for each group, how many times the latest step was added to them.

        Returns:
            One per group. If a group's learning rate is on a GPU, its correction is that for a rate of 1.
        """
        rates = [*self._rates][max(0, len(self._rates) - ago - steps) : len(self._rates) - ago]
        groups = self._optimizer.param_groups
        left, found = [*self._left, *[0.0] * len(groups)], []
        for place, group in enumerate(groups):
            mine = [each[place] if place < len(each) else 0.0 for each in reversed(rates)]
            momentum, gathered = self._reader.of(group, ago)
            if momentum is not None and _is_on_device(group["lr"]):  # decay per step is unknown
                momentum = momentum._replace(coupled_decay=0.0, decoupled_decay=0.0)
            looked = ahead[place] if place < len(ahead) else 0.0
            response = Correction()
            # A moment that the next step overwrites needs no correction.
            if momentum is not None and (momentum.decay > 0.0 or self._kind.second_moment):
                response = _response(momentum, gathered, mine, ago, looked, left[place])
            found.append(response._replace(steps=steps))
        self._left = [each.left for each in found]
        return found

    def mark_shared(self) -> None:
        """Record that moments are the same on all workers."""
        self._left, self._corrected_at = [], {}

    def forget(self) -> None:
        """Record that this worker's optimizer has lost its state."""
        self._corrected_at = {}

    @torch.no_grad()
    def correct(
        self,
        tile: Tile,
        deviations: Tensor,
        sent: Tensor,
        parameters: Sequence[Tensor],
        corrections: "Sequence[Correction]",
    ) -> None:
        """Correct the moments of a tile's parameters.

        Args:
            tile: a part of the averaged tensors.
            deviations: w_i − w̄, shape (len(tile),).
            sent: the same with the rounded values that were sent as w_i; first moments are corrected by these.
            parameters: the averaged tensors, in the order of the layout.
            corrections: the result of :meth:`after`.
        """
        by_group: dict[int, list[_Piece]] = defaultdict(list)
        for (entry, start, stop, here), (*_, away) in zip(
            tile.of_groups(deviations), tile.of_groups(sent), strict=True
        ):
            group, parameter = entry.group, parameters[entry.place]
            if group is not None and group < len(corrections) and corrections[group].is_one:
                state = self._optimizer.state.get(parameter)
                if not state or state.get(self._kind.first_moment) is None or not is_plain(state):
                    continue
                if self._has_stepped(parameter, start, state):
                    by_group[group].append(_Piece(state, parameter, entry, (start, stop), here, away))
        for group, found in by_group.items():
            self._correct(self._optimizer.param_groups[group], corrections[group], found)

    def _has_stepped(self, parameter: Tensor, start: int, state: State) -> bool:
        """Whether this worker has stepped a part of a parameter since its last correction; also if only a GPU knows.

        If it has not, all of the drift is the other workers', and tells nothing about its own gradients.
        """
        step = state.get("step")
        if step is None or (isinstance(step, Tensor) and step.device.type != "cpu"):
            return True
        place, now = (id(parameter), start), float(step)
        before, self._corrected_at[place] = self._corrected_at.get(place), now
        return now != before

    def _correct(self, group: Group, correction: "Correction", pieces: "Sequence[_Piece]") -> None:
        first, second = self._kind.first_moment, self._kind.second_moment
        plain = self._reader.plain(group) if second else {}
        takes = bool(second) and self._workers > 1 and holds_noise(plain)
        for piece in pieces if takes else ():
            if NOISE not in piece.state:
                piece.state[NOISE] = torch.zeros_like(piece.state[second])
        parts = [piece.parts for piece in pieces]
        moments = [part[first] for part in parts]
        units = self._units(group, parts)
        sent = _scaled([piece.sent for piece in pieces], moments, units)
        # A deviation is not much larger than the moment itself. If it is, it is a rounding error over a small rate.
        moved, size = (torch.stack(torch._foreach_norm(each)).float().norm() for each in (sent, moments))
        believed = moved * abs(correction.factor) <= _AT_MOST * size
        torch._foreach_add_(moments, [*torch._foreach_mul(sent, believed.to(sent[0].dtype))], alpha=-correction.factor)
        if takes:
            held = _scaled([piece.deviations for piece in pieces], moments, units)
            kept = plain["betas"][1] ** correction.steps
            seconds, taken = ([part[name] for part in parts] for name in (second, NOISE))
            torch._foreach_sub_(sent, held)
            for each in (held, sent):
                torch._foreach_mul_(each, correction.drift**-0.5)
            take_noise(seconds, taken, held, sent, kept, believed, self._workers)
        for piece, part in zip(pieces, parts, strict=True):
            piece.write_back({name: part[name] for name in ([first, second, NOISE] if takes else [first])})

    def _units(self, group: Group, states: list[State]) -> "list[Tensor] | None":
        """The factors that turn deviations of parameters into those of gradients; None: all are 1."""
        units = None if self._kind.divisors is None else self._kind.divisors(group, states)
        if _is_on_device(group["lr"]):
            rate = group["lr"].detach().float()
            inverse = torch.where(rate > 0.0, 1.0 / rate, 0.0)
            return [inverse] * len(states) if units is None else [*torch._foreach_mul(units, inverse)]
        return units


class Correction(NamedTuple):
    """How a parameter group's moments are corrected after a round. Variances are for gradient noise of variance 1."""

    factor: float = 0.0
    """K."""
    drift: float = 0.0
    """D, the variance of an element of w_i − w̄, for the values sent."""
    left: float = 0.0
    """The variance of the first moment's deviations after the round, apart from steps since it was sent."""
    steps: int = 0
    """The number of steps over which the values sent had drifted."""

    @property
    def is_one(self) -> bool:
        """Whether there is anything to correct."""
        return self.drift > 0.0


class _Piece(NamedTuple):
    """A part of a parameter, and its optimizer state."""

    state: dict[str, Any]
    parameter: Tensor
    entry: Entry
    here: tuple[int, int]
    """Its elements, start and stop (exclusive), in the order of the layout."""
    deviations: Tensor
    """w_i − w̄."""
    sent: Tensor
    """The same with the values sent as w_i."""

    @property
    def parts(self) -> State:
        """Its part of the state: views if possible, copies otherwise."""
        return {name: self._part(name, value) for name, value in self.state.items()}

    def write_back(self, parts: State) -> None:
        """Write back the ``parts`` that are copies."""
        for name, part in parts.items():
            whole = self.state[name]
            if part.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
                self._laid_out(whole).write(*self.here, part)

    def _part(self, name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape != self.parameter.shape or name == "step":
            return value  # of the whole parameter
        return self._laid_out(value).read(*self.here)

    def _laid_out(self, value: Tensor) -> Entry:
        return Entry.in_order(value, self.entry.group, self.entry.order)


def _response(
    momentum: Momentum, gathered: int, rates: Sequence[float], ago: int, ahead: float, left: float
) -> Correction:
    """Propagate gradients' deviations through the linear system.

    Args:
        momentum: the momentum when the values were sent.
        gathered: the number of steps over which it had been accumulated.
        rates: learning rates of the steps over which the values sent had drifted, latest first.
        ago: how many steps ago they were sent.
        ahead: how many times the latest step was added to them.
        left: ``Correction.left`` of the previous round.
    """
    beta, gain = momentum.decay, momentum.gain
    # The unknown and the known quantity, as linear forms in (m, w) after a step, beginning with the latest one sent.
    moment, sent = (beta**ago, 0.0), (0.0, 1.0 + ahead)
    vv = vw = ww = 0.0
    before = 0.0, 0.0  # when the previous round arrived, as late as this one; deviations it has left count from there
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
            sent = (sent[0], sent[1] - ahead)  # the latest step is w after it minus w before it
    if ww <= _LEAST or not math.isfinite(vw / ww):
        return Correction()
    factor = vw / ww
    if ago == 0:
        before = moment[0], sent[0]
    after = vv - 2.0 * factor * vw + factor**2 * ww + (before[0] - factor * before[1]) ** 2 * left
    return Correction(factor, ww + before[1] ** 2 * left, after)


def _scaled(values: Sequence[Tensor], like: Sequence[Tensor], units: "Sequence[Tensor] | None") -> list[Tensor]:
    """``values`` times ``units``, in the dtypes of ``like``, but at least fp32: units may exceed the range of fp16."""
    types = [torch.promote_types(other.dtype, torch.float32) for other in like]
    found = [value.to(type_) for value, type_ in zip(values, types, strict=True)]
    return found if units is None else [*torch._foreach_mul(found, [*units])]


def _is_on_device(rate: object) -> bool:
    return isinstance(rate, Tensor) and rate.device.type != "cpu"


def _rate_of(group: Group) -> float:
    # The host does not wait to read a rate from a GPU. It counts as 1, and the result is divided by it on the GPU.
    return 1.0 if _is_on_device(group["lr"]) else float(group["lr"])
