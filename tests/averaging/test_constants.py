"""Values that are equal on all workers stay the same, bit for bit, for any number of workers."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_adpsgd import LocalSGD, NodeWorkerGroup
from lightning_adpsgd.averaging.constants import Blocks
from lightning_adpsgd.workers.group import WorkerGroup

pytestmark = pytest.mark.workers

TRANSPORTS = ({}, {"stagger": True, "overlap": 1}, {"overlap": 2}, {"reduce_dtype": "bf16"}, {"bucket_size_mb": 0.01})


class Masked(nn.Module):
    """Parameters and buffers that nothing changes, besides one parameter that every worker trains."""

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
    parameter.data[1] = dist.get_rank()  # so that the block is not equal
    parameter.grad = torch.zeros(2)
    local_sgd.optimizer.step()
    local_sgd.step()
    return parameter[0].item()


def test_a_mean_of_finite_numbers_is_finite(pool):
    assert pool.run(near_the_limit, workers=10) == [torch.finfo(torch.float32).min] * 10


def differ(kind: str) -> tuple[list[list[float]], list[list[float]]]:
    """Blocks that differ between three workers, in ways that a weak fingerprint would miss."""
    rank, count = dist.get_rank(), 60
    generator = torch.Generator().manual_seed(rank)
    if kind == "signs":
        blocks = [(torch.rand(64, generator=generator) > 0.5).float() * 2 - 1 for _ in range(count)]
    elif kind == "powers of two":
        blocks = [torch.zeros(256).index_fill_(0, torch.tensor(32 * rank + k), 2.0**k) for k in range(count)]
    elif kind == "bfloat16":
        blocks = [torch.randn(64, generator=generator).bfloat16().float() for _ in range(count)]
    else:
        shuffled = torch.randperm(256, generator=generator).double()
        blocks = [shuffled.roll(k) for k in range(count)]
    mine = torch.stack(blocks)
    parameters = [nn.Parameter(block) for block in blocks]
    local_sgd = LocalSGD(torch.optim.SGD(parameters, lr=1.0), 1)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    local_sgd.optimizer.step()
    local_sgd.step()
    return mine.tolist(), torch.stack([parameter.detach() for parameter in parameters]).tolist()


@pytest.mark.parametrize("kind", ["signs", "powers of two", "bfloat16", "permuted"])
def test_blocks_that_differ_are_averaged_however_they_differ(pool, kind):
    outcomes = pool.run(differ, kind, workers=3)
    mean = torch.tensor([mine for mine, _ in outcomes], dtype=torch.float64).mean(dim=0)
    for _, after in outcomes:
        torch.testing.assert_close(torch.tensor(after, dtype=torch.float64), mean, rtol=1e-6, atol=1e-6)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocks_end_where_tensors_do_and_a_single_bit_makes_them_differ(dtype):
    values = torch.randn(200_000, dtype=dtype, generator=torch.Generator().manual_seed(0))
    blocks = Blocks(len(values), [0, 5, 4096, 100_000], values.device)
    plain = WorkerGroup()
    before = blocks.fingerprints(values).view(2, -1)
    for place in (0, 4, 5, 4095, 4096, 99_999, 100_000, 199_999):
        changed = values.clone()
        changed.view(torch.int32)[place * values.itemsize // 4] ^= 1
        differs = (blocks.fingerprints(changed).view(2, -1) != before).any(dim=0).nonzero().flatten().tolist()
        assert len(differs) == 1
        assert place in range([0, *blocks._ends][differs[0]], blocks._ends[differs[0]])
    residual = torch.zeros_like(values)
    residual[7] = 1e-30
    kept = torch.zeros_like(values)
    blocks.compare(values, residual, plain).wait().keep(values, kept, 0, len(values))
    assert not kept[5:4096].any()
    assert torch.equal(kept[:5], values[:5])
    assert torch.equal(kept[4096:], values[4096:])
    part = torch.zeros(100)
    blocks.compare(values, residual, plain).wait().keep(values[4090:4190].float(), part, 4090, 4190)
    assert not part[:6].any()
    assert torch.equal(part[6:], values[4096:4190].float())
