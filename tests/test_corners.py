"""Corner cases of rounds: the definition of r, what the rule sees, dropped workers, handshakes, what is averaged."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_adpsgd import AdaptivePeriod, LocalSGD
from tests.test_local_sgd import RecordingPeriod

pytestmark = pytest.mark.workers

TRANSPORTS = {
    "plain": {},
    "read later": {},
    "stagger": {"stagger": True},
    "overlap": {"overlap": 2},
    "both": {"stagger": True, "overlap": 1},
    "bf16": {"reduce_dtype": "bf16"},
    "bf16 both": {"reduce_dtype": "bf16", "stagger": True, "overlap": 1},
    "int4": {"reduce_dtype": "int4"},
    "int4 both": {"reduce_dtype": "int4", "stagger": True, "overlap": 1},
}


def steady(
    transport: str,
    rule: RecordingPeriod | AdaptivePeriod,
    steps: int,
    validate_every: int = 0,
    rates: tuple[tuple[float, float], ...] = ((0.1, 0.2), (0.1, 0.2)),
) -> LocalSGD:
    """Every worker takes the same step each time: rank + 1 times its rate, in each of 24 elements of two groups."""
    rank = dist.get_rank()
    groups = [{"params": [nn.Parameter(torch.zeros(24))], "lr": rate} for rate in rates[rank]]
    local_sgd = LocalSGD(torch.optim.SGD(groups, lr=1.0), rule, **TRANSPORTS[transport])
    local_sgd._engine._reads_later = transport == "read later"
    local_sgd.broadcast()
    for step in range(1, steps + 1):
        for group in groups:
            group["params"][0].grad = torch.full((24,), float(rank + 1))
        local_sgd.optimizer.step()
        local_sgd.step()
        if validate_every and step % validate_every == 0:
            local_sgd.average("validation")
    local_sgd.average()
    return local_sgd


def ratios(transport: str) -> list[float]:
    rule = RecordingPeriod(3)
    steady(transport, rule, 13, rates=((0.1, 0.3), (0.3, 0.1)))
    return [ratio for _, ratio, _ in rule.seen]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_ratio_is_that_of_means_however_rounds_are_sent(pool, transport):
    # Three steps of 0.1 and 0.6, then of 0.3 and 0.2: each group's S_g over the mean of the workers' rates.
    expected = 24 * (3 * 0.25) ** 2 / 0.2 + 24 * (3 * 0.05) ** 2 / 0.2
    for seen in pool.run(ratios, transport):
        assert len(seen) >= 2
        assert seen == pytest.approx(
            [expected] * len(seen), rel=1e-5 if "reduce_dtype" not in TRANSPORTS[transport] else 0.02
        )


def watched(transport: str, validate_every: int, steps: int) -> list[tuple[int, float]]:
    rule = RecordingPeriod(4)
    steady(transport, rule, steps, validate_every)
    return [(step, ratio) for step, ratio, _ in rule.seen]


def drift_of(*steps: int) -> float:
    """r where each quarter of all elements has drifted for the given number of steps; each group is half of them."""
    apart, rates = (0.05, 0.05, 0.1, 0.1), (0.1, 0.1, 0.2, 0.2)
    return sum(12 * (k * a) ** 2 / rate for k, a, rate in zip(steps, apart, rates, strict=True))


@pytest.mark.parametrize("transport", ["stagger", "both"])
@pytest.mark.parametrize(
    ("validate_every", "drift"),
    [(4, (4, 4, 4, 4)), (5, (4, 5, 5, 5)), (6, (4, 5, 6, 6)), (7, (4, 5, 6, 7)), (9, (4, 5, 6, 7))],
)
def test_the_rule_sees_a_staggered_round_between_any_two_forced_ones(pool, transport, validate_every, drift):
    for seen in pool.run(watched, transport, validate_every, 3 * validate_every):
        assert [ratio for _, ratio in seen] == pytest.approx([drift_of(*drift)] * 3, rel=1e-5)
        assert [step for step, _ in seen] == [k * validate_every + min(7, validate_every) for k in range(3)]


@pytest.mark.parametrize("transport", ["stagger", "both"])
def test_the_rule_compares_whole_periods_where_there_are_any(pool, transport):
    for seen in pool.run(watched, transport, 16, 32):
        assert [step for step, _ in seen] == [11, 15, 27, 31]
        assert [ratio for _, ratio in seen] == pytest.approx([drift_of(4, 4, 4, 4)] * 4, rel=1e-5)


def adapt() -> float | None:
    rule = AdaptivePeriod(sampling=14)
    rule.setup(28)
    return steady("both", rule, 28, validate_every=7).period.target


def test_a_target_is_found_where_validations_are_close(pool):
    assert pool.run(adapt) == [pytest.approx(drift_of(4, 5, 6, 7))] * 2


# Divergence


def drop(transport: str) -> dict:
    parameter = nn.Parameter(torch.zeros(64))
    options = {"on_divergence": "drop", **TRANSPORTS[transport]}
    local_sgd = LocalSGD(torch.optim.SGD([parameter], lr=1.0), 4, **options)
    rounds = []
    local_sgd.subscribe(rounds.append)
    local_sgd.broadcast()
    for step in range(15):
        parameter.grad = torch.full((64,), -1.0 - dist.get_rank())
        local_sgd.optimizer.step()
        if dist.get_rank() == 2 and step == 5:
            parameter.data[17] = float("nan")
        local_sgd.step()
    local_sgd.average()
    return {"value": parameter.detach(), "dropped": [round_.dropped for round_ in rounds if round_.dropped]}


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_worker_that_is_dropped_spoils_nothing(pool, transport):
    first, *others = pool.run(drop, transport, workers=3)
    assert first["dropped"] == [1]
    assert first["value"].isfinite().all()
    assert first["value"].max() - first["value"].min() < 7.0  # fragments may have been sent at different steps
    for other in others:
        assert torch.equal(other["value"], first["value"])


# Handshakes


def read_late() -> list[int]:
    parameter = nn.Parameter(torch.zeros(4))
    local_sgd = LocalSGD(torch.optim.SGD([parameter], lr=1.0), 2)
    local_sgd._engine._reads_later = True
    met = []
    for step in range(4):
        parameter.grad = torch.ones(4)
        local_sgd.optimizer.step()
        local_sgd.step()
        before = local_sgd.handshakes
        if step == 1:
            assert local_sgd.average("validation") is not None  # the record of the round before
        if step == 2:
            assert local_sgd.average("validation").trigger == "validation"
        met.append(local_sgd.handshakes - before)
    return met


def test_a_record_that_is_read_late_is_not_a_handshake(pool):
    assert pool.run(read_late) == [[0, 0, 1, 0]] * 2


# What is averaged


class Cached(nn.Module):
    """Caches whose length depends on the batch, a queue, and statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.part = nn.Module()
        self.part.register_buffer("cache", torch.zeros(1), persistent=False)
        self.part.register_buffer("queue", torch.zeros(2))
        self.part.register_buffer("mean", torch.zeros(2))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))


def run_cached(exclude: list[str], options: dict) -> dict:
    model, rank = Cached(), dist.get_rank()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    local_sgd = LocalSGD(optimizer, 2, module=model, exclude_buffers=exclude, **options)
    local_sgd.broadcast()
    for step in range(4):
        model.part.cache = torch.arange(2.0 + step * (1 + rank))
        model.part.queue.fill_(rank)
        model.part.mean.fill_(rank)
        model.weight.grad = torch.full((3,), float(rank))
        optimizer.step()
        local_sgd.step()
    local_sgd.average("validation")
    return {"cache": len(model.part.cache), "queue": model.part.queue[0].item(), "mean": model.part.mean[0].item()}


@pytest.mark.parametrize("options", [{}, {"stagger": True, "overlap": 1}], ids=str)
def test_caches_stay_each_workers_own_and_so_do_buffers_that_are_excluded(pool, options):
    expected = [{"cache": 2 + 3 * (1 + rank), "queue": float(rank), "mean": 0.5} for rank in range(2)]
    assert pool.run(run_cached, ["*.queue"], options) == expected
    assert [outcome["queue"] for outcome in pool.run(run_cached, [], options)] == [0.5, 0.5]


def remove_group(options: dict) -> list[list[float]]:
    kept, removed = (nn.Parameter(torch.zeros(6)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [removed]}, {"params": [kept]}], lr=1.0)
    local_sgd = LocalSGD(optimizer, 4, **options)
    local_sgd.broadcast()
    for step in range(9):
        for parameter in (kept, removed):
            parameter.grad = torch.full((6,), -1.0 - dist.get_rank())
        optimizer.step()
        if step == 5:
            optimizer.param_groups.pop(0)
        local_sgd.step()
    local_sgd.average()
    return [kept.tolist(), removed.tolist()]


@pytest.mark.parametrize("options", [{}, {"stagger": True}, {"overlap": 1}, {"stagger": True, "overlap": 1}], ids=str)
def test_a_parameter_removed_from_an_optimizer_is_averaged_once_more(pool, options):
    for kept, removed in pool.run(remove_group, options):
        assert kept == pytest.approx([1.5 * 9] * 6)
        assert removed == pytest.approx([1.5 * 6] * 6)


def remove_owing() -> list[float]:
    kept, removed = (nn.Parameter(torch.full((600,), 100.0)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [removed]}, {"params": [kept]}], lr=1.0)
    local_sgd = LocalSGD(optimizer, 2, reduce_dtype="bf16")
    local_sgd.broadcast()
    for step in range(6):
        for parameter in (kept, removed):
            parameter.grad = torch.full((600,), -(1.0 + 2.0**-10) * (1 + dist.get_rank()))
        optimizer.step()
        local_sgd.step()
        if step == 3:
            optimizer.param_groups.pop(0)
    local_sgd.average()
    return [kept[0].item(), removed[0].item()]


def test_the_residual_of_a_removed_parameter_is_sent_once_more(pool):
    exact = 1.5 * (1.0 + 2.0**-10)
    for outcome in pool.run(remove_owing):
        assert outcome == pytest.approx([100.0 + 6 * exact, 100.0 + 4 * exact], abs=1e-4)


def add_and_freeze() -> list[float]:
    first, added = (nn.Parameter(torch.zeros(6)) for _ in range(2))
    optimizer = torch.optim.SGD([first], lr=1.0)
    local_sgd = LocalSGD(optimizer, 4)
    local_sgd.broadcast()
    for step in range(8):
        if step == 5:
            optimizer.add_param_group({"params": [added]})
        if step == 7:
            added.requires_grad_(False)
        for parameter in (first, added):
            parameter.grad = torch.full((6,), -1.0 - dist.get_rank()) if parameter.requires_grad else None
        optimizer.step()
        local_sgd.step()
    return added.tolist()


def test_a_parameter_added_and_frozen_before_the_next_round_is_averaged(pool):
    assert pool.run(add_and_freeze) == [[3.0] * 6] * 2


def share_one(options: dict, stepping: tuple[int, ...] = (0, 1), leave: bool = False) -> list[float]:
    shared = nn.Parameter(torch.zeros(6))
    optimizers = [torch.optim.SGD([shared], lr=1.0) for _ in range(2)]
    owners: dict = {}
    both = [LocalSGD(optimizer, 3, owners=owners, index=i, **options) for i, optimizer in enumerate(optimizers)]
    for local_sgd in both:
        local_sgd.broadcast()
    for step in range(10):
        for local_sgd in (both[index] for index in stepping):
            if leave and step == 5:
                optimizers[0].param_groups[:] = [{**optimizers[0].param_groups[0], "params": []}]
            shared.grad = torch.full((6,), -1.0 - dist.get_rank())
            local_sgd.optimizer.step()
            local_sgd.step()
    if leave:
        shared.requires_grad_(False)
    for local_sgd in both:
        local_sgd.average()
    return shared.tolist()


@pytest.mark.parametrize("options", [{}, {"overlap": 1}, {"overlap": 2, "stagger": True}], ids=str)
def test_a_parameter_of_two_optimizers_is_corrected_once(pool, options):
    assert pool.run(share_one, options) == [pytest.approx([1.5 * 20] * 6)] * 2
    assert pool.run(share_one, options, (1,)) == [pytest.approx([1.5 * 10] * 6)] * 2
    assert pool.run(share_one, options, (1,), True) == [pytest.approx([1.5 * 10] * 6)] * 2
    outcomes = pool.run(share_one, options, (0, 1), True)  # optimizer 0 no longer has it, and keeps stepping
    assert outcomes[0] == outcomes[1] == pytest.approx([1.5 * 15] * 6, abs=7.5)


def resume(resumed: bool) -> list[float]:
    """Momenta are reset at every round; looking ahead depends on when that was, before a checkpoint and after it."""
    rank = dist.get_rank()

    def build(start: torch.Tensor) -> LocalSGD:
        optimizer = torch.optim.SGD([nn.Parameter(start)], lr=0.1, momentum=0.9, nesterov=True)
        return LocalSGD(optimizer, 3, overlap=2, optimizer_state="reset")

    def train(local_sgd: LocalSGD, steps: range) -> torch.Tensor:
        (parameter,) = local_sgd.optimizer.param_groups[0]["params"]
        for step in steps:
            parameter.grad = torch.full((8,), float((step + 3 * rank) % 5))
            local_sgd.optimizer.step()
            local_sgd.step()
        return parameter

    local_sgd = build(torch.zeros(8))
    parameter = train(local_sgd, range(7))
    local_sgd.average("checkpoint")
    if resumed:
        state, optimizer_state = local_sgd.state_dict(), local_sgd.optimizer.state_dict()
        local_sgd = build(parameter.detach().clone())
        local_sgd.optimizer.load_state_dict(optimizer_state)
        local_sgd.load_state_dict(state)
        local_sgd.mark_synchronized()
    return train(local_sgd, range(7, 16)).tolist()


def test_a_resumed_run_looks_ahead_like_one_that_has_not_stopped(pool):
    assert pool.run(resume, True) == pool.run(resume, False)
