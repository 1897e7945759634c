import contextlib
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_adpsgd import WorkerGroup
from lightning_adpsgd.workers.reduction import CollectiveError

pytestmark = pytest.mark.workers


def mean_of_ranks() -> dict:
    workers = WorkerGroup()
    buffer = torch.arange(5.0) * (workers.rank + 1)
    storage = buffer.data_ptr()
    result = workers.sum_(workers.all_contribute.part_(buffer)).wait()
    small = workers.launch_mean([1.0 * workers.rank, 2.0 * workers.rank]).wait()
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
    workers = WorkerGroup()
    return workers.sum_(workers.all_contribute.part_(torch.full((3,), largest))).wait() / largest


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


def test_a_single_process_sends_nothing():
    workers = WorkerGroup()
    buffer = torch.ones(3)
    assert workers.size == 1
    assert workers.sum_(workers.all_contribute.part_(buffer)).wait() is buffer
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


# Connections of their own


def close_what_was_opened() -> dict:
    workers = WorkerGroup()
    groups = dist.distributed_c10d._world.pg_map
    before = len(groups)
    async_group = workers.new_async_group()
    opened = len(groups)
    async_group.table([1.0])
    async_group.close()
    async_group.close()
    workers.close()
    with pytest.raises((CollectiveError, ValueError), match=r"were closed|ClosedGroup"):  # torch may notice first
        async_group.sum_(torch.ones(3))
    return {"groups": [opened - before, len(groups) - before], "table": workers.table([1.0]).tolist()}


def test_connections_of_their_own_are_closed_and_those_of_the_caller_are_not(pool):
    for outcome in pool.run(close_what_was_opened):
        assert outcome == {"groups": [1, 0], "table": [[1.0], [1.0]]}
