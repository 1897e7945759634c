import pytest
import torch
import torch.distributed as dist

from lightning_adpsgd.averaging.averager import ParameterAverager
from lightning_adpsgd.averaging.layout import Bucket, FlatLayout
from lightning_adpsgd.workers.group import WorkerGroup

pytestmark = pytest.mark.workers

SHAPES = [(7,), (3, 5), (), (2, 3, 4, 5), (1, 1), (64,)]
GROUPS = [0, 0, 0, 1, 1, None]


def tensors_of(rank: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]
    tensors[3] = tensors[3].to(memory_format=torch.channels_last)
    return tensors


def average(dtype: torch.dtype, bucket_bytes: int) -> dict:
    tensors = tensors_of(dist.get_rank(), dtype)
    pointers = [tensor.data_ptr() for tensor in tensors]
    averager = ParameterAverager(FlatLayout(tensors, GROUPS), 2, WorkerGroup(), bucket_bytes)
    deviations = averager.average()
    return {
        "tensors": tensors,
        "deviations": deviations,
        "in_place": pointers == [tensor.data_ptr() for tensor in tensors],
    }


@pytest.mark.parametrize("bucket_bytes", [4, 36, 100, 4096], ids=lambda size: f"{size}-byte buckets")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=str)
def test_tensors_become_their_mean_and_deviations_from_it_are_measured(pool, dtype, bucket_bytes):
    workers = 3
    before = [tensors_of(rank, dtype) for rank in range(workers)]
    wide = torch.complex128 if dtype.is_complex else torch.float64
    outcomes = pool.run(average, dtype, bucket_bytes, workers=workers)
    for index in range(len(SHAPES)):
        expected = torch.stack([tensors[index].to(wide) for tensors in before]).mean(dim=0)
        for outcome in outcomes:
            torch.testing.assert_close(outcome["tensors"][index], expected.to(dtype))
            # bit for bit the same on all ranks
            assert torch.equal(outcome["tensors"][index], outcomes[0]["tensors"][index])
    for rank, outcome in enumerate(outcomes):
        expected = torch.zeros(2, dtype=torch.float64)
        for index, group in enumerate(GROUPS):
            if group is not None:
                mean = torch.stack([tensors[index].to(wide) for tensors in before]).mean(dim=0)
                expected[group] += (before[rank][index].to(wide) - mean).abs().square().sum()
        torch.testing.assert_close(outcome["deviations"], expected, rtol=1e-5, atol=0)
        assert outcome["in_place"]


def small_drift() -> dict:
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(2_000_000, generator=generator)
    generator.manual_seed(dist.get_rank() + 1)
    tensor = common + 1e-4 * torch.randn(2_000_000, generator=generator)
    before = tensor.double()
    deviations = ParameterAverager(FlatLayout([tensor], [0]), 1, WorkerGroup(), 2**20).average()
    return {"before": before, "deviation": deviations.item()}


def test_a_small_drift_of_many_parameters_is_measured_without_cancellation(pool):
    outcomes = pool.run(small_drift, workers=2)
    mean = (outcomes[0]["before"] + outcomes[1]["before"]) / 2
    for outcome in outcomes:
        assert outcome["deviation"] == pytest.approx((outcome["before"] - mean).square().sum().item(), rel=1e-3)


class CountingLayout(FlatLayout):
    """Counts the buffers that are made."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.made: list[int] = []

    def new_buffer(self, bucket: Bucket, device: torch.device | str = "cpu") -> torch.Tensor:
        self.made.append(len(bucket))
        return super().new_buffer(bucket, device)


def count_buffers(elements: int) -> list[int]:
    tensors = [torch.randn(elements // 4) for _ in range(4)]
    layout = CountingLayout(tensors, [0] * len(tensors))
    ParameterAverager(layout, 1, WorkerGroup(), 400).average()
    return layout.made


@pytest.mark.parametrize("elements", [400, 40_000])
def test_two_bucket_buffers_are_made_whatever_the_models_size(pool, elements):
    assert pool.run(count_buffers, elements, workers=2) == [[100, 100], [100, 100]]
