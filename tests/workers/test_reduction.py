import math
from collections.abc import Callable

import pytest
import torch

from lightning_adpsgd import NodeWorkerGroup, WorkerGroup
from lightning_adpsgd.workers import reduction
from lightning_adpsgd.workers.reduction import CollectiveError, Patience, Reduction

# What is encoded


class Ended:
    """A piece of work that ends with an error."""

    def __init__(self) -> None:
        self.ended = False

    def is_completed(self) -> bool:
        return self.ended

    def wait(self) -> None:
        raise RuntimeError("connection closed by peer")


def test_an_error_found_in_passing_is_raised_where_the_result_is_needed(monkeypatch):
    work = Ended()
    monkeypatch.setattr(torch.distributed, "all_to_all_single", lambda *_, **__: work)
    monkeypatch.setattr(reduction, "backend_of", lambda *_: "gloo")
    exchange = reduction.Exchange(torch.zeros(2, 3, dtype=torch.uint8), lambda rows: rows[0], None)
    assert not exchange.advance_if_ready()
    work.ended = True
    for _ in range(2):
        assert not exchange.advance_if_ready()
    for call in (exchange.advance, exchange.wait):
        with pytest.raises(CollectiveError, match="connection closed by peer"):
            call()


def exchange_rows(ranks_per_node: int, length: int) -> dict:
    """Every rank sends bytes that name sender and receiver; what is combined has another length."""
    workers = NodeWorkerGroup(ranks_per_node) if ranks_per_node > 1 else WorkerGroup()
    mine, residual = workers.worker_of(workers.rank), torch.zeros(length)
    shares, residuals = workers.shares(torch.arange(length)), workers.shares(residual)
    rows = torch.stack([torch.tensor([mine, rank, len(share)]) for rank, share in enumerate(shares)]).to(torch.uint8)
    received = []

    def combine(rows: torch.Tensor) -> torch.Tensor:
        received.append(rows.tolist())
        residuals[workers.rank] += workers.rank + 1
        return torch.tensor([int(rows[:, 0].sum()), workers.rank], dtype=torch.uint8)

    before = workers.payload_bytes
    under_way = workers.exchange(rows, combine, residuals, [10 * len(share) for share in shares])
    assert not received
    under_way.advance()
    under_way.advance()
    assert under_way.advance_if_ready()
    result = under_way.wait()
    assert torch.equal(under_way.wait(), result)
    return {
        "shares": [share.tolist() for share in shares],
        "received": received,
        "result": result.tolist(),
        "residuals": [part.tolist() for part in residuals],
        "bytes": workers.payload_bytes - before,
    }


@pytest.mark.workers
@pytest.mark.parametrize("length", [1, 7, 12])
@pytest.mark.parametrize(("ranks", "ranks_per_node"), [(3, 1), (4, 2), (6, 2)], ids=str)
def test_each_rank_combines_its_share_of_what_all_workers_send_and_all_get_all_shares(
    pool, ranks, ranks_per_node, length
):
    outcomes, workers = pool.run(exchange_rows, ranks_per_node, length, workers=ranks), ranks // ranks_per_node
    shares = outcomes[0]["shares"]
    assert sorted(element for share in shares for element in share) == [*range(length)]
    assert max(map(len, shares)) == len(shares[0])
    for rank, outcome in enumerate(outcomes):
        assert outcome["received"] == [[[worker, rank, len(shares[rank])] for worker in range(workers)]]
        assert outcome["result"] == [[sum(range(workers)), each] for each in range(ranks)]
        node = rank // ranks_per_node
        for each, residual in enumerate(outcome["residuals"]):
            known = each // ranks_per_node == node  # to all ranks of the node, as they hold the same replica
            assert residual == [each + 1 if known else 0] * len(shares[each])
    for node in range(workers):
        sent = [outcome["bytes"] for outcome in outcomes[node * ranks_per_node : (node + 1) * ranks_per_node]]
        assert sum(sent) == 10 * length
        assert max(sent) - min(sent) <= 10


# Waiting for a device and for peers: events, clock and statuses are simulated


class Device:
    """Reaches its events at a set time, and has a clock."""

    def __init__(self, done_at: float = math.inf, fails_at: float = math.inf) -> None:
        self.now, self.done_at, self.fails_at = 0.0, done_at, fails_at
        self.naps: list[float] = []

    def query(self) -> bool:
        if self.now >= self.fails_at:
            raise RuntimeError("CUDA error: device-side assert triggered")
        return self.now >= self.done_at

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.naps.append(seconds)
        self.now += seconds + 1e-5


def wait_with(device: Device, failed: Callable[[], str | None] = lambda: None, begun: float = 0.0) -> float:
    Patience(60.0, failed, device.clock, device.sleep).wait_for(device, begun)
    return device.now


def test_a_wait_for_a_device_ends_soon_after_the_device_is_done():
    assert wait_with(Device(done_at=0.0)) == 0.0
    assert wait_with(Device(done_at=1e-3)) < 1.2e-3
    assert wait_with(Device(done_at=50.0)) < 50.002


def test_a_device_that_does_not_end_is_waited_for_until_the_timeout():
    device = Device()
    with pytest.raises(CollectiveError, match="has not ended after 60 s"):
        wait_with(device)
    assert 60.0 <= device.now < 60.1
    assert max(device.naps) <= 1e-3
    device.now = 55.0  # what was begun at 0 has five seconds left
    with pytest.raises(CollectiveError):
        wait_with(device)
    assert device.now < 60.2


def test_a_failure_of_another_worker_ends_the_wait_unless_it_had_done_its_part():
    for done_at in (math.inf, 11.5):
        device = Device(done_at)
        asked: list[float] = []

        def failed(device: Device = device, asked: list[float] = asked) -> str | None:
            asked.append(device.now)
            return "rank 3 has failed meanwhile" if device.now > 10.0 else None

        if done_at < math.inf:
            assert wait_with(device, failed) == pytest.approx(done_at, abs=0.01)
        else:
            with pytest.raises(CollectiveError, match="rank 3 has failed meanwhile"):
                wait_with(device, failed)
            assert device.now < 14.0
        assert len(asked) <= 12  # about once per second


def test_an_error_of_this_workers_own_device_is_not_reported_as_another_workers():
    with pytest.raises(RuntimeError, match="device-side assert") as caught:
        wait_with(Device(fails_at=5.0))
    assert not isinstance(caught.value, CollectiveError)
    own = [RuntimeError("CUDA error: an illegal memory access was encountered"), torch.OutOfMemoryError("none left")]
    own += [torch.AcceleratorError("CUDA error: boom")] if hasattr(torch, "AcceleratorError") else []
    for error in own:
        with pytest.raises(type(error)) as caught:
            Reduction(torch.ones(1), Work(error)).wait()
        assert caught.value is error
    with pytest.raises(CollectiveError, match="Connection closed by peer"):
        Reduction(torch.ones(1), Work(RuntimeError("Connection closed by peer"))).wait()


class Work:
    """A collective that fails."""

    def __init__(self, error: RuntimeError) -> None:
        self.error = error

    def wait(self) -> None:
        raise self.error
