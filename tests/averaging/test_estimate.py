"""Moments estimated from drift, against torch's optimizers themselves and on real workers."""

import math
import statistics
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_adpsgd import LocalSGD
from lightning_adpsgd.averaging import estimate
from lightning_adpsgd.averaging.estimate import MomentEstimate, check_known_momentum
from lightning_adpsgd.averaging.layout import Bucket, FlatLayout
from lightning_adpsgd.averaging.look_ahead import LookAhead
from lightning_adpsgd.averaging.momentum import MomentumReader

COUNT = 50_000  # elements, each of which is an experiment of its own

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("SGD", {"lr": 0.1, "momentum": 0.9}),
    "SGD, dampened": ("SGD", {"lr": 0.1, "momentum": 0.8, "dampening": 0.3}),
    "SGD, Nesterov": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "SGD, weight decay": ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.5}),
    "SGD, maximizes": ("SGD", {"lr": 0.1, "momentum": 0.9, "maximize": True}),
    "RMSprop": ("RMSprop", {"lr": 0.1, "momentum": 0.7, "alpha": 0.01}),
    "Adam": ("Adam", {"lr": 0.01}),
    "Adam, AMSGrad": ("Adam", {"lr": 0.01, "amsgrad": True}),
    "AdamW": ("AdamW", {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 8.0}),
    "Adamax": ("Adamax", {"lr": 0.01}),
    "NAdam": ("NAdam", {"lr": 0.01}),
}


class Experiment:
    """An optimizer whose gradients are noise: all that parameters do is to drift away from the mean, which is 0."""

    def __init__(self, kind: str, first: int = 5) -> None:
        class_, options = KINDS[kind]
        self.parameter = nn.Parameter(torch.zeros(COUNT, dtype=torch.float64))
        self.optimizer: Optimizer = getattr(torch.optim, class_)([self.parameter], **options)
        self.reader = MomentumReader(self.optimizer, lambda: self.steps)
        self.estimate = MomentEstimate(self.optimizer, self.reader, 2)
        self.generator = torch.Generator().manual_seed(0)
        self.steps = 0
        self.before = torch.empty(0)
        self.train(first)
        with torch.no_grad():  # a round at which all become the same
            self.parameter.zero_()
            self.moment.zero_()

    @property
    def moment(self) -> Tensor:
        """The first moment."""
        state = self.optimizer.state[self.parameter]
        return state["exp_avg" if "exp_avg" in state else "momentum_buffer"]

    def train(self, steps: int, rates: list[float] | None = None) -> None:
        """Take steps whose gradients are signs, so that second moments stay what they are."""
        for step in range(steps):
            if rates is not None:
                self.optimizer.param_groups[0]["lr"] = rates[step]
            self.before = self.parameter.detach().clone()
            drawn = torch.randint(0, 2, (COUNT,), generator=self.generator, dtype=torch.float64)
            self.parameter.grad = drawn * 2 - 1
            self.optimizer.step()
            self.estimate.note_step()
            self.steps += 1

    def correct(self, sent: Tensor, **how: Any) -> None:
        """Correct the moment as a round does whose mean is 0."""
        corrections = self.estimate.after(**how)
        layout = FlatLayout([self.parameter], [0])
        for tile in layout.tiles(Bucket(0, 0, COUNT)):
            here = sent[tile.start : tile.stop]
            self.estimate.correct(tile, here, here, [self.parameter], corrections)


def uncorrelated(moment: Tensor, sent: Tensor) -> bool:
    """Whether a moment has nothing in common any more with what was sent, so that no factor would have been better."""
    correlation = torch.dot(moment, sent) / (moment.norm() * sent.norm())
    return abs(float(correlation)) < 5 / math.sqrt(COUNT)


@pytest.mark.parametrize("period", [2, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_of_a_moment_has_nothing_in_common_with_the_drift(kind: str, period: int) -> None:
    experiment = Experiment(kind)
    experiment.train(period)
    drift = experiment.parameter.detach().clone()
    assert not uncorrelated(experiment.moment, drift)

    experiment.correct(drift, steps=period)

    assert uncorrelated(experiment.moment, drift)


@pytest.mark.parametrize("kind", KINDS)
def test_after_one_step_the_estimate_is_exact(kind: str) -> None:
    experiment = Experiment(kind)
    experiment.train(1)
    was = experiment.moment.norm()

    experiment.correct(experiment.parameter.detach(), steps=1)

    assert experiment.moment.norm() < 1e-6 * was


@pytest.mark.parametrize("period", [2, 4, 8])
def test_it_accounts_for_the_share_that_theory_says(period: int) -> None:
    mu = 0.9
    a = [(1 - mu ** (j + 1)) / (1 - mu) for j in range(period)]
    v = [mu**j for j in range(period)]
    both = sum(x * y for x, y in zip(a, v, strict=True))
    share = both**2 / (sum(x * x for x in a) * sum(y * y for y in v))
    experiment = Experiment("SGD")
    experiment.train(period)
    was = experiment.moment.square().sum()

    experiment.correct(experiment.parameter.detach().clone(), steps=period)

    assert float(1 - experiment.moment.square().sum() / was) == pytest.approx(share, abs=0.02)
    assert experiment.estimate.after(period)[0].factor == pytest.approx(-both / sum(x * x for x in a) / 0.1)


@pytest.mark.parametrize("kind", ["SGD", "SGD, Nesterov", "Adam"])
def test_rates_that_change_within_a_period_count_each(kind: str) -> None:
    rates = [0.1, 0.02, 0.3, 0.005]
    experiment = Experiment(kind)
    experiment.train(4, rates)
    drift = experiment.parameter.detach().clone()

    experiment.correct(drift, steps=4)

    assert uncorrelated(experiment.moment, drift)


@pytest.mark.parametrize("looks_ahead", [False, True])
@pytest.mark.parametrize("kind", ["SGD", "SGD, Nesterov", "SGD, weight decay", "AdamW", "NAdam"])
def test_what_arrives_later_corrects_what_the_moment_has_become(kind: str, looks_ahead: bool) -> None:
    delay, period = 2, 4
    experiment = Experiment(kind)
    experiment.train(period)
    ahead = LookAhead(experiment.optimizer, experiment.reader).factors(delay) if looks_ahead else []
    sent = experiment.parameter.detach() + (ahead or [0.0])[0] * (experiment.parameter.detach() - experiment.before)
    experiment.train(delay)
    # Steps meanwhile have nothing to do with what was sent, but for weight decay's.
    assert not uncorrelated(experiment.moment, sent)

    experiment.correct(sent, steps=period, ago=delay, ahead=ahead)

    if kind != "SGD, weight decay":
        assert uncorrelated(experiment.moment, sent)
    assert experiment.estimate.after(period, delay, ahead)[0].factor != experiment.estimate.after(period)[0].factor


def test_nothing_is_estimated_without_momentum_a_rate_or_steps() -> None:
    parameter = nn.Parameter(torch.ones(3))
    for options in ({"lr": 0.1, "momentum": 0.0}, {"lr": 0.0, "momentum": 0.9}):
        optimizer = torch.optim.SGD([parameter], **options)
        estimate = MomentEstimate(optimizer, MomentumReader(optimizer, lambda: 3), 2)
        for _ in range(3):
            estimate.note_step()
        assert not estimate.after(3)[0].is_one
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    assert MomentEstimate(optimizer, MomentumReader(optimizer, lambda: 3), 2).after(3)[0].factor == 0.0


def test_parameters_of_any_shape_in_memory_and_those_without_state() -> None:
    parameters = [nn.Parameter(each) for each in (torch.zeros(()), torch.zeros(4, 3, 2, 2), torch.zeros(5))]
    optimizer = torch.optim.SGD(parameters, lr=0.5, momentum=0.9)
    for parameter in parameters[:2]:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    state = optimizer.state[parameters[1]]  # as after channels_last was set, and the moment loaded from before
    state["momentum_buffer"] = state["momentum_buffer"].to(memory_format=torch.channels_last)
    estimate = MomentEstimate(optimizer, MomentumReader(optimizer, lambda: 1), 2)
    estimate.note_step()
    layout = FlatLayout(parameters, [0, 0, 0])
    for bucket in layout.cut(1 << 20):
        for tile in layout.tiles(bucket):
            deviations = tile.pack(torch.empty(len(tile)))
            estimate.correct(tile, deviations, deviations, parameters, estimate.after(1))

    for parameter in parameters[:2]:
        torch.testing.assert_close(optimizer.state[parameter]["momentum_buffer"], torch.zeros_like(parameter))
    assert not optimizer.state[parameters[2]]


@pytest.mark.parametrize("class_", [torch.optim.Adagrad, torch.optim.RAdam, torch.optim.Rprop])
def test_an_optimizer_whose_momentum_is_not_known_is_refused(class_: Any) -> None:
    optimizer = class_([nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match=f'"estimate" with .*{class_.__name__}: expected .*Adam, AdamW.*SGD.*"local"'):
        check_known_momentum(optimizer)


# On real workers


def drift(policy: str, options: dict[str, Any], steps: int = 48, name: str = "SGD") -> list[float]:
    """The variance of moments among workers that follow noise, after each step once two rounds have taken place."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.Linear(30, 4))
    class_, settings = KINDS[name]
    optimizer = getattr(torch.optim, class_)(model.parameters(), **settings)
    local_sgd = LocalSGD(optimizer, 4, module=model, optimizer_state=policy, **options)
    torch.manual_seed(dist.get_rank() + 1)
    found = []
    for step in range(1, steps + 1):
        for parameter in model.parameters():
            parameter.grad = torch.randint(0, 2, parameter.shape) * 2.0 - 1.0
        optimizer.step()
        local_sgd.step()
        if step > 8:
            entries = [optimizer.state[parameter] for parameter in model.parameters()]
            moment = torch.cat([(entry.get("exp_avg", entry.get("momentum_buffer"))).flatten() for entry in entries])
            mean = moment.clone()
            dist.all_reduce(mean)
            found.append(float((moment - mean / dist.get_world_size()).square().mean()))
    return found


def drifts(options: dict[str, Any], name: str) -> tuple[list[float], list[float]]:
    return drift("local", options, name=name), drift("estimate", options, name=name)


# What is left of the deviations' variance, a mean over the steps of a period, is what the run shows, and a tenth.
@pytest.mark.parametrize(("name", "left", "left_if_late"), [("SGD", 0.4, 0.48), ("AdamW", 0.6, 0.72)])
@pytest.mark.parametrize(
    "options",
    [{}, {"reduce_dtype": "bf16"}, {"overlap": 1}, {"stagger": True}, {"stagger": True, "overlap": 1}],
    ids=str,
)
def test_moments_stay_closer_together_whichever_way_rounds_travel(
    pool: Any, options: dict[str, Any], name: str, left: float, left_if_late: float
) -> None:
    for local, estimated in pool.run(drifts, options, name, workers=3):
        share = statistics.fmean(estimated) / statistics.fmean(local)
        assert share < (left_if_late if "overlap" in options else left)


def every_step(nesterov: bool) -> tuple[Tensor, Tensor]:
    """Parameters after rounds at every step with the estimate, and as full communication makes them."""
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": nesterov}
    ends = []
    for averages in (True, False):
        torch.manual_seed(0)
        parameter = nn.Parameter(torch.randn(50, dtype=torch.float64))
        optimizer = torch.optim.SGD([parameter], **settings)
        local_sgd = LocalSGD(optimizer, 1, optimizer_state="estimate") if averages else None
        generator = torch.Generator().manual_seed(dist.get_rank())
        for _ in range(10):
            parameter.grad = parameter.detach() + torch.randn(50, generator=generator, dtype=torch.float64)
            if local_sgd is None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()
            optimizer.step()
            if local_sgd is not None:
                local_sgd.step()
        ends.append(parameter.detach())
    return ends[0], ends[1]


@pytest.mark.parametrize("nesterov", [False, True])
def test_at_every_step_it_is_full_communication_momentum_included(pool: Any, nesterov: bool) -> None:
    for mine, full in pool.run(every_step, nesterov, workers=2):
        torch.testing.assert_close(mine, full)


def rates_on_a_device(class_: str) -> list[list[Tensor]]:
    """State after rounds with a rate that is a number, and with one that counts as a tensor on a device."""
    found = []
    for on_device in (False, True):
        torch.manual_seed(0)
        parameter = nn.Parameter(torch.randn(40))
        rate = torch.tensor(0.03) if on_device else 0.03
        options = {"capturable": False} if class_ == "Adam" else {"momentum": 0.9}
        optimizer = getattr(torch.optim, class_)([parameter], lr=rate, foreach=False, **options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(estimate, "_is_on_device", lambda rate: isinstance(rate, Tensor))
            local_sgd = LocalSGD(optimizer, 2, optimizer_state="estimate")
            local_sgd.broadcast()
            generator = torch.Generator().manual_seed(dist.get_rank())
            for _ in range(8):
                parameter.grad = torch.randn(40, generator=generator)
                optimizer.step()
                local_sgd.step()
        found.append([parameter.detach(), *(each for each in optimizer.state[parameter].values() if each.dim() > 0)])
    return found


@pytest.mark.parametrize("class_", ["SGD", "Adam"])
def test_a_rate_on_a_device_is_not_read_and_counts_as_it_is(pool: Any, class_: str) -> None:
    for plain, on_device in pool.run(rates_on_a_device, class_):
        for mine, theirs in zip(on_device, plain, strict=True):
            torch.testing.assert_close(mine, theirs)


def nothing_more_is_sent() -> list[int]:
    sent = []
    for policy in ("local", "estimate"):
        model = nn.Linear(4, 4)
        local_sgd = LocalSGD(torch.optim.AdamW(model.parameters(), lr=0.1), 2, module=model, optimizer_state=policy)
        for _ in range(6):
            model(torch.ones(4)).sum().backward()
            local_sgd.optimizer.step()
            local_sgd.step()
        sent.append(local_sgd.workers.payload_bytes)
    return sent


def test_it_sends_nothing(pool: Any) -> None:
    for local, estimated in pool.run(nothing_more_is_sent):
        assert local == estimated > 0


def means_of_moments(options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The workers' mean velocity before and after each round, in which parameters are rounded to few bits."""
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(300))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    local_sgd = LocalSGD(optimizer, 3, optimizer_state="estimate", **options)
    local_sgd.broadcast()
    torch.manual_seed(dist.get_rank() + 1)
    before, after = [], []
    for step in range(1, 16):
        parameter.grad = torch.randn(300)
        optimizer.step()
        for found, act in ((before, lambda: None), (after, local_sgd.step)):
            if step == 14 and act is not local_sgd.step:
                local_sgd.average("validation")  # as they are, with what rounding has cut off
            act()
            mean = optimizer.state[parameter]["momentum_buffer"].clone()
            dist.all_reduce(mean)
            found.append(mean / dist.get_world_size())
    return torch.stack(before), torch.stack(after)


@pytest.mark.parametrize(
    "options",
    [{"reduce_dtype": "int4"}, {"reduce_dtype": "int4", "stagger": True}, {"reduce_dtype": "bf16", "overlap": 1}],
    ids=str,
)
def test_the_mean_of_moments_stays_what_it_is_whatever_rounding_does_to_the_mean_of_parameters(
    pool: Any, options: dict[str, Any]
) -> None:
    for before, after in pool.run(means_of_moments, options, workers=3):
        torch.testing.assert_close(after, before, rtol=0.0, atol=1e-5)


def before_and_after(options: dict[str, Any], after: int) -> tuple[float, float]:
    """The variance of moments among workers before and after a round that somebody asks for some steps after one."""
    parameter = nn.Parameter(torch.zeros(20_000, dtype=torch.float64))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    local_sgd = LocalSGD(optimizer, 8, optimizer_state="estimate", **options)
    local_sgd.broadcast()
    torch.manual_seed(dist.get_rank() + 1)
    for _ in range(24 + after):
        parameter.grad = torch.randint(0, 2, parameter.shape) * 2.0 - torch.ones_like(parameter)
        optimizer.step()
        local_sgd.step()
    found = []
    for _ in range(2):
        moment = optimizer.state[parameter]["momentum_buffer"]
        mean = moment.clone()
        dist.all_reduce(mean)
        found.append(float((moment - mean / dist.get_world_size()).square().mean()))
        local_sgd.average("validation")
    return found[0], found[1]


@pytest.mark.parametrize("after", [1, 2])
@pytest.mark.parametrize(
    "options", [{}, {"stagger": True}, {"overlap": 2}, {"overlap": 4}, {"stagger": True, "overlap": 2}], ids=str
)
def test_a_round_in_the_middle_of_others_does_not_drive_moments_apart(
    pool: Any, options: dict[str, Any], after: int
) -> None:
    for before, now in pool.run(before_and_after, options, after):
        assert now <= before * 1.001


def next_to_no_rate(dtype: str | None) -> list[float]:
    """The root mean squares of a moment in a run whose rate all but vanishes for a while."""
    torch.manual_seed(0)
    parameter = nn.Parameter(0.05 * torch.randn(4000))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    local_sgd = LocalSGD(optimizer, 4, optimizer_state="estimate", reduce_dtype=dtype)
    local_sgd.broadcast()
    torch.manual_seed(dist.get_rank() + 1)
    found = []
    for step in range(1, 41):
        optimizer.param_groups[0]["lr"] = 0.1 if step <= 24 else 1e-9
        parameter.grad = 1e-3 * torch.randn(4000)
        optimizer.step()
        local_sgd.step()
        found.append(float(optimizer.state[parameter]["momentum_buffer"].square().mean().sqrt()))
    return found


@pytest.mark.parametrize("dtype", [None, "bf16", "int4"])
def test_what_rounding_has_done_is_not_divided_by_a_rate_next_to_nothing(pool: Any, dtype: str | None) -> None:
    for sizes in pool.run(next_to_no_rate, dtype, workers=3):
        assert max(sizes[24:]) < 4 * max(sizes[:24])


def test_weight_decay_is_not_multiplied_by_a_rate_that_nobody_knows() -> None:
    factors = []
    for on_device in (False, True):
        parameter = nn.Parameter(torch.zeros(3))
        optimizer = torch.optim.AdamW([parameter], lr=1e-3, weight_decay=1.0)
        estimated = MomentEstimate(optimizer, MomentumReader(optimizer, lambda: 20), 2)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(estimate, "_is_on_device", lambda rate, on_device=on_device: on_device)
            for _ in range(8):
                estimated.note_step()
            factors.append(estimated.after(8)[0].factor / (1e-3 if on_device else 1.0))
    assert factors[1] == pytest.approx(factors[0], rel=0.02)
