import time

import pytest
import torch
import torch.distributed as dist

from lightning_adpsgd import Workers

pytestmark = pytest.mark.workers


def mean_of_ranks() -> dict:
    workers = Workers()
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
    return Workers().mean_(torch.full((3,), largest)).wait() / largest


def test_mean_of_the_largest_numbers_does_not_overflow(pool):
    for mean in pool.run(largest_values, workers=2):
        torch.testing.assert_close(mean, torch.ones(3))


def table_of_ranks() -> torch.Tensor:
    rank = dist.get_rank()
    return Workers().table([rank, 2**48 - rank, float(rank == 1)])


def test_table_holds_every_ranks_row_exactly(pool):
    for table in pool.run(table_of_ranks, workers=4):
        assert table.tolist() == [[r, 2**48 - r, float(r == 1)] for r in range(4)]


def broadcast_from_first() -> list:
    rank = dist.get_rank()
    tensors = [torch.full((2, 3), float(rank)), torch.full((3, 2), float(rank)).t()]
    pointers = [tensor.data_ptr() for tensor in tensors]
    Workers().broadcast_(tensors)
    return [tensors, pointers == [tensor.data_ptr() for tensor in tensors]]


def test_broadcast_overwrites_in_place_with_the_first_workers_tensors(pool):
    for tensors, same_storage in pool.run(broadcast_from_first, workers=3):
        assert all((tensor == 0).all() for tensor in tensors)
        assert same_storage


def words_left_behind() -> dict:
    workers = Workers()
    if workers.rank > 0:
        workers.leave_word(f"had enough of rank {workers.rank}")
    dist.barrier()
    workers.hang_up()
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
    workers = Workers()
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
    workers = Workers()
    buffer = torch.ones(3)
    assert workers.size == 1
    assert workers.mean_(buffer).wait() is buffer
    assert workers.table([1.0, 2.0]).tolist() == [[1.0, 2.0]]
    assert workers.gather_objects("x") == ["x"]
    workers.broadcast_([buffer])
    assert workers.payload_bytes == 0
