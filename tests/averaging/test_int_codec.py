"""8 and 4 bits per element: what a block becomes, and rounds of them on real processes."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_adpsgd import Codec, IntCodec, LocalSGD
from lightning_adpsgd.averaging.codec import DeltaCodec
from lightning_adpsgd.averaging.layout import FlatLayout
from lightning_adpsgd.workers.group import WorkerGroup
from lightning_adpsgd.workers.nodes import NodeWorkerGroup
from lightning_adpsgd.workers.reduction import Reduction

BITS = pytest.mark.parametrize("bits", [4, 8])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
STEP_OF_BF16 = 2**-7  # of a number: to the next one


def some_values(blocks: int, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A row of blocks whose largest absolute values differ by a factor of up to 1e4."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(blocks, size, generator=generator, dtype=torch.float64)
    return (values * torch.logspace(-2, 2, blocks, dtype=torch.float64)[:, None]).to(dtype).view(1, -1)


def steps_of(codec: IntCodec, values: Tensor) -> Tensor:
    """The exact scale of each element, in 4 bits the smallest multiple that suffices of a 15th of the block's."""
    peaks = values.abs().view(-1, codec.block).amax(dim=1, keepdim=True).double()
    if codec.bits == 4:
        of_groups = values.abs().view(len(peaks), -1, 16).amax(dim=2)
        multiples = (of_groups / peaks * 15).ceil().clamp(1, 15)
        peaks = (peaks / 15 * multiples).repeat_interleave(16, dim=1)
    return (peaks / (2 ** (codec.bits - 1) - 1)).expand(-1, codec.block).reshape(values.shape)


# Blocks


@BITS
@DTYPES
@pytest.mark.parametrize("size", [32, 96, 128])
@pytest.mark.parametrize("magnitude", [1e-30, 1e-8, 1.0, 1e30])
def test_each_element_is_off_by_half_a_step_at_most(bits, dtype, size, magnitude):
    codec = IntCodec(bits, size)
    values = magnitude * some_values(50, size, dtype)
    decoded = codec.decode(codec.encode(values), dtype)
    assert decoded.dtype == dtype
    halves = steps_of(codec, values) * (1 + STEP_OF_BF16) / 2
    assert ((decoded - values).abs() <= halves).all()
    assert (decoded != 0).any(), "something has to arrive"


@BITS
def test_scales_are_rounded_up_by_less_than_a_step_of_bf16_and_nothing_is_clipped(bits):
    codec = IntCodec(bits, 32)
    peaks = torch.linspace(1.0, 4.0, 10_001)
    values = torch.cat([peaks[:, None], torch.zeros(10_001, 31)], dim=1).view(1, -1)
    decoded = codec.decode(codec.encode(values), torch.float32).view(-1, 32)[:, 0]
    rows = codec.encode(values).view(10_001, -1)
    units = rows[:, -2:].contiguous().view(torch.bfloat16).double()[:, 0]
    scales, largest_code = (15 * units, 7) if bits == 4 else (units, 127)
    ratio = scales * largest_code / peaks.double()
    assert ratio.min() >= 1 - 1e-6
    assert ratio.max() <= 1 + 1.01 * STEP_OF_BF16
    assert ((decoded - peaks).abs() <= scales / 2).all()


@BITS
@DTYPES
def test_a_block_of_zeros_stays_one_and_touches_no_other(bits, dtype):
    codec = IntCodec(bits, 32)
    block = torch.randn(32, dtype=dtype)
    block[::3] = 0.0
    values = torch.cat([torch.zeros(32, dtype=dtype), block, torch.full((32,), -0.0, dtype=dtype)])[None]
    decoded = codec.decode(codec.encode(values), dtype)
    assert not decoded[0, :32].any()
    assert not decoded[0, 64:].any()
    assert not decoded[0, 32:64:3].any()
    alone = codec.decode(codec.encode(block[None]), dtype)
    assert torch.equal(decoded[:, 32:64], alone)


@DTYPES
def test_neighbours_that_change_little_have_a_finer_scale_in_4_bits(dtype):
    codec = IntCodec(4, 64)
    sizes = torch.tensor([1.0, 0.1, 0.5, 1e-6], dtype=dtype).repeat_interleave(16)
    values = sizes * torch.linspace(-1.0, 1.0, 64, dtype=dtype).roll(31)
    left = values.clone()[None]
    codec.encode_(left, codec.encode(left))
    for group, multiple in enumerate((15, 2, 8, 1)):
        errors = left[0, 16 * group : 16 * (group + 1)].abs()
        assert errors.max().item() <= multiple / 15 / 7 / 2 * (1 + STEP_OF_BF16)


@BITS
def test_a_constant_arrives_as_a_constant(bits):
    codec = IntCodec(bits, 32)
    decoded = codec.decode(codec.encode(torch.full((1, 64), -0.3)), torch.float32)
    assert decoded.unique().numel() == 1
    assert decoded[0, 0].item() == pytest.approx(-0.3, rel=0.5 / (2 ** (bits - 1) - 1))


def test_two_numbers_in_a_byte_are_told_apart_whatever_they_are():
    codec = IntCodec(4, 32)
    pairs = torch.cartesian_prod(torch.arange(-7.0, 8), torch.arange(-7.0, 8))
    # An element shares a byte with the one that is 16 further, and here it has the same scale in all blocks.
    values = torch.zeros(225, 32)
    values[:, 0], values[:, 16], values[:, 1], values[:, 17] = pairs[:, 0], pairs[:, 1], 7.0, 7.0
    decoded = codec.decode(codec.encode(values.view(1, -1)), torch.float32).view(225, 32)
    assert torch.equal((decoded * 7 / decoded[:, 1:2]).round(), values)
    # So do the multiples of the two groups' scales.
    peaks = torch.cartesian_prod(torch.arange(1.0, 16), torch.arange(1.0, 16))
    values = torch.zeros(225, 64)
    values[:, 0], values[:, 32], values[:, 16] = peaks[:, 0], peaks[:, 1], 15.0
    decoded = codec.decode(codec.encode(values.view(1, -1)), torch.float32).view(225, 64)
    assert torch.equal((decoded * 15 / decoded[:, 16:17]).round(), values)


@DTYPES
@BITS
def test_smallest_and_largest_numbers_become_nothing_that_is_not_finite(bits, dtype):
    codec, info = IntCodec(bits, 32), torch.finfo(torch.float32)
    values = torch.zeros(4, 32, dtype=dtype)
    pairs = [[info.max, -info.max], [info.tiny, 0], [1e-45, -1e-45], [1e-38, 1e38]]
    values[:, :2] = torch.tensor(pairs, dtype=dtype)
    decoded = codec.decode(codec.encode(values), dtype)
    assert decoded.isfinite().all()
    assert decoded[0, 0].item() == pytest.approx(info.max, rel=0.01)
    assert decoded[3, 1].item() == pytest.approx(1e38, rel=0.01)


@BITS
def test_what_is_beyond_fp32_arrives_in_several_rounds(bits):
    codec = IntCodec(bits, 32)
    left = torch.tensor([[1e39, -1e39] + 30 * [0.0]], dtype=torch.float64)
    for _ in range(12):
        encoded = codec.encode(left)
        left = left - codec.decode(encoded, torch.float64)
    assert left.abs().max() < 1e38


@pytest.mark.parametrize(
    ("bits", "size", "expected"), [(4, 128, 70), (8, 128, 130), (4, 64, 36), (8, 2, 4), (4, 32, 19)]
)
def test_a_block_takes_its_codes_and_scales_and_two_bytes(bits, size, expected):
    encoded = IntCodec(bits, size).encode(torch.randn(3, 5 * size))
    assert encoded.shape == (3, 5 * expected)
    assert encoded.dtype == torch.uint8
    assert encoded.is_contiguous()


@BITS
@DTYPES
@pytest.mark.parametrize("size", [32, 96, 128])
def test_what_is_done_in_one_go_is_what_encoding_and_decoding_do(bits, dtype, size):
    codec = IntCodec(bits, size)
    values = some_values(9, size, dtype)
    kept = values.clone()
    encoded = codec.encode(values)
    assert torch.equal(values, kept), "encode leaves its argument alone"
    for row_offset in (0, 1):  # rows may begin anywhere
        in_place, in_two = values.clone(), values.clone()
        storage = torch.zeros(encoded.numel() + 1, dtype=torch.uint8)
        into = storage[row_offset : row_offset + encoded.numel()][None]
        codec.encode_(in_place, into)
        Codec.encode_(codec, in_two, torch.zeros_like(encoded))
        assert torch.equal(into, encoded)
        assert torch.equal(in_place, in_two)
        added, added_in_two = kept.clone(), kept.clone()
        codec.add_decoded_(into, added)
        Codec.add_decoded_(codec, encoded, added_in_two)
        torch.testing.assert_close(added, added_in_two, rtol=1e-6, atol=0)  # a product and a sum, rounded once or twice


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        ({"bits": 3}, ValueError, r"IntCodec\(bits=3\): expected 8 or 4"),
        ({"bits": 6}, ValueError, r"IntCodec\(bits=6\): expected 8 or 4"),
        ({"bits": 16}, ValueError, r"IntCodec\(bits=16\): expected 8 or 4"),
        ({"bits": "4"}, TypeError, r"IntCodec\(bits='4'\): expected 8 or 4, got str"),
        ({"bits": True}, ValueError, r"IntCodec\(bits=True\): expected 8 or 4"),
        ({"block_size": 0}, ValueError, r"IntCodec\(block_size=0\): expected"),
        ({"block_size": -2}, ValueError, r"IntCodec\(block_size=-2\): expected"),
        ({"block_size": 127}, ValueError, r"IntCodec\(block_size=127\): expected a multiple of 32 with 4 bits"),
        ({"block_size": 48}, ValueError, r"IntCodec\(block_size=48\): expected a multiple of 32 with 4 bits"),
        ({"bits": 8, "block_size": 127}, ValueError, r"IntCodec\(block_size=127\): expected an even number"),
        ({"block_size": 64.0}, TypeError, r"IntCodec\(block_size=64\.0\): expected"),
    ],
)
def test_other_arguments_are_refused(arguments, error, told):
    with pytest.raises(error, match=told):
        IntCodec(**arguments)


def test_it_says_what_it_is():
    assert repr(IntCodec(8, 64)) == "IntCodec(bits=8, block_size=64)"


# Rounds, without processes


class Alone(WorkerGroup):
    """One rank of several workers that all send what this one sends; keeps the sizes that are reported."""

    def __init__(self, workers: int) -> None:
        super().__init__()
        self.size = workers

    def exchange(self, rows, combine, residuals, sizes):
        self.rows, self.sizes = rows, sizes
        combined = [combine(row.expand(self.size, -1)) for row in rows[:1]]
        return Reduction(combined[0].expand(self.size, -1), None)


@BITS
@pytest.mark.parametrize("workers", [2, 3, 8])
@pytest.mark.parametrize("length", [1, 2, 127, 128, 129, 1000, 70_001])
def test_only_blocks_that_hold_something_are_counted(bits, workers, length):
    tensor, group = torch.zeros(length), Alone(workers)
    layout = FlatLayout([tensor], [0])
    delta = DeltaCodec(layout, IntCodec(bits), group)
    delta.start()
    (bucket,) = layout.cut(2**30)
    delta.send(bucket, torch.ones(length), group)
    longest = math.ceil(length / workers)
    shares = [max(0, min(longest, length - worker * longest)) for worker in range(workers)]
    row_bytes = 130 if bits == 8 else 70
    assert group.sizes == [math.ceil(share / 128) * row_bytes for share in shares]
    assert group.rows.shape == (workers, max(group.sizes))


@BITS
@DTYPES
def test_what_arrives_adds_up_to_what_was_sent_within_a_step(bits, dtype):
    codec = IntCodec(bits, 32)
    generator = torch.Generator().manual_seed(0)
    error, arrived, total = (torch.zeros(1, 96, dtype=dtype) for _ in range(3))
    encoded = codec.encode(error)
    largest = 0.0
    for _ in range(300):
        change = torch.randn(1, 96, generator=generator, dtype=torch.float64).to(dtype)
        total += change
        error += change
        largest = max(largest, (error.abs().max() / (2 ** (bits - 1) - 1)).item())
        codec.encode_(error, encoded)
        codec.add_decoded_(encoded, arrived)
    assert (arrived - total).abs().max().item() < largest
    assert torch.allclose(arrived + error, total, atol=1e-4)


# Rounds, on real processes


OPTIONS = pytest.mark.parametrize(
    "options", [{}, {"stagger": True}, {"overlap": 1}, {"stagger": True, "overlap": 1}], ids=str
)


def walk(dtype: str | Codec | None, length: int, nodes: bool, forced: bool, options: dict) -> tuple[Tensor, list[int]]:
    """Steps at random, and the parameters at the end; ranks of a node take the same ones."""
    workers = NodeWorkerGroup(2) if nodes else WorkerGroup()
    generator = torch.Generator().manual_seed(workers.worker_of(dist.get_rank()))
    parameter = nn.Parameter(torch.full((length,), 100.0))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    local_sgd = LocalSGD(optimizer, 3, reduce_dtype=dtype, workers=workers, **options)
    rounds: list[int] = []
    local_sgd.subscribe(lambda record: rounds.append(record.payload_bytes))
    local_sgd.broadcast()
    for _ in range(16):
        parameter.grad = torch.randn(length, generator=generator)
        optimizer.step()
        local_sgd.step()
    if forced:
        local_sgd.average("train_end")
    local_sgd.close()
    return parameter.detach(), rounds


@pytest.mark.workers
@OPTIONS
@pytest.mark.parametrize(("dtype", "workers"), [("int8", 2), ("int4", 3)])
def test_forced_rounds_settle_what_is_owed_in_full(pool, dtype, workers, options):
    exact = pool.run(walk, None, 10_001, False, True, options, workers=workers)
    rounded = pool.run(walk, dtype, 10_001, False, True, options, workers=workers)
    for ours, theirs in zip(rounded, exact, strict=True):
        assert torch.equal(ours[0], rounded[0][0])
        torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=2e-4)
    bits = int(dtype.removeprefix("int"))
    sent, would_send = (sum(each[0][1][:-1]) for each in (rounded, exact))
    assert (bits - 1) / 32 < sent / would_send < (bits + 2) / 32


@pytest.mark.workers
@OPTIONS
@pytest.mark.parametrize("workers", [3])
def test_what_arrives_in_between_is_near_the_mean(pool, workers, options):
    exact = pool.run(walk, None, 1001, False, False, options, workers=workers)
    for dtype, owed in (("int8", 0.2), ("int4", 2.0)):  # half a step of what three steps at random change
        rounded = pool.run(walk, dtype, 1001, False, False, options, workers=workers)
        for ours, theirs in zip(rounded, exact, strict=True):
            difference = (ours[0] - theirs[0]).abs().max().item()
            assert 1e-4 < difference < owed


@pytest.mark.workers
@pytest.mark.parametrize("length", [1, 37])
@pytest.mark.parametrize(("workers", "nodes"), [(2, False), (3, False), (4, True)])
def test_sizes_are_no_multiple_of_anything(pool, workers, nodes, length):
    options = {"bucket_size_mb": 13 / 2**20}  # of three elements
    exact = pool.run(walk, None, length, nodes, True, options, workers=workers)
    for codec in (IntCodec(4, 32), IntCodec(8, 6), IntCodec(8, 128)):
        rounded = pool.run(walk, codec, length, nodes, True, options, workers=workers)
        for ours, theirs in zip(rounded, exact, strict=True):
            assert torch.equal(ours[0], rounded[0][0])
            torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=2e-4)


@pytest.mark.workers
def test_nodes_send_once_and_end_where_devices_do(pool):
    devices = pool.run(walk, "int4", 10_000, False, False, {})
    nodes = pool.run(walk, "int4", 10_000, True, False, {}, workers=4)
    for rank, (parameter, _) in enumerate(nodes):
        assert torch.equal(parameter, nodes[rank // 2 * 2][0])
        # The ranks of a node cut its share, and so blocks: other scales, but as near.
        assert (parameter - devices[rank // 2][0]).abs().max() < 2.0
    per_round = [first + second for first, second in zip(nodes[0][1], nodes[1][1], strict=True)]
    assert max(per_round) < 1.2 * max(devices[0][1])


def rest(dtype: str) -> tuple[Tensor, Tensor]:
    """Some parameters do not change, on any worker."""
    moving, resting = nn.Parameter(torch.rand(500)), nn.Parameter(torch.rand(500))
    local_sgd = LocalSGD(torch.optim.SGD([moving, resting], lr=1.0), 2, reduce_dtype=dtype)
    local_sgd.broadcast()
    before = resting.detach().clone()
    for _ in range(8):
        moving.grad, resting.grad = torch.randn(500), torch.zeros(500)
        local_sgd.optimizer.step()
        local_sgd.step()
    return before, resting.detach()


@pytest.mark.workers
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_what_no_worker_changes_stays_what_it_is_bit_for_bit(pool, dtype):
    for before, after in pool.run(rest, dtype, workers=3):
        assert torch.equal(before[140:], after[140:])  # the first may share a block with what moves
        torch.testing.assert_close(before, after, rtol=0, atol=1e-6)
