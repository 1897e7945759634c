"""Values that are equal on all workers stay the same, bit for bit, for any number of workers and any order of sums."""

import random

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_adpsgd import LocalSGD, NodeWorkerGroup
from lightning_adpsgd.workers.contribution import Contribution
from lightning_adpsgd.workers.group import WorkerGroup

pytestmark = pytest.mark.workers

TRANSPORTS = ({}, {"stagger": True, "overlap": 1}, {"overlap": 2}, {"reduce_dtype": "bf16"}, {"bucket_size_mb": 0.01})


class Masked(nn.Module):
    """Parameters and buffers that nothing changes, besides every other row of one parameter."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        limits = torch.finfo(torch.float32)
        self.trained = nn.Parameter(torch.randn(70, 100, generator=generator))
        self.unused = nn.Parameter(torch.randn(33, 100, generator=generator))
        self.wide = nn.Parameter(torch.randn(9, generator=generator, dtype=torch.float64))
        self.narrow = nn.Parameter(torch.randn(9, generator=generator).bfloat16())
        self.limits = nn.Parameter(torch.tensor([limits.min, limits.max, 0.1]))
        self.register_buffer("mask", torch.full((5, 5), limits.min).triu(1))
        self.register_buffer("infinite", torch.full((5, 5), -torch.inf).triu(1))
        self.register_buffer("constants", torch.randn(5000, generator=generator))
        self.register_buffer("moving", torch.zeros(3))


def hold(ranks_per_node: int = 1) -> list[list[str]]:
    """The names of the tensors that have changed, for each transport."""
    changed = []
    workers = NodeWorkerGroup(ranks_per_node) if ranks_per_node > 1 else WorkerGroup()
    for options in TRANSPORTS:
        model = Masked()
        start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        local_sgd = LocalSGD(torch.optim.SGD(model.parameters(), lr=0.1), 3, module=model, workers=workers, **options)
        local_sgd.broadcast()
        generator = torch.Generator().manual_seed(workers.worker_of(dist.get_rank()))
        for step in range(14):
            model.trained.grad = torch.randn(70, 100, generator=generator)
            model.trained.grad[::2] = 0
            model.moving += dist.get_rank()
            if step == 8:
                model.mask *= 0.5  # on all workers
            local_sgd.optimizer.step()
            local_sgd.step()
            if step == 9:
                local_sgd.average("validation")
        start["mask"] *= 0.5
        state = model.state_dict()
        changed.append([name for name in start if not torch.equal(state[name], start[name])])
        if not torch.equal(state["trained"][::2], start["trained"][::2]):
            changed[-1].append("rows that nobody trains")
    return changed


@pytest.mark.parametrize("workers", [3, 5, 6, 7, 10])
def test_what_all_workers_hold_alike_stays_bit_for_bit(pool, workers):
    for changed in pool.run(hold, workers=workers):
        assert changed == [["trained", "moving"]] * len(TRANSPORTS)


def test_values_equal_on_all_nodes_stay_bit_for_bit(pool):
    for changed in pool.run(hold, 2, workers=6):
        assert changed == [["trained", "moving"]] * len(TRANSPORTS)


def near_the_limit() -> float:
    parameter = nn.Parameter(torch.full((2,), torch.finfo(torch.float32).min))
    local_sgd = LocalSGD(torch.optim.SGD([parameter], lr=1.0), 1)
    parameter.data[1] = dist.get_rank()  # so that not all is equal
    parameter.grad = torch.zeros(2)
    local_sgd.optimizer.step()
    local_sgd.step()
    return parameter[0].item()


def test_a_mean_of_finite_numbers_is_finite(pool):
    assert pool.run(near_the_limit, workers=10) == [torch.finfo(torch.float32).min] * 10


def drop_one() -> list[float]:
    parameter, model = nn.Parameter(torch.zeros(4)), nn.Module()
    model.register_buffer("mask", torch.tensor([0.1, torch.finfo(torch.float32).min]))
    options = {"module": model, "on_divergence": "drop"}
    local_sgd = LocalSGD(torch.optim.SGD([parameter], lr=1.0), 1, **options)
    parameter.grad = torch.full((4,), float("nan") if dist.get_rank() == 3 else float(dist.get_rank()))
    local_sgd.optimizer.step()
    local_sgd.step()
    return [*model.mask.tolist(), parameter[0].item()]


def test_equal_values_stay_when_a_worker_is_dropped(pool):
    mask = torch.tensor([0.1, torch.finfo(torch.float32).min]).tolist()
    assert pool.run(drop_one, workers=4) == [[*mask, -1.0]] * 4


# The parts and their sums, without processes

SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16, 24, 31, 64, 100, 255, 1000)


def parts(values: torch.Tensor, workers: int) -> list[torch.Tensor]:
    """What each worker sends of its row of ``values``, or of the same values."""
    rows = values.expand(workers, -1) if values.dim() == 1 else values
    return [Contribution(workers, place).part_(row.clone()) for place, row in enumerate(rows)]


def sums(rows: list[torch.Tensor], shuffled: random.Random) -> list[torch.Tensor]:
    """Added up one by one, as a ring does, and in pairs, as a tree does, both in a random order."""
    chain, tree = ([*shuffled.sample(rows, len(rows))] for _ in range(2))
    while len(tree) > 1:
        chain.append(chain.pop() + chain.pop())
        tree.append(tree.pop(0) + tree.pop(0))
    return [chain[0], tree[0]]


def numbers_of_every_kind(dtype: torch.dtype) -> torch.Tensor:
    """Random bits, so numbers of every magnitude, and the ends of the range. No NaN."""
    bits = torch.int32 if dtype == torch.float32 else torch.int64
    limits, ends = torch.finfo(dtype), torch.iinfo(bits)
    generator = torch.Generator().manual_seed(0)
    found = torch.randint(ends.min, ends.max, (20_000,), generator=generator, dtype=bits).view(dtype)
    least = torch.arange(9, dtype=bits).view(dtype)  # the smallest subnormal numbers, and 0
    special = torch.tensor([limits.max, limits.tiny, 1.0, 1 / 3, torch.inf], dtype=dtype)
    found = torch.cat([found[~found.isnan()], least, special, torch.nextafter(special[1:3], special[:2])])
    return torch.cat([found, -found])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("workers", SIZES)
def test_parts_of_equal_numbers_add_up_to_them_bit_for_bit_in_any_order(workers, dtype):
    values, shuffled = numbers_of_every_kind(dtype), random.Random(workers)
    bits = torch.int32 if dtype == torch.float32 else torch.int64
    for _ in range(3):
        for total in sums(parts(values, workers), shuffled):
            differs = total.view(bits) != values.view(bits)
            assert not differs.any(), (values[differs][:5], total[differs][:5])


@pytest.mark.parametrize("workers", SIZES)
def test_parts_of_different_numbers_add_up_to_their_mean(workers):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1000, generator=generator) + 0.01 * torch.randn(workers, 1000, generator=generator)
    mean = values.double().mean(dim=0)
    for total in sums(parts(values, workers), random.Random(0)):
        errors = (total - mean).abs() / mean.abs().clamp_min(0.01)
        assert errors.median() < 1e-7 * workers**0.5
        assert errors.max() < 2e-6 * workers**0.5
        assert abs(((total - mean) / mean.abs().clamp_min(0.01)).mean()) < 1e-7  # in neither direction


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 10])
def test_a_number_that_is_not_finite_is_none_for_all(workers):
    rows = torch.randn(workers, 4, generator=torch.Generator().manual_seed(0))
    rows[-1] = torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0])
    total = sum(parts(rows, workers))
    assert total[:2].tolist() == [torch.inf, -torch.inf]
    assert torch.isnan(total[2])
    assert torch.isfinite(total[3])


def test_a_worker_that_does_not_contribute_sends_zeros():
    assert Contribution(3, None).part_(torch.tensor([1.0, torch.nan, -torch.inf])).tolist() == [0.0] * 3
