import contextlib
import math
import time
import warnings
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_adpsgd import WorkerGroup
from lightning_adpsgd.workers.group import CollectiveError, HostRows, Patience, Reduction

pytestmark = pytest.mark.workers


def mean_of_ranks() -> dict:
    workers = WorkerGroup()
    buffer = torch.arange(5.0) * (workers.rank + 1)
    storage = buffer.data_ptr()
    result = workers.mean_(buffer).wait()
    small = workers.mean(torch.tensor([1.0, 2.0]) * workers.rank)
    return {
        "mean": result,
        "in_place": result.data_ptr() == storage,
        "small": small,
        "bytes": workers.payload_bytes,
        "size": workers.size,
    }


def test_mean_is_that_of_all_ranks_and_in_place(pool):
    for outcome in pool.run(mean_of_ranks, workers=3):
        torch.testing.assert_close(outcome["mean"], torch.arange(5.0) * 2)
        torch.testing.assert_close(outcome["small"], torch.tensor([1.0, 2.0], dtype=torch.float64))
        assert outcome["in_place"]
        assert outcome["size"] == 3


def test_every_byte_put_into_a_collective_is_counted(pool):
    # five fp32 elements, and two as float64
    assert [outcome["bytes"] for outcome in pool.run(mean_of_ranks, workers=3)] == [5 * 4 + 2 * 8] * 3


def largest_values() -> torch.Tensor:
    largest = torch.finfo(torch.float32).max
    return WorkerGroup().mean_(torch.full((3,), largest)).wait() / largest


def test_mean_of_the_largest_numbers_does_not_overflow(pool):
    for mean in pool.run(largest_values, workers=2):
        torch.testing.assert_close(mean, torch.ones(3))


def table_of_ranks() -> torch.Tensor:
    rank = dist.get_rank()
    return WorkerGroup().table([rank, 2**48 - rank, float(rank == 1)])


def test_table_holds_every_ranks_row_exactly(pool):
    for table in pool.run(table_of_ranks, workers=4):
        assert table.tolist() == [[r, 2**48 - r, float(r == 1)] for r in range(4)]


def broadcast_from_first() -> list:
    rank = dist.get_rank()
    tensors = [torch.full((2, 3), float(rank)), torch.full((3, 2), float(rank)).t()]
    pointers = [tensor.data_ptr() for tensor in tensors]
    WorkerGroup().broadcast_(tensors)
    return [tensors, pointers == [tensor.data_ptr() for tensor in tensors]]


def test_broadcast_overwrites_in_place_with_the_first_workers_tensors(pool):
    for tensors, same_storage in pool.run(broadcast_from_first, workers=3):
        assert all((tensor == 0).all() for tensor in tensors)
        assert same_storage


def words_left_behind() -> dict:
    workers = WorkerGroup()
    if workers.rank > 0:
        workers.post_status(f"had enough of rank {workers.rank}")
    dist.barrier()
    workers.abort()
    words, answered = workers.words(seconds=0.2)
    stayed = []
    for _ in range(2):
        begun = time.monotonic()
        workers.stay(seconds=20.0)
        stayed.append(time.monotonic() - begun)
    return {"words": words, "answered": answered, "stayed": stayed}


def test_words_are_found_once_the_connections_are_closed_and_nobody_waits_for_those_who_have_heard(pool):
    outcomes = pool.run(words_left_behind, workers=3)
    first, second, third = (outcome["words"] for outcome in outcomes)
    assert first == {1: "had enough of rank 1", 2: "had enough of rank 2"}
    assert second == {2: "had enough of rank 2"}
    assert third == {1: "had enough of rank 1"}
    assert all(outcome["answered"] and max(outcome["stayed"]) < 20.0 for outcome in outcomes)


def silence_of_the_others() -> list[float]:
    workers = WorkerGroup()
    stayed = []
    for _ in range(2 if workers.rank == 0 else 0):
        begun = time.monotonic()
        workers.stay(seconds=0.4)
        stayed.append(time.monotonic() - begun)
    return stayed


def test_first_worker_stays_once_for_those_who_say_nothing(pool):
    stayed, _ = pool.run(silence_of_the_others)
    assert stayed[0] >= 0.4 > stayed[1]


def test_a_single_process_sends_nothing():
    workers = WorkerGroup()
    buffer = torch.ones(3)
    assert workers.size == 1
    assert workers.mean_(buffer).wait() is buffer
    assert workers.table([1.0, 2.0]).tolist() == [[1.0, 2.0]]
    assert workers.gather_objects("x") == ["x"]
    workers.broadcast_([buffer])
    assert workers.payload_bytes == 0


# What a broadcast can carry


def tensors_of_all_types(rank: int) -> dict[str, torch.Tensor]:
    """One of each type that torch can make and copy, with bytes that differ between ranks."""
    made = {}
    types = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    for name, dtype in sorted(types.items()):
        with contextlib.suppress(RuntimeError, NotImplementedError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some types are experimental
            if not torch.empty(0, dtype=dtype).is_quantized:
                size = torch.empty(0, dtype=dtype).element_size()
                made[name] = torch.full((6 * size,), rank, dtype=torch.uint8).view(dtype).view(2, 3)
    ones = torch.full((3, 2), float(rank))
    return made | {
        "not contiguous": ones.t(),
        "conjugate": torch.complex(ones, ones).conj(),
        "negative": torch.complex(ones, ones).conj().imag,
        "of no dimension": torch.tensor(rank, dtype=torch.int16),
        "empty": torch.empty(0, 3, dtype=torch.uint16),
        "a parameter": nn.Parameter(ones.clone()),
    }


def broadcast_all_types() -> tuple[list[str], list[str]]:
    mine, first = tensors_of_all_types(dist.get_rank()), tensors_of_all_types(0)
    pointers = {name: tensor.data_ptr() for name, tensor in mine.items()}
    WorkerGroup().broadcast_(mine.values())
    assert pointers == {name: tensor.data_ptr() for name, tensor in mine.items()}
    return sorted(mine), [name for name, tensor in mine.items() if as_bytes(tensor) != as_bytes(first[name])]


def as_bytes(tensor: torch.Tensor) -> list[int]:
    return tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8).tolist()


def test_broadcast_carries_whatever_torch_can_make(pool):
    for names, wrong in pool.run(broadcast_all_types):
        assert wrong == []
        assert len(names) > 30
        assert {"torch.bool", "torch.int16", "torch.uint16", "torch.float8_e4m3fn", "torch.bfloat16"} < set(names)


# A process group without a name


def hang_up_without_a_name() -> dict:
    dist.init_process_group(timeout=timedelta(seconds=30))
    workers = WorkerGroup()
    rounded = torch.ones(5, dtype=torch.bfloat16)
    total = workers.sum_rounded(rounded, lambda _, total: total.bfloat16(), torch.float32, torch.zeros(5)).wait()
    begun = time.monotonic()
    if workers.rank == 0:
        workers.abort()
    else:
        with pytest.raises(CollectiveError):
            workers.table([0.0])
    return {"total": total.tolist(), "connected": dist.is_initialized(), "seconds": time.monotonic() - begun}


def test_connections_of_a_group_that_was_made_without_naming_a_backend_are_closed_at_once(pool):
    outcomes = pool.run_trainer(hang_up_without_a_name)
    assert [outcome["total"] for outcome in outcomes] == [[2.0] * 5] * 2
    assert not outcomes[0]["connected"]
    assert outcomes[1]["seconds"] < 20.0


def test_with_nccl_connections_are_aborted(monkeypatch):
    # There is no GPU to do it with: what torch is asked for.
    done = []
    workers = WorkerGroup(device="cuda")
    workers.size = 2
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend_config", lambda group=None: "cpu:gloo,cuda:nccl")
    monkeypatch.setattr(dist, "destroy_process_group", lambda: done.append("destroyed"))
    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", lambda: done.append("aborted"))
    workers.abort()
    assert done == ["aborted"]
    workers.device = torch.device("cpu")
    workers.abort()
    assert done == ["aborted", "destroyed"]


# Connections of their own


def close_what_was_opened() -> dict:
    workers = WorkerGroup()
    groups = dist.distributed_c10d._world.pg_map
    before = len(groups)
    carrier = workers.new_async_group()
    opened = len(groups)
    carrier.table([1.0])
    carrier.close()
    carrier.close()
    workers.close()
    with pytest.raises((CollectiveError, ValueError), match=r"were closed|_Closed"):  # torch may find it out first
        carrier.sum_(torch.ones(3))
    return {"groups": [opened - before, len(groups) - before], "table": workers.table([1.0]).tolist()}


def test_connections_of_their_own_are_closed_and_those_of_the_caller_are_not(pool):
    for outcome in pool.run(close_what_was_opened):
        assert outcome == {"groups": [1, 0], "table": [[1.0], [1.0]]}


# What a device does together with others: events, clock and words are played here


class Device:
    """Comes to its events at a time, and has a clock."""

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


def test_who_waits_for_a_device_notices_its_end_soon():
    assert wait_with(Device(done_at=0.0)) == 0.0
    assert wait_with(Device(done_at=1e-3)) < 1.2e-3
    assert wait_with(Device(done_at=50.0)) < 50.002


def test_a_device_that_does_not_come_to_its_end_is_waited_for_until_the_time_is_up():
    device = Device()
    with pytest.raises(CollectiveError, match="has not ended after 60 s"):
        wait_with(device)
    assert 60.0 <= device.now < 60.1
    assert max(device.naps) <= 1e-3
    device.now = 55.0  # what was begun at 0 has five seconds left
    with pytest.raises(CollectiveError):
        wait_with(device)
    assert device.now < 60.2


def test_a_failure_of_another_worker_ends_the_waiting_unless_it_had_done_its_part():
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


def test_an_error_of_this_workers_own_device_is_not_told_as_somebody_elses():
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


def wait_for_one_that_has_failed() -> tuple[str, float]:
    workers = WorkerGroup()
    workers.post_status("failed in another run", failed=True)
    dist.barrier()
    workers.clear_status()
    begun = time.monotonic()
    if workers.rank == 1:
        workers.post_status("had ended training")
        time.sleep(1.5)  # who has ended well, or failed in another run, is waited for
        workers.post_status("had failed at step 2: ValueError: boom", failed=True)
        return "", 0.0
    with pytest.raises(CollectiveError) as caught:
        workers.patience.wait_for(Device(), begun)
    return str(caught.value), time.monotonic() - begun


def test_those_who_wait_for_a_device_hear_of_failures_of_this_run_alone(pool):
    (told, seconds), *_ = pool.run(wait_for_one_that_has_failed)
    assert told == "rank 1 has failed meanwhile"
    assert 3.5 < seconds < 30.0


def test_rows_on_the_host_are_used_again_once_they_are_copied():
    rows, first = HostRows(torch.device("cpu")), Device(done_at=1.0)
    row = rows.borrow(5)
    rows.give_back(row, first)
    other = rows.borrow(5)  # the first is being read
    assert other.data_ptr() != row.data_ptr()
    rows.give_back(other, Device(done_at=0.0))
    first.now = 2.0
    assert {rows.borrow(5).data_ptr() for _ in range(2)} == {row.data_ptr(), other.data_ptr()}
    assert rows.borrow(5).data_ptr() not in (row.data_ptr(), other.data_ptr())
    assert len(rows.borrow(3)) == 3
