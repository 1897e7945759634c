import pytest
import torch
import torch.distributed as dist

from lightning_adpsgd.averaging.averager import ParameterAverager
from lightning_adpsgd.averaging.layout import FlatLayout
from lightning_adpsgd.averaging.staged import StagedMeans
from lightning_adpsgd.workers.group import WorkerGroup
from tests.averaging.test_averager import GROUPS, tensors_of


def stage(rank_dtype: torch.dtype, moved: float) -> dict:
    tensors, others = (tensors_of(dist.get_rank(), rank_dtype) for _ in range(2))
    group = WorkerGroup()
    means = StagedMeans(ParameterAverager(FlatLayout(tensors, GROUPS), 2, group, 100), group)
    deviations = means.deviations()
    untouched = all(map(torch.equal, tensors, others))
    if moved:
        means.keep_sent()
        for tensor in tensors:
            tensor.add_(moved)
        means.write_late()
    else:
        means.write()
    at_once = ParameterAverager(FlatLayout(others, GROUPS), 2, group, 100).average()
    return {"untouched": untouched, "tensors": tensors, "deviations": deviations, "others": (others, at_once)}


@pytest.mark.workers
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("workers", [2, 3])
def test_staged_means_are_those_of_a_round_at_once_bit_for_bit_and_overwrite_nothing_before(pool, workers, dtype):
    for outcome in pool.run(stage, dtype, 0.0, workers=workers):
        expected, deviations = outcome["others"]
        assert outcome["untouched"]
        assert all(map(torch.equal, outcome["tensors"], expected))
        assert torch.equal(outcome["deviations"], deviations)


@pytest.mark.workers
def test_means_that_are_written_late_keep_later_steps(pool):
    for outcome in pool.run(stage, torch.float64, 0.5):
        expected, _ = outcome["others"]
        for tensor, mean, group in zip(outcome["tensors"], expected, GROUPS, strict=True):
            torch.testing.assert_close(tensor, mean if group is None else mean + 0.5)


@pytest.mark.parametrize("ends", [StagedMeans.write, StagedMeans.release])
def test_buffers_serve_the_next_round_but_not_before_they_are_released(ends):
    tensors = [torch.arange(11.0), torch.arange(5.0).double()]  # of two dtypes, so a buffer fits some buckets only
    averager = ParameterAverager(FlatLayout(tensors, [0, None]), 1, WorkerGroup(), bucket_bytes=16)
    in_doubt = StagedMeans(averager, WorkerGroup())
    in_doubt.keep_sent()
    held = [buffer.data_ptr() for buffer in in_doubt._buffers]
    assert len(held) == len({*held})
    between = StagedMeans(averager, WorkerGroup())
    assert not {buffer.data_ptr() for buffer in between._buffers} & {*held}
    ends(in_doubt)
    for _ in range(2):
        following = StagedMeans(averager, WorkerGroup())
        assert [buffer.data_ptr() for buffer in following._buffers] == held
        ends(following)
