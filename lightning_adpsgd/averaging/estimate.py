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

from lightning_adpsgd.averaging.momentum import NOISE, Group, Momentum, MomentumReader, State, known, known_names
from lightning_adpsgd.averaging.second_moments import holds_noise, take_noise
from lightning_adpsgd.averaging.state_entries import is_plain
from lightning_adpsgd.averaging.tiles import Entry, Tile

_AT_MOST = 4.0  # times a moment's size, that its deviation is believed to be
_LEAST = 1e-36  # D of rates of 1e-18: such steps leave parameters where they are, and 1 / D might be infinite
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
        workers: n, how many there are.
    """

    def __init__(self, optimizer: Optimizer, reader: MomentumReader, workers: int) -> None:
        kind = known(optimizer)
        assert kind is not None
        self._kind = kind
        self._optimizer = optimizer
        self._reader = reader
        self._workers = workers
        self._rates: deque[tuple[float, ...]] = deque(maxlen=_REMEMBERED)  # of each group; the latest step's come last
        self._left: list[float] = []  # of each group, the variance of moments' deviations after the latest round
        self._corrected_at: dict[tuple[int, int], float] = {}  # the step at which a part of a parameter last was

    def note_step(self) -> None:
        """Take note of the learning rates of a step."""
        self._rates.append(tuple(_rate_of(group) for group in self._optimizer.param_groups))

    def after(self, steps: int, ago: int = 0, ahead: Sequence[float] = ()) -> "list[Correction]":
        """What moments of each parameter group are corrected by after a round.

        Args:
            steps: for how many steps what was sent had drifted.
            ago: how many steps ago it was sent.
            ahead: for each group, the multiple of the latest step that was added to what was sent.

        Returns:
            One per group. For learning rates that are on a device, it is what holds at a rate of 1.
        """
        rates = [*self._rates][max(0, len(self._rates) - ago - steps) : len(self._rates) - ago]
        groups = self._optimizer.param_groups
        left, found = [*self._left, *[0.0] * len(groups)], []
        for place, group in enumerate(groups):
            mine = [each[place] if place < len(each) else 0.0 for each in reversed(rates)]
            momentum, gathered = self._reader.of(group, ago)
            if momentum is not None and _is_on_device(group["lr"]):  # then its product with the rate is not known
                momentum = momentum._replace(coupled_decay=0.0, decoupled_decay=0.0)
            looked = ahead[place] if place < len(ahead) else 0.0
            response = Correction()
            # Of a moment of which the next step leaves nothing, there is nothing to correct.
            if momentum is not None and (momentum.decay > 0.0 or self._kind.second_moment):
                response = _response(momentum, gathered, mine, ago, looked, left[place])
            found.append(response._replace(steps=steps))
        self._left = [each.left for each in found]
        return found

    def mark_shared(self) -> None:
        """Take note that moments are the same on all workers."""
        self._left, self._corrected_at = [], {}

    def forget(self) -> None:
        """Take note that this worker's optimizer has lost its state."""
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
        """Correct the moments of a tile.

        Args:
            tile: a part of what is averaged.
            deviations: w_i − w̄, shape (len(tile),).
            sent: the same of what was sent, which rounding has changed: by this, first moments are corrected.
            parameters: all that is averaged, in the order in which it is laid out.
            corrections: of :meth:`after`.
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
        """Whether this worker has stepped a part of a parameter since it was last corrected, or only a device knows.

        Otherwise all of the drift is others', and says nothing of this worker's gradients.
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
        # A moment's deviation is a part of it. What is much larger is what rounding has done, divided by a small rate.
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
        """What deviations of parameters are multiplied by to be those of gradients: by nothing, if None."""
        units = None if self._kind.divisors is None else self._kind.divisors(group, states)
        if _is_on_device(group["lr"]):
            rate = group["lr"].detach().float()
            inverse = torch.where(rate > 0.0, 1.0 / rate, 0.0)
            return [inverse] * len(states) if units is None else [*torch._foreach_mul(units, inverse)]
        return units


class Correction(NamedTuple):
    """What moments of a parameter group are corrected by after a round.

    It follows from what gradients whose deviations have a variance of 1 come to in the round.
    """

    factor: float = 0.0
    """K."""
    drift: float = 0.0
    """D, the variance of an element of w_i − w̄ of what was sent."""
    left: float = 0.0
    """The variance of the first moment's deviations after the round, but for what came after it was sent."""
    steps: int = 0
    """For which what was sent had drifted."""

    @property
    def is_one(self) -> bool:
        """Whether there is anything to correct."""
        return self.drift > 0.0


class _Piece(NamedTuple):
    """A part of a parameter, with its state."""

    state: dict[str, Any]
    parameter: Tensor
    entry: Entry
    here: tuple[int, int]
    """Its first element, and where it ends (exclusive), as the parameter is laid out."""
    deviations: Tensor
    """w_i − w̄."""
    sent: Tensor
    """The same of what was sent."""

    @property
    def parts(self) -> State:
        """Its part of the state: views where there are any, copies of elements elsewhere."""
        return {name: self._part(name, value) for name, value in self.state.items()}

    def write_back(self, parts: State) -> None:
        """Overwrite entries of which :attr:`parts` had to make a copy."""
        for name, part in parts.items():
            whole = self.state[name]
            if part.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
                self._laid_out(whole).write(*self.here, part)

    def _part(self, name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape != self.parameter.shape or name == "step":
            return value  # of all of it
        return self._laid_out(value).read(*self.here)

    def _laid_out(self, value: Tensor) -> Entry:
        return Entry.in_order(value, self.entry.group, self.entry.order)


def _response(
    momentum: Momentum, gathered: int, rates: Sequence[float], ago: int, ahead: float, left: float
) -> Correction:
    """Follow gradients' deviations through the linear system.

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
    if ww <= _LEAST or not math.isfinite(vw / ww):
        return Correction()
    factor = vw / ww
    if ago == 0:
        before = moment[0], sent[0]
    after = vv - 2.0 * factor * vw + factor**2 * ww + (before[0] - factor * before[1]) ** 2 * left
    return Correction(factor, ww + before[1] ** 2 * left, after)


def _scaled(values: Sequence[Tensor], like: Sequence[Tensor], units: "Sequence[Tensor] | None") -> list[Tensor]:
    """``values`` times ``units``, in the types of ``like`` or at least 32 bits."""
    # What they are multiplied by may be as large as 1 / a learning rate, beyond the range of fp16.
    types = [torch.promote_types(other.dtype, torch.float32) for other in like]
    found = [value.to(type_) for value, type_ in zip(values, types, strict=True)]
    return found if units is None else [*torch._foreach_mul(found, [*units])]


def _is_on_device(rate: object) -> bool:
    return isinstance(rate, Tensor) and rate.device.type != "cpu"


def _rate_of(group: Group) -> float:
    # Nobody waits here for a device to read a rate that is there: all steps of a period count as if it had been 1, and
    # what that comes to is divided by it on the device.
    return 1.0 if _is_on_device(group["lr"]) else float(group["lr"])
