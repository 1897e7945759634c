"""Differences from the last average in 16 bits and fewer, on real processes."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_adpsgd import Codec, IntCodec, LocalSGD
from lightning_adpsgd.averaging.averager import ParameterAverager
from lightning_adpsgd.averaging.codec import CastCodec
from lightning_adpsgd.averaging.layout import FlatLayout
from lightning_adpsgd.workers.group import WorkerGroup
from lightning_adpsgd.workers.nodes import NodeWorkerGroup
from tests.pool import WorkerPool

pytestmark = pytest.mark.workers


def push(dtype: str | None, change: float, steps: int, start: float, forced: bool, options: dict) -> dict:
    """Every worker adds the same change at every step; the second one adds it twice."""
    parameter = nn.Parameter(torch.full((300,), start))
    local_sgd = LocalSGD(torch.optim.SGD([parameter], lr=1.0), 2, reduce_dtype=dtype, **options)
    rounds, history = [], []
    local_sgd.subscribe(rounds.append)
    local_sgd.broadcast()
    for _ in range(steps):
        parameter.grad = torch.full_like(parameter, -change * (1 + dist.get_rank()))
        local_sgd.optimizer.step()
        local_sgd.step()
        history.append(parameter[0].item())
    if forced:
        local_sgd.average("train_end")
    return {"value": parameter.detach(), "rounds": rounds, "history": history}


@pytest.mark.parametrize("options", [{}, {"stagger": True}, {"overlap": 1}, {"stagger": True, "overlap": 1}], ids=str)
@pytest.mark.parametrize(
    (
        "dtype",
        "sent_bytes",
        "owed",
    ),  # of 300 elements: in blocks of 128, two workers' shares; in one round of two steps
    [("bf16", 2 * 300, 2**-6), ("fp16", 2 * 300, 2**-6), ("int8", 4 * 130, 2**-5), ("int4", 4 * 70, 2**-2)],
)
def test_fewer_bytes_travel_and_nothing_is_lost(pool, in_full, dtype, sent_bytes, owed, options):
    # Rounding loses a part of each change that is the same every time: it would add up.
    change = 1.0 + 2.0**-11 + 2.0**-13
    plain = in_full(pool, change, options)
    halved = pool.run(push, dtype, change, 200, 1000.0, False, options)
    assert torch.equal(halved[0]["value"], halved[1]["value"]) or options
    for ours, theirs in zip(halved, plain, strict=True):
        difference = (ours["value"] - theirs["value"]).abs().max().item()
        assert difference < owed  # 100 rounds would add up to many times as much
        assert len(ours["rounds"]) == len(theirs["rounds"])
        sent, would_send = (sum(round_.payload_bytes for round_ in outcome["rounds"]) for outcome in (ours, theirs))
        saved = (4 * 300 - sent_bytes) * len(ours["rounds"])
        # A part of the next round may be under way.
        assert saved <= would_send - sent <= saved + 4 * 300 - sent_bytes


@pytest.fixture(scope="module")
def in_full() -> Callable[..., list]:
    """What rounds in full precision come to, once for each set of options."""
    known: dict[str, list] = {}

    def run(pool: WorkerPool, change: float, options: dict) -> list:
        if str(options) not in known:
            known[str(options)] = pool.run(push, None, change, 200, 1000.0, False, options)
        return known[str(options)]

    return run


def test_without_the_errors_small_parts_would_be_lost(pool):
    outcome, _ = pool.run(push_forgetfully)
    plain, _ = pool.run(push, None, 1.0 + 2.0**-11 + 2.0**-13, 200, 1000.0, False, {})
    assert (outcome["value"] - plain["value"]).abs().max().item() > 2.0**-5


def push_forgetfully() -> dict:
    from lightning_adpsgd.averaging.codec import DeltaCodec

    send = DeltaCodec.send

    def forgetting(self: DeltaCodec, *args: object) -> tuple:
        for error in self._errors.values():
            error.zero_()
        return send(self, *args)

    DeltaCodec.send = forgetting
    try:
        return push("bf16", 1.0 + 2.0**-11 + 2.0**-13, 200, 1000.0, False, {})
    finally:
        DeltaCodec.send = send


def test_what_is_too_large_for_the_type_travels_in_several_rounds(pool):
    for outcome in pool.run(burst):
        assert all(torch.tensor(outcome).isfinite())
        assert outcome == sorted(outcome)
        assert outcome[0] < 1.5e6
        assert outcome[-1] == pytest.approx(1.5e6, rel=1e-3)


def burst() -> list[float]:
    parameter = nn.Parameter(torch.zeros(4))
    local_sgd = LocalSGD(torch.optim.SGD([parameter], lr=1.0), 1, reduce_dtype="fp16")
    local_sgd.broadcast()
    history = []
    for step in range(60):
        parameter.grad = torch.full_like(parameter, -1e6 * (1 + dist.get_rank()) if step == 0 else 0.0)
        local_sgd.optimizer.step()
        local_sgd.step()
        history.append(parameter[0].item())
    return history


@pytest.mark.parametrize("options", [{}, {"stagger": True, "overlap": 1}], ids=str)
def test_rounds_that_others_ask_for_travel_as_they_are_and_settle_what_is_owed(pool, options):
    change = 1.0 + 2.0**-11 + 2.0**-13
    plain = pool.run(push, None, change, 21, 1000.0, True, options)
    halved = pool.run(push, "bf16", change, 21, 1000.0, True, options)
    assert torch.equal(halved[0]["value"], halved[1]["value"])
    assert halved[0]["rounds"][-1].payload_bytes >= 4 * 300
    # The two workers' changes are 1 : 2, of which the sum is rounded too, once per round.
    torch.testing.assert_close(halved[0]["value"], plain[0]["value"], atol=0.02, rtol=0)


def test_without_a_common_start_the_first_round_travels_as_it_is(pool):
    first, second = pool.run(start_apart)[0]
    assert first >= 4 * 1000
    assert second < 2 * 1000 + 500


def start_apart() -> list[int]:
    parameter = nn.Parameter(torch.full((1000,), float(dist.get_rank())))
    local_sgd = LocalSGD(torch.optim.SGD([parameter], lr=1.0), 1, reduce_dtype="bf16")
    rounds = []
    for _ in range(2):
        parameter.grad = torch.ones_like(parameter)
        local_sgd.optimizer.step()
        rounds.append(local_sgd.step())
    assert parameter[0].item() == -1.5
    return [round_.payload_bytes for round_ in rounds]


def settle(kind: str, codec: Codec, cycles: list[int]) -> float:
    """How far a round that travels as it is ends from the mean of all changes, after cycles of so many parts."""
    workers = NodeWorkerGroup(2) if kind == "nodes" else WorkerGroup()
    mine = workers.worker_of(dist.get_rank())
    tensor = torch.zeros(24)
    averager = ParameterAverager(FlatLayout([tensor], [0]), 1, workers, 2**20, codec)
    averager.delta.start()
    total = torch.zeros(24, dtype=torch.float64)
    step = 0
    for parts in cycles:
        for part in range(parts):
            step += 1
            for worker in range(workers.count):
                change = torch.rand(24, generator=torch.Generator().manual_seed(1000 * worker + step))
                total += change.double() / workers.count
                if worker == mine:
                    tensor += change
            in_flight, _ = averager.send(part, parts, workers)
            averager.adopt(in_flight, moved=False)
    averager.average()
    return (tensor.double() - total).abs().max().item()


@pytest.mark.parametrize("cycles", [[1, 1, 1], [3, 3, 3], [3, 4, 5]], ids=str)
@pytest.mark.parametrize("kind", ["devices", "nodes"])
@pytest.mark.parametrize(
    "codec", [CastCodec(torch.bfloat16), IntCodec(8, 6), IntCodec(4, 32)], ids=["bf16", "int8", "int4"]
)
def test_what_is_owed_is_settled_however_the_parts_were_cut(pool, codec, kind, cycles):
    assert max(pool.run(settle, kind, codec, cycles, workers=2 if kind == "devices" else 4)) < 1e-5


def go_on_with_16_bits(dtype: str, options: dict) -> list[torch.Tensor]:
    """Ends of a run that does not stop at its checkpoint, and of one that goes on from it."""
    ends, saved = [], None
    for resumed in (False, True):
        torch.manual_seed(0)
        parameter = nn.Parameter(torch.randn(300).to(torch.bfloat16) if saved is None else saved.clone())
        local_sgd = LocalSGD(torch.optim.SGD([parameter], lr=0.1), 2, reduce_dtype=dtype, **options)
        local_sgd.broadcast()
        for step in range(8 if resumed else 0, 20):
            generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
            parameter.grad = torch.randn(300, generator=generator).to(torch.bfloat16)
            local_sgd.optimizer.step()
            local_sgd.step()
            if step == 7:
                local_sgd.average("checkpoint")
                saved = parameter.detach().clone()
        local_sgd.average("train_end")
        local_sgd.close()
        ends.append(parameter.detach())
    return ends


@pytest.mark.parametrize("options", [{}, {"stagger": True, "overlap": 1}], ids=str)
@pytest.mark.parametrize("dtype", ["bf16", "int4"])
def test_going_on_from_a_checkpoint_of_16_bit_parameters_equals_not_having_stopped(pool, dtype, options):
    for whole, resumed in pool.run(go_on_with_16_bits, dtype, options):
        assert torch.equal(whole, resumed)
