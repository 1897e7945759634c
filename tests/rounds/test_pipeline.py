"""Rounds spread over the period, or in flight while training goes on, compared with values computed by hand."""

import re
import time
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_adpsgd import AveragingRound, LocalSGD
from lightning_adpsgd.workers.reduction import ALL_GATHER
from tests.test_local_sgd import RecordingPeriod

pytestmark = pytest.mark.workers

WORKERS = 2
STEPS = 15


class Changing(RecordingPeriod):
    """A rule whose period changes after each round that it sees."""

    def __init__(self, *periods: int) -> None:
        super().__init__(periods[0])
        self.periods = list(periods)

    def update(self, step: int, *, ratio: float, learning_rate: float) -> None:
        super().update(step, ratio=ratio, learning_rate=learning_rate)
        if len(self.periods) > 1:
            self.periods.pop(0)
        self.period = self.periods[0]


def start() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((5, 3), (4,), (2, 2, 3))]


def gradient(step: int, rank: int, place: int, shape: torch.Size) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + 10 * rank + place)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def trained(
    rank: int | None, steps: int, rule: RecordingPeriod | int, momentum: float = 0.0, **options: object
) -> dict:
    """Train with gradients that are known beforehand; ``rank`` None: the caller's rank."""
    rank = dist.get_rank() if rank is None else rank
    parameters = [nn.Parameter(tensor) for tensor in start()]
    optimizer = torch.optim.SGD(parameters, lr=0.5, momentum=momentum)
    local_sgd = LocalSGD(optimizer, rule, bucket_size_mb=40 / 2**20, **options)
    rounds: list[AveragingRound] = []
    local_sgd.subscribe(rounds.append)
    history = []
    for step in range(1, steps + 1):
        for place, parameter in enumerate(parameters):
            parameter.grad = gradient(step, rank, place, parameter.shape)
        optimizer.step()
        local_sgd.step()
        history.append(torch.cat([parameter.detach().reshape(-1) for parameter in parameters]))
    return {"history": history, "rounds": rounds, "local_sgd": local_sgd, "parameters": parameters}


def follow(
    periods: list[int], stagger: bool, overlap: int, steps: int, momentum: float = 0.0
) -> tuple[list[list[torch.Tensor]], list[float]]:
    """The expected history, and S_k of every cycle, computed element by element from the definition."""
    workers = [torch.cat([tensor.reshape(-1) for tensor in start()]).clone() for _ in range(WORKERS)]
    shapes = [tensor.shape for tensor in start()]
    length = len(workers[0])
    history: list[list[torch.Tensor]] = [[] for _ in range(WORKERS)]
    cycles = iter(periods)
    period, sent, began = next(cycles), 0, 0
    flying: list[tuple[int, slice, list[torch.Tensor], int]] = []  # due, elements, snapshots, number of parts
    variances, variance = [], 0.0
    velocities = [torch.zeros(length, dtype=torch.float64) for _ in range(WORKERS)]
    for step in range(1, steps + 1):
        before = [worker.clone() for worker in workers]
        for rank in range(WORKERS):
            gradients = [gradient(step, rank, place, shape).reshape(-1) for place, shape in enumerate(shapes)]
            velocities[rank] = momentum * velocities[rank] + torch.cat(gradients)
            workers[rank] = workers[rank] - 0.5 * velocities[rank]

        def arrive(step: int = step) -> None:
            while flying and flying[0][0] <= step:
                _, where, snapshots, _ = flying.pop(0)
                mean = sum(snapshots) / WORKERS
                for rank in range(WORKERS):
                    workers[rank][where] += mean - snapshots[rank]

        arrive()
        parts = period if stagger else 1
        if flying and parts != flying[-1][3]:
            arrive(steps + overlap)
        # After all workers were the same, the first part waits until it has drifted for a period.
        if (stagger and (variances or sent > 0)) or step - began == period:
            where = slice(length * sent // parts, length * (sent + 1) // parts)
            snapshots = [worker[where].clone() for worker in workers]
            ahead = sum(momentum**again for again in range(1, min(overlap, period - 1) + 1))
            for rank in range(WORKERS):
                snapshots[rank] += ahead * (workers[rank] - before[rank])[where]
            mean = sum(snapshots) / WORKERS
            variance += sum(float((mean - snapshot).square().sum()) for snapshot in snapshots) / WORKERS
            flying.append((step + min(overlap, period - 1), where, snapshots, parts))
            sent += 1
            if sent == parts:
                variances.append(variance)
                variance, sent, began = 0.0, 0, step
                period = next(cycles, period)
        arrive()
        for rank in range(WORKERS):
            history[rank].append(workers[rank].clone())
    return history, variances


def train(stagger: bool, overlap: int, period: int) -> dict:
    outcome = trained(None, STEPS, RecordingPeriod(period), stagger=stagger, overlap=overlap)
    local_sgd = outcome.pop("local_sgd")
    return {"history": outcome["history"], "rounds": outcome["rounds"], "seen": local_sgd.period.seen}


@pytest.mark.parametrize("period", [1, 3, 4])
@pytest.mark.parametrize(("stagger", "overlap"), [(True, 0), (True, 1), (True, 2), (False, 1), (False, 3)])
def test_every_element_is_averaged_once_per_cycle_and_keeps_the_steps_taken_meanwhile(pool, stagger, overlap, period):
    history, variances = follow([period], stagger, overlap, STEPS)
    for rank, outcome in enumerate(pool.run(train, stagger, overlap, period, workers=WORKERS)):
        torch.testing.assert_close(torch.stack(outcome["history"]), torch.stack(history[rank]), rtol=0, atol=1e-12)
        rounds = outcome["rounds"]
        first = 2 * period - 1 if stagger else period
        assert len(rounds) >= (STEPS - min(overlap, period - 1) - 1 - first) // period + 1
        for round_, variance in zip(rounds, variances, strict=False):
            assert round_.variance == pytest.approx(variance)
            assert round_.ratio == pytest.approx(variance / 0.5)
        assert [round_.step for round_ in rounds] == [first + period * index for index in range(len(rounds))]
        assert [round_.local_steps for round_ in rounds] == [first, *[period] * (len(rounds) - 1)]
        assert {(round_.period, round_.trigger) for round_ in rounds} == {(period, "period")}


def train_with_momentum(stagger: bool, overlap: int, period: int) -> dict:
    outcome = trained(None, STEPS, RecordingPeriod(period), momentum=0.9, stagger=stagger, overlap=overlap)
    return {"history": outcome["history"], "variances": [round_.variance for round_ in outcome["rounds"]]}


@pytest.mark.parametrize("period", [3, 4])
@pytest.mark.parametrize(("stagger", "overlap"), [(True, 0), (True, 1), (True, 2), (False, 1), (False, 2)])
def test_with_momentum_workers_send_the_values_that_they_expect_on_arrival(pool, stagger, overlap, period):
    history, variances = follow([period], stagger, overlap, STEPS, momentum=0.9)
    for rank, outcome in enumerate(pool.run(train_with_momentum, stagger, overlap, period, workers=WORKERS)):
        torch.testing.assert_close(torch.stack(outcome["history"]), torch.stack(history[rank]), rtol=0, atol=1e-12)
        assert len(outcome["variances"]) >= 2
        assert outcome["variances"] == pytest.approx(variances[: len(outcome["variances"])])


def drift_with_momentum(overlap: int) -> dict:
    outcome = trained(None, 41, RecordingPeriod(4), momentum=0.9, stagger=True, overlap=overlap)
    return {"history": outcome["history"]}


def test_looking_ahead_does_not_change_the_mean_of_the_workers(pool):
    alone, _ = follow([100], False, 0, 41, momentum=0.9)
    mean_alone = sum(states[-1] for states in alone) / WORKERS
    outcomes = pool.run(drift_with_momentum, 1, workers=WORKERS)
    mean = sum(outcome["history"][-1] for outcome in outcomes) / WORKERS
    torch.testing.assert_close(mean, mean_alone, rtol=0, atol=1e-12)
    apart = (outcomes[0]["history"][-1] - outcomes[1]["history"][-1]).norm()
    assert apart < 0.5 * (alone[0][-1] - alone[1][-1]).norm()


def train_by(rule: Changing, overlap: int) -> dict:
    outcome = trained(None, 16, rule, stagger=True, overlap=overlap)
    return {"history": outcome["history"], "rounds": outcome["rounds"], "seen": rule.seen}


@pytest.mark.parametrize(("overlap", "periods"), [(0, [3, 3, 2, 5, 5]), (1, [3, 3, 3, 2, 5]), (2, [3, 3, 3, 2, 5])])
def test_a_new_period_changes_the_fragments_from_the_next_cycle_on(pool, overlap, periods):
    history, variances = follow(periods, True, overlap, 16)
    for rank, outcome in enumerate(pool.run(train_by, Changing(3, 2, 5), overlap, workers=WORKERS)):
        torch.testing.assert_close(torch.stack(outcome["history"]), torch.stack(history[rank]), rtol=0, atol=1e-12)
        rounds = outcome["rounds"]
        assert [round_.period for round_ in rounds] == periods[: len(rounds)]
        # Fragments of the first cycle have drifted for up to twice as long: the rule does not see that round.
        assert [step for step, _, _ in outcome["seen"]] == [round_.step for round_ in rounds[1:]]
        assert [round_.variance for round_ in rounds] == pytest.approx(variances[: len(rounds)])


def force(stagger: bool, overlap: int, step: int, momentum: float) -> dict:
    outcome = trained(None, step, RecordingPeriod(4), momentum, stagger=stagger, overlap=overlap)
    local_sgd, parameters, rounds = outcome["local_sgd"], outcome["parameters"], outcome["rounds"]
    sent = local_sgd.workers.payload_bytes
    forced = local_sgd.average("validation")
    again = local_sgd.average("validation")
    return {
        "flat": torch.cat([parameter.detach().reshape(-1) for parameter in parameters]),
        "rounds": rounds,
        "forced": forced,
        "again": again,
        "has_trained": local_sgd.has_trained,
        "bytes": (sum(round_.payload_bytes for round_ in rounds), local_sgd.workers.payload_bytes, sent),
    }


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("step", range(3, 9))
@pytest.mark.parametrize(("stagger", "overlap"), [(True, 0), (True, 1), (True, 3), (False, 1), (False, 3)])
def test_a_forced_round_makes_all_workers_the_same_whatever_is_in_flight(pool, stagger, overlap, step, momentum):
    outcomes = pool.run(force, stagger, overlap, step, momentum, workers=WORKERS)
    history, _ = follow([4], stagger, overlap, step, momentum)
    mean = sum(states[-1] for states in history) / WORKERS
    for outcome in outcomes:
        assert torch.equal(outcome["flat"], outcomes[0]["flat"])  # bit for bit
        torch.testing.assert_close(outcome["flat"], mean, rtol=0, atol=1e-12)
        assert outcome["forced"] is not None
        assert outcome["again"] is None
        assert not outcome["has_trained"]
        assert sum(round_.local_steps for round_ in outcome["rounds"]) == step
        booked, total, before = outcome["bytes"]
        assert booked == total > before


def diverge(stagger: bool, overlap: int, on_divergence: str) -> dict:
    outcome = trained(None, 5, RecordingPeriod(4), stagger=stagger, overlap=overlap, on_divergence=on_divergence)
    local_sgd, parameters = outcome["local_sgd"], outcome["parameters"]
    if dist.get_rank() == 1:
        parameters[0].data.fill_(float("nan"))
    error = None
    try:
        for _ in range(8):
            local_sgd.optimizer.step()
            local_sgd.step()
    except RuntimeError as raised:
        error = f"{type(raised).__name__}: {raised}"
    return {
        "error": error,
        "finite": all(bool(parameter.isfinite().all()) for parameter in parameters),
        "dropped": sum(round_.dropped for round_ in outcome["rounds"]),
    }


@pytest.mark.parametrize(("stagger", "overlap"), [(True, 0), (True, 2), (False, 2)])
def test_values_that_are_not_finite_are_not_adopted(pool, stagger, overlap):
    first, second = pool.run(diverge, stagger, overlap, "raise")
    for outcome in (first, second):
        assert outcome["error"].startswith("WorkersDivergedError: Parameters of rank(s) 1 are not finite")
    assert first["finite"]
    assert not second["finite"]


@pytest.mark.parametrize(("stagger", "overlap"), [(True, 0), (True, 2), (False, 2)])
def test_a_diverged_worker_gets_the_others_parameters_in_a_full_round(pool, stagger, overlap):
    for outcome in pool.run(diverge, stagger, overlap, "drop"):
        assert outcome == {"error": None, "finite": True, "dropped": 1}


def part_ways(stagger: bool, overlap: int, how: str) -> str:
    outcome = trained(None, 5, RecordingPeriod(4), stagger=stagger, overlap=overlap)
    local_sgd = outcome["local_sgd"]
    if dist.get_rank() == 1 and how == "validates":
        local_sgd.average("validation")
    if dist.get_rank() == 1 and how == "adds parameters":
        local_sgd.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(7, dtype=torch.float64))]})
    for _ in range(8):
        local_sgd.optimizer.step()
        local_sgd.step()
    return "no error"


@pytest.mark.parametrize("how", ["validates", "adds parameters"])
@pytest.mark.parametrize(("stagger", "overlap"), [(True, 0), (True, 1), (True, 3), (False, 2)])
def test_workers_that_disagree_find_out(pool, stagger, overlap, how):
    outcomes = pool.outcomes(part_ways, stagger, overlap, how)
    # The worker that finds out first leaves; the other may only notice that it is lost.
    assert {outcome.kind for outcome in outcomes} <= {"WorkersDisagreeError", "WorkerLostError"}, outcomes
    found = [outcome.error for outcome in outcomes if outcome.kind == "WorkersDisagreeError"]
    assert found, outcomes
    assert re.search(r"(a fragment of an averaging round|the end of a round under way), sent at step", found[0])


def add_parameters(stagger: bool, overlap: int) -> dict:
    outcome = trained(None, 6, RecordingPeriod(4), stagger=stagger, overlap=overlap)
    local_sgd = outcome["local_sgd"]
    added = nn.Parameter(torch.full((7,), float(dist.get_rank()), dtype=torch.float64))
    local_sgd.optimizer.add_param_group({"params": [added], "lr": 0.25})
    for _ in range(12):
        local_sgd.optimizer.step()
        local_sgd.step()
    return {"added": added.detach(), "rounds": outcome["rounds"], "seen": local_sgd.period.seen}


@pytest.mark.parametrize(("stagger", "overlap"), [(True, 0), (True, 1), (False, 2)])
def test_added_parameters_are_averaged_from_the_next_cycle_on(pool, stagger, overlap):
    for outcome in pool.run(add_parameters, stagger, overlap):
        torch.testing.assert_close(outcome["added"], torch.full((7,), 0.5, dtype=torch.float64))
        assert sum(round_.local_steps for round_ in outcome["rounds"]) == outcome["rounds"][-1].step


def alone() -> list:
    return trained(0, 8, RecordingPeriod(4), stagger=True, overlap=1)["rounds"]


def test_one_worker_has_nothing_to_send():
    assert [(round_.step, round_.sent_bytes) for round_ in alone()] == [(4, 0), (8, 0)]


# The second phase of a round in few bits


class _Waiting(torch.autograd.Function):
    """Nothing, but its backward pass takes until what was sent has arrived."""

    sent: ClassVar[list[Any]] = []

    @staticmethod
    def forward(context: Any, values: torch.Tensor) -> torch.Tensor:
        return values.clone()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        give_up_at = time.monotonic() + 60
        while not all(work.is_completed() for work in _Waiting.sent) and time.monotonic() < give_up_at:
            time.sleep(0.001)
        return gradient


def gather_in_backward(backward: bool, stagger: bool) -> tuple[int, int, list[torch.Tensor]]:
    """How often combined shares were gathered in backward passes and elsewhere; and the parameters at the end."""
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(20, 20) for _ in range(4))
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.1, momentum=0.9)
    options = {"reduce_dtype": "int8", "optimizer_state": "estimate", "bucket_size_mb": 500 / 2**20}
    local_sgd = LocalSGD(optimizer, 2, overlap=1, stagger=stagger, **options)
    counts, original, in_backward = [0, 0], getattr(dist, ALL_GATHER), False

    def counted(*arguments: Any, **named: Any) -> Any:
        counts[not in_backward] += 1
        return original(*arguments, **named)

    exchange = dist.all_to_all_single

    def noted(*arguments: Any, **named: Any) -> Any:
        _Waiting.sent.append(exchange(*arguments, **named))
        return _Waiting.sent[-1]

    torch.manual_seed(dist.get_rank() + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, ALL_GATHER, counted)
        patch.setattr(dist, "all_to_all_single", noted)
        patch.setattr(_Waiting, "sent", [])
        for _ in range(6):
            values = torch.randn(8, 20)
            for layer in layers:
                values = _Waiting.apply(layer(values).relu())
            in_backward = True
            if backward:
                values.square().mean().backward()
            else:  # gradients that come to parameters by other ways
                gradients = torch.autograd.grad(values.square().mean(), [*layers.parameters()])
                for parameter, gradient in zip(layers.parameters(), gradients, strict=True):
                    parameter.grad = gradient
            in_backward = False
            optimizer.step()
            optimizer.zero_grad()
            local_sgd.step()
    return counts[0], counts[1], [parameter.detach() for parameter in layers.parameters()]


@pytest.mark.parametrize("stagger", [False, True])
def test_what_was_combined_is_gathered_while_gradients_are_computed(pool, stagger):
    with_hooks, without = (pool.run(gather_in_backward, backward, stagger, workers=3) for backward in (True, False))
    for (early, late, mine), (none, other, same) in zip(with_hooks, without, strict=True):
        assert none == 0
        assert early + late == other
        assert early > late
        assert all(torch.equal(one, another) for one, another in zip(mine, same, strict=True))
