import math
import os
import subprocess
import sys
from itertools import groupby
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_adpsgd.averaging import layout, tiles
from lightning_adpsgd.averaging.layout import Bucket, FlatLayout

quick = settings(deadline=None, max_examples=80)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128)
FOUND_IN_GAPS = 99.0


# Tensors of every kind, each a window on a storage that the test can inspect


class Window(NamedTuple):
    storage: Tensor  # one dimension; real
    tensor: Tensor
    group: int | None

    def places(self):
        """Positions of the elements in the storage, in the order that the layout promises, by brute force."""
        real = torch.view_as_real(self.tensor.data) if self.tensor.is_complex() else self.tensor.data
        indices = torch.arange(self.storage.numel())
        places = indices.as_strided(real.shape, real.stride(), real.storage_offset()).flatten()
        dense = places.max() - places.min() + 1 == len(places)
        return places.sort().values if dense else places


def window(dtype, shape, order=None, gap=0, offset=0, group=None):
    """A tensor with dimensions in memory in ``order``, outermost first, and a gap after each innermost row."""
    order = order if order is not None else tuple(range(len(shape)))
    extents = [shape[dim] for dim in order]
    if extents:
        extents[-1] += gap
    strides = [0] * len(shape)
    for position, dim in enumerate(order):
        strides[dim] = math.prod(extents[position + 1 :])
    storage = torch.full((offset + math.prod(extents),), FOUND_IN_GAPS, dtype=dtype)
    view = storage.as_strided(shape, strides, offset)
    tensor = nn.Parameter(view) if group is not None else view
    made = Window(torch.view_as_real(storage).view(-1) if dtype.is_complex else storage, tensor, group)
    if tensor.numel() > 0:
        places = made.places()
        # Exact in every dtype; the test notices any shift of fewer than 101 elements.
        made.storage[places] = (torch.arange(len(places)) % 101 - 50).to(made.storage.dtype)
    return made


@st.composite
def windows(draw, dtypes=DTYPES, max_size=8):
    made = []
    dtypes = draw(st.lists(st.sampled_from(dtypes), min_size=1, max_size=2))  # few, so that spaces hold several tensors
    for _ in range(draw(st.integers(1, max_size))):
        shape = draw(st.lists(st.sampled_from([1, 2, 3, 5, 0]), max_size=4))
        kind = draw(st.sampled_from(["contiguous", "channels_last", "permuted", "gaps", "permuted with gaps"]))
        order = tuple(range(len(shape)))
        if kind == "channels_last" and len(shape) == 4:
            order = (0, 2, 3, 1)
        elif kind.startswith("permuted"):
            order = tuple(draw(st.permutations(order)))
        gap = draw(st.integers(1, 3)) if kind.endswith("gaps") else 0
        offset = draw(st.sampled_from([0, 0, 1, 4]))
        group = draw(st.sampled_from([None, 0, 1, 2]))
        made.append(window(draw(st.sampled_from(dtypes)), shape, order, gap, offset, group))
    return made


def layout_of(made):
    return FlatLayout([each.tensor for each in made], [each.group for each in made])


def spaces_of(made):
    """The windows of each index space, in the order in which the spaces appear."""
    spaces = {}
    for each in made:
        if each.tensor.numel() > 0:
            spaces.setdefault(each.tensor.dtype, []).append(each)
    return list(spaces.values())


def flattened(space):
    return torch.cat([each.storage[each.places()].to(packed_dtype(each)) for each in space])


def packed_dtype(each):
    return torch.float64 if each.storage.dtype == torch.float64 else torch.float32


def any_range(data, length):
    start = data.draw(st.integers(0, length - 1), label="start")
    return start, data.draw(st.integers(start + 1, length), label="stop")


# Packing


@quick
@given(windows(), st.data())
def test_packed_bucket_is_that_part_of_the_flattened_tensors(made, data):
    flat_layout = layout_of(made)
    for index, space in enumerate(spaces_of(made)):
        reference = flattened(space)
        start, stop = any_range(data, len(reference))
        bucket = Bucket(index, start, stop)
        buffer = flat_layout.new_buffer(bucket)
        assert flat_layout.pack(bucket, buffer) is buffer
        assert buffer.dtype == packed_dtype(space[0])
        assert torch.equal(buffer, reference[start:stop])


@quick
@given(windows(), st.data())
def test_unpacking_a_bucket_writes_its_elements_and_nothing_else(made, data):
    flat_layout = layout_of(made)
    pointers = [each.tensor.data_ptr() for each in made]
    versions = [each.tensor._version for each in made]
    expected = [each.storage.clone() for each in made]
    for index, space in enumerate(spaces_of(made)):
        length = len(flattened(space))
        start, stop = any_range(data, length)
        values = (torch.arange(length) % 89 - 120).to(packed_dtype(space[0]))  # none of them is there already
        position = 0
        for each in space:
            places = each.places()
            mine = torch.arange(position, position + len(places))
            taken = (start <= mine) & (mine < stop)
            number = next(i for i, other in enumerate(made) if other is each)
            expected[number][places[taken]] = values[mine[taken]].to(each.storage.dtype)
            position += len(places)
        flat_layout.unpack(Bucket(index, start, stop), values[start:stop].clone())

    for each, storage, pointer, version in zip(made, expected, pointers, versions, strict=True):
        assert torch.equal(each.storage, storage)
        assert each.tensor.data_ptr() == pointer
        assert each.tensor._version == version


@quick
@given(windows(), st.integers(4, 400))
def test_bucket_by_bucket_every_element_is_changed_once(made, max_bytes):
    before = [each.tensor.detach().clone() for each in made]
    flat_layout = layout_of(made)
    for bucket in flat_layout.cut(max_bytes):
        buffer = flat_layout.pack(bucket, flat_layout.new_buffer(bucket))
        flat_layout.unpack(bucket, buffer + 7)
    for each, old in zip(made, before, strict=True):
        added = 7 + 7j if old.is_complex() else 7
        assert torch.equal(each.tensor.detach(), old + added)


@quick
@given(windows(dtypes=(torch.bfloat16, torch.float16)))
def test_16_bit_elements_are_packed_as_fp32_and_come_back_rounded(made):
    flat_layout = layout_of(made)
    for bucket in flat_layout.cut(1 << 20):
        buffer = flat_layout.pack(bucket, flat_layout.new_buffer(bucket))
        assert buffer.dtype == torch.float32
        flat_layout.unpack(bucket, buffer + 1 / 3)
    for each in made:
        if each.tensor.numel() > 0:
            places = each.places()
            was = (torch.arange(len(places)) % 101 - 50).float()
            assert torch.equal(each.storage[places], (was + 1 / 3).to(each.storage.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensor_of_one_element_without_dimensions_is_laid_out(dtype):
    tensor = torch.tensor(3, dtype=dtype)
    flat_layout = FlatLayout([tensor], [None])
    (bucket,) = flat_layout.cut(1 << 20)
    buffer = flat_layout.pack(bucket, flat_layout.new_buffer(bucket))
    assert buffer.tolist() == ([3.0, 0.0] if dtype.is_complex else [3.0])
    flat_layout.unpack(bucket, buffer + 1)
    assert tensor.item() == (4 + 1j if dtype.is_complex else 4)


def test_channels_last_tensor_is_laid_out_in_the_order_of_its_memory():
    tensor = torch.arange(2 * 3 * 2 * 2.0).view(2, 3, 2, 2).to(memory_format=torch.channels_last)
    flat_layout = FlatLayout([tensor], [0])
    bucket = Bucket(0, 0, 24)
    buffer = flat_layout.pack(bucket, flat_layout.new_buffer(bucket))
    assert torch.equal(buffer, tensor.permute(0, 2, 3, 1).flatten())
    flat_layout.unpack(bucket, -buffer)
    assert torch.equal(tensor, -torch.arange(24.0).view(2, 3, 2, 2))
    assert tensor.is_contiguous(memory_format=torch.channels_last)


def test_transposed_view_is_laid_out_as_the_matrix_it_is_a_view_of():
    matrix = torch.arange(6.0).view(2, 3)
    flat_layout = FlatLayout([matrix.t()], [0])
    assert flat_layout.pack(Bucket(0, 0, 6), torch.empty(6)).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    flat_layout.unpack(Bucket(0, 1, 3), torch.tensor([8.0, 9.0]))
    assert matrix.tolist() == [[0.0, 8.0, 9.0], [3.0, 4.0, 5.0]]


def test_column_of_a_matrix_is_read_and_written_in_place():
    matrix = torch.zeros(3, 4)
    matrix[:, 1] = torch.tensor([1.0, 2.0, 3.0])
    flat_layout = FlatLayout([matrix[:, 1]], [0])
    assert flat_layout.pack(Bucket(0, 0, 3), torch.empty(3)).tolist() == [1.0, 2.0, 3.0]
    flat_layout.unpack(Bucket(0, 1, 3), torch.tensor([8.0, 9.0]))
    assert matrix[:, 1].tolist() == [1.0, 8.0, 9.0]
    assert matrix.sum() == 18.0


def test_buffer_longer_than_the_bucket_fits_and_one_of_another_kind_does_not():
    flat_layout = FlatLayout([torch.zeros(5), torch.zeros(5, dtype=torch.float64)], [0, 0])
    assert flat_layout.fits(Bucket(0, 1, 4), torch.empty(3))
    assert flat_layout.fits(Bucket(0, 1, 4), torch.empty(9))
    assert not flat_layout.fits(Bucket(0, 1, 4), torch.empty(2))
    assert not flat_layout.fits(Bucket(0, 1, 4), torch.empty(3, dtype=torch.float64))
    assert not flat_layout.fits(Bucket(1, 1, 4), torch.empty(3))
    assert flat_layout.fits(Bucket(1, 1, 4), torch.empty(3, dtype=torch.float64))
    assert not flat_layout.fits(Bucket(0, 1, 4), torch.empty(3, device="meta"))


def test_tensors_on_the_cpu_are_packed_where_the_workers_can_reduce_them():
    flat_layout = FlatLayout([torch.randn(5)], [0])
    buffer = flat_layout.new_buffer(Bucket(0, 1, 4), "meta")  # stands in for a GPU
    assert buffer.device.type == "meta"
    assert flat_layout.fits(Bucket(0, 1, 4), buffer, "meta")
    assert not flat_layout.fits(Bucket(0, 1, 4), torch.empty(3), "meta")


# Index spaces


@quick
@given(windows())
def test_each_dtype_has_its_own_index_space_with_every_element_in_it(made):
    flat_layout = layout_of(made)
    spaces = spaces_of(made)
    whole = flat_layout.cut(1 << 30)
    assert [(bucket.space, bucket.start, bucket.stop) for bucket in whole] == [
        (index, 0, sum(each.places().numel() for each in space)) for index, space in enumerate(spaces)
    ]
    assert [flat_layout.new_buffer(bucket).dtype for bucket in whole] == [packed_dtype(space[0]) for space in spaces]


def test_every_dtype_is_in_a_space_of_its_own():
    flat_layout = FlatLayout([torch.zeros(3, dtype=dtype) for dtype in DTYPES], [0] * len(DTYPES))
    assert [len(bucket) for bucket in flat_layout.cut(1 << 20)] == [3, 3, 3, 3, 6, 6]


@quick
@given(windows())
def test_empty_tensors_are_not_laid_out_and_all_others_are(made):
    flat_layout = layout_of(made)
    assert flat_layout.indices == [index for index, each in enumerate(made) if each.tensor.numel() > 0]
    assert len(flat_layout.signature) == len(flat_layout.indices)


def test_layout_of_nothing_has_no_buckets():
    for nothing in ([], [torch.zeros(0), torch.zeros(3, 0)]):
        flat_layout = FlatLayout(nothing, [0] * len(nothing))
        assert flat_layout.cut(1024) == []
        assert flat_layout.cut_into_spaces() == []


def test_tensors_that_share_storage_are_laid_out_once():
    tied = nn.Parameter(torch.arange(4.0))
    other = nn.Parameter(torch.tensor([9.0]))
    flat_layout = FlatLayout([tied, other, tied, nn.Parameter(tied.data)], [0, 0, 1, 1])
    assert flat_layout.indices == [0, 1]
    assert flat_layout.cut_into_spaces() == [Bucket(0, 0, 5)]
    (bucket,) = flat_layout.cut(1024)
    buffer = flat_layout.pack(bucket, flat_layout.new_buffer(bucket))
    assert buffer.tolist() == [0.0, 1.0, 2.0, 3.0, 9.0]
    assert flat_layout.groups(bucket) == [(0, 0, 5)]


def test_a_tensor_and_its_transpose_or_flat_view_are_the_same_elements_once():
    tensor = torch.arange(12.0).view(3, 4)
    flat_layout = FlatLayout([tensor, tensor.t(), tensor.view(-1)], [0, 0, 0])
    assert flat_layout.indices == [0]
    assert flat_layout.cut_into_spaces() == [Bucket(0, 0, 12)]


def test_an_expanded_dimension_is_laid_out_once():
    base = torch.tensor([[1.0], [2.0]])
    flat_layout = FlatLayout([base.expand(2, 5), torch.tensor(7.0).expand(3)], [None, None])
    (bucket,) = flat_layout.cut(1024)
    assert flat_layout.pack(bucket, flat_layout.new_buffer(bucket)).tolist() == [1.0, 2.0, 7.0]
    flat_layout.unpack(bucket, torch.tensor([3.0, 4.0, 8.0]))
    assert base.tolist() == [[3.0], [4.0]]


def test_slices_of_one_storage_are_all_laid_out():
    storage = torch.arange(12.0)
    flat_layout = FlatLayout([storage[:4], storage[4:8], storage[8:]], [0, 0, 0])
    assert flat_layout.indices == [0, 1, 2]
    assert torch.equal(flat_layout.pack(Bucket(0, 0, 12), torch.empty(12)), storage)


def test_fewer_groups_than_tensors_are_refused():
    with pytest.raises(ValueError, match="shorter"):
        FlatLayout([torch.zeros(2), torch.zeros(2)], [0])


# Cutting


@quick
@given(windows(), st.integers(1, 600))
def test_cut_covers_every_element_once_in_buckets_no_longer_than_asked_for(made, max_bytes):
    flat_layout = layout_of(made)
    buckets = flat_layout.cut(max_bytes)
    for index, space in enumerate(spaces_of(made)):
        own = [bucket for bucket in buckets if bucket.space == index]
        itemsize = packed_dtype(space[0]).itemsize
        longest = max(1, max_bytes // itemsize)
        length = len(flattened(space))
        assert [position for bucket in own for position in range(bucket.start, bucket.stop)] == list(range(length))
        assert all(0 < len(bucket) <= longest for bucket in own)
        assert len(own) == math.ceil(length / longest)
    assert {bucket.space for bucket in buckets} == set(range(len(spaces_of(made))))


@quick
@given(st.lists(st.integers(1, 3000), min_size=1, max_size=6), st.sampled_from(DTYPES), st.integers(8, 5000))
def test_cut_does_not_depend_on_where_tensors_end(sizes, dtype, max_bytes):
    many = FlatLayout([torch.zeros(size, dtype=dtype) for size in sizes], [0] * len(sizes))
    one = FlatLayout([torch.zeros(sum(sizes), dtype=dtype)], [0])
    assert many.cut(max_bytes) == one.cut(max_bytes)
    assert many.cut_into_spaces() == one.cut_into_spaces()
    itemsize = 8 if dtype in (torch.float64, torch.complex128) else 4
    assert all(len(bucket) * itemsize <= max_bytes for bucket in many.cut(max_bytes))


def test_buckets_are_cut_anywhere_in_tensors():
    flat_layout = FlatLayout([torch.arange(7.0), torch.arange(7.0, 10.0)], [0, 0])
    buckets = flat_layout.cut(16)
    assert [(bucket.start, bucket.stop) for bucket in buckets] == [(0, 4), (4, 8), (8, 10)]
    packed = [flat_layout.pack(bucket, flat_layout.new_buffer(bucket)) for bucket in buckets]
    assert torch.equal(torch.cat(packed), torch.arange(10.0))


def test_buckets_are_of_nearly_equal_length():
    lengths = [len(bucket) for bucket in FlatLayout([torch.zeros(1001)], [0]).cut(4 * 1000)]
    assert lengths == [501, 500]


@quick
@given(st.integers(0, 50), st.integers(1, 200), st.integers(1, 70))
def test_a_bucket_is_split_into_pieces_of_a_given_length(start, length, longest):
    bucket = Bucket(3, start, start + length)
    tiles = list(bucket.split(longest))
    assert [position for tile in tiles for position in range(tile.start, tile.stop)] == list(
        range(start, start + length)
    )
    assert {tile.space for tile in tiles} == {3}
    assert {len(tile) for tile in tiles[:-1]} <= {longest}
    assert 0 < len(tiles[-1]) <= longest


# Parameter groups


@quick
@given(windows(), st.data())
def test_groups_of_a_bucket_are_its_runs_of_elements_of_one_group(made, data):
    flat_layout = layout_of(made)
    for index, space in enumerate(spaces_of(made)):
        groups = [each.group for each in space for _ in range(len(each.places()))]
        start, stop = any_range(data, len(groups))
        expected = []
        position = 0
        for group, elements in groupby(groups[start:stop]):
            end = position + len(list(elements))
            if group is not None:
                expected.append((group, position, end))
            position = end
        assert flat_layout.groups(Bucket(index, start, stop)) == expected


def test_runs_of_one_group_are_joined_if_nothing_lies_between_them():
    groups = [0, 0, None, 0, 1, 1, None]
    flat_layout = FlatLayout([torch.zeros(2) for _ in groups], groups)
    assert flat_layout.groups(Bucket(0, 0, 14)) == [(0, 0, 4), (0, 6, 8), (1, 8, 12)]
    assert flat_layout.groups(Bucket(0, 3, 11)) == [(0, 0, 1), (0, 3, 5), (1, 5, 8)]
    assert flat_layout.groups(Bucket(0, 4, 6)) == []


# Tiles


def at_most(elements):
    return mock.patch.dict(tiles._AT_ONCE, cpu=elements)


@quick
@given(windows(), st.integers(1, 7), st.data())
def test_tiles_of_any_length_cover_a_bucket_once_and_know_its_groups(made, at_once, data):
    with at_most(at_once):
        flat_layout = layout_of(made)
        for index, space in enumerate(spaces_of(made)):
            start, stop = any_range(data, len(flattened(space)))
            bucket = Bucket(index, start, stop)
            tiles = flat_layout.tiles(bucket)
            assert [tile.start for tile in tiles] == [0, *(tile.stop for tile in tiles[:-1])]
            assert tiles[-1].stop == len(bucket)
            # A tensor without a flat view is copied whole to read any of it, so it is not cut.
            assert all(len(tile) <= at_once or (len(tile._pieces) == 1 and not tile._dense) for tile in tiles)
            in_tiles = [
                (group, place) for c in tiles for group, a, b in c.runs for place in range(c.start + a, c.start + b)
            ]
            assert in_tiles == [(group, place) for group, a, b in flat_layout.groups(bucket) for place in range(a, b)]


@quick
@given(windows(), st.integers(1, 7), st.data())
def test_a_tile_can_be_compared_with_values_and_moved(made, at_once, data):
    with at_most(at_once):
        flat_layout = layout_of(made)
        for index, space in enumerate(spaces_of(made)):
            flat = flattened(space)
            groups = [each.group for each in space for _ in range(len(each.places()))]
            start, stop = any_range(data, len(flat))
            expected = flat.clone()
            for tile in flat_layout.tiles(Bucket(index, start, stop)):
                here = slice(start + tile.start, start + tile.stop)
                values = torch.full((len(tile),), 3.0, dtype=flat.dtype)
                assert torch.equal(tile.difference(values, torch.empty_like(values)), flat[here] - 3.0)
                tile.move(mean=values, difference=values + 4.0)
                moved = torch.tensor([group is not None for group in groups[here]])
                expected[here] = torch.where(moved, flat[here] - 7.0, values)
            assert torch.equal(flattened(space), expected)


def test_tiles_are_cached_up_to_a_limit(monkeypatch):
    monkeypatch.setattr(layout, "_REMEMBERED", 3)
    flat_layout = FlatLayout([torch.zeros(10)], [0])
    first = Bucket(0, 0, 2)
    assert flat_layout.tiles(first) is flat_layout.tiles(first)
    for start in range(1, 8):
        flat_layout.tiles(Bucket(0, start, start + 2))
        assert len(flat_layout._tiles) <= 3


@quick
@given(windows(), st.integers(1, 7), st.sampled_from([math.nan, math.inf, -math.inf]), st.data())
def test_only_tensors_of_a_group_have_to_be_finite(made, at_once, bad, data):
    with at_most(at_once):
        flat_layout = layout_of(made)
        assert flat_layout.are_finite()
        spoilt = data.draw(st.sampled_from(made))
        if spoilt.tensor.numel() == 0:
            return
        places = spoilt.places()
        spoilt.storage[places[data.draw(st.integers(0, len(places) - 1))]] = bad
        assert bool(flat_layout.are_finite()) == (spoilt.group is None)


def test_large_numbers_are_finite():
    assert FlatLayout([torch.full((1000,), 3e38), torch.full((9,), -1e308, dtype=torch.float64)], [0, 1]).are_finite()
    assert FlatLayout([torch.full((1000,), 65504.0, dtype=torch.float16)], [0]).are_finite()


# What workers have to agree on

REFERENCE = (
    {"dtype": torch.float32, "shape": (4, 2, 3, 3), "group": 0},
    {"dtype": torch.float32, "shape": (4,), "group": 0},
    {"dtype": torch.bfloat16, "shape": (6, 4), "group": 1},
    {"dtype": torch.float32, "shape": (), "group": None},
)


def fingerprint(descriptions=REFERENCE):
    return layout_of([window(**description) for description in descriptions]).fingerprint


def with_change(index, **change):
    return [{**each, **change} if place == index else each for place, each in enumerate(REFERENCE)]


@pytest.mark.parametrize(
    "descriptions",
    [
        with_change(1, dtype=torch.float64),
        with_change(2, dtype=torch.float16),
        with_change(1, dtype=torch.complex64),
        with_change(1, shape=(5,)),
        with_change(1, shape=(4, 1)),
        with_change(1, shape=(2, 2)),
        with_change(2, shape=(4, 6)),
        with_change(3, shape=(1,)),
        with_change(1, group=1),
        with_change(1, group=None),
        with_change(3, group=0),
        with_change(0, order=(0, 2, 3, 1)),
        with_change(2, order=(1, 0)),
        with_change(2, gap=1),
        REFERENCE[:3],
        REFERENCE[1:],
        (*REFERENCE, REFERENCE[-1]),
        (REFERENCE[1], REFERENCE[0], *REFERENCE[2:]),
        (),
    ],
)
def test_fingerprint_changes_with_dtype_shape_group_memory_format_number_and_order(descriptions):
    assert fingerprint(descriptions) != fingerprint()


def test_fingerprint_does_not_depend_on_values_addresses_or_empty_tensors():
    tensors = [window(**description).tensor.detach() for description in REFERENCE]
    groups = [description["group"] for description in REFERENCE]
    others = [torch.full_like(tensor, 3.0) for tensor in tensors]
    assert FlatLayout(others, groups).fingerprint == FlatLayout(tensors, groups).fingerprint
    with_empty = FlatLayout([torch.zeros(0), *tensors], [0, *groups])
    assert with_empty.fingerprint == FlatLayout(tensors, groups).fingerprint


def test_fingerprint_does_not_depend_on_strides_of_dimensions_of_size_one():
    plain = torch.zeros(3, 1, 2, 1)
    odd = torch.zeros(6).as_strided((3, 1, 2, 1), (2, 50, 1, 7))
    assert FlatLayout([odd], [0]).fingerprint == FlatLayout([plain], [0]).fingerprint


@quick
@given(windows())
def test_fingerprint_is_a_48_bit_number_and_exact_as_a_float64(made):
    value = layout_of(made).fingerprint
    assert 0 <= value < 2**48
    assert int(torch.tensor(value, dtype=torch.float64).item()) == value


def test_fingerprint_of_an_equal_layout_is_equal_in_another_process():
    program = f"""
import importlib.util, torch
spec = importlib.util.spec_from_file_location("layout", {layout.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
tensors = [torch.ones(4, 2, 3, 3), torch.ones(4), torch.ones(6, 4, dtype=torch.bfloat16), torch.tensor(1.0)]
print(hash("a salted hash"), module.FlatLayout(tensors, [0, 0, 1, None]).fingerprint)
"""
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    printed = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert int(printed[0]) != hash("a salted hash")
    assert int(printed[1]) == fingerprint()


def test_signature_tells_dtype_shape_and_group_of_each_tensor():
    signature = layout_of([window(**description) for description in REFERENCE]).signature
    assert [entry[:3] for entry in signature] == [
        ("torch.float32", (4, 2, 3, 3), 0),
        ("torch.float32", (4,), 0),
        ("torch.bfloat16", (6, 4), 1),
        ("torch.float32", (), None),
    ]


# Autograd


@pytest.mark.parametrize("make", [torch.ones, lambda *shape: torch.ones(*shape, 2)[..., 0]], ids=["dense", "gaps"])
def test_graph_that_saved_a_tensor_still_runs_backward_after_it_was_unpacked(make):
    weight, buffer = nn.Parameter(make(3, 2)), make(3, 2)
    inputs = torch.ones(3, 2, requires_grad=True)
    loss = (inputs * weight * buffer).sum()

    flat_layout = FlatLayout([weight, buffer], [0, None])
    versions = (weight._version, buffer._version)
    flat_layout.unpack(Bucket(0, 0, 12), torch.full((12,), 5.0))

    assert (weight._version, buffer._version) == versions
    assert weight.tolist() == buffer.tolist() == [[5.0, 5.0]] * 3
    loss.backward()
    assert inputs.grad is not None


def test_packing_a_parameter_records_no_history():
    weight = nn.Parameter(torch.ones(4))
    flat_layout = FlatLayout([weight], [0])
    buffer = flat_layout.pack(Bucket(0, 0, 4), flat_layout.new_buffer(Bucket(0, 0, 4)))
    assert not buffer.requires_grad
    assert weight.requires_grad
    assert weight.is_leaf
