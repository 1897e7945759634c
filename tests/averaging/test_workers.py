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


def test_a_single_process_sends_nothing():
    workers = Workers()
    buffer = torch.ones(3)
    assert workers.size == 1
    assert workers.mean_(buffer).wait() is buffer
    assert workers.table([1.0, 2.0]).tolist() == [[1.0, 2.0]]
    assert workers.gather_objects("x") == ["x"]
    workers.broadcast_([buffer])
    assert workers.payload_bytes == 0
