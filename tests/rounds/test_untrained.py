"""Hashes by which workers compare parameters that no optimizer trains."""

import pytest
import torch

from lightning_adpsgd.rounds.untrained import content_hash

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.complex64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 1024), (7, 331)], ids=str)
def test_equal_values_have_equal_hashes_and_others_do_not(dtype, shape):
    values = torch.randn(shape).to(dtype)
    assert content_hash(values) == content_hash(values.clone())
    if values.numel() > 0:
        changed = values.clone()
        bits = changed.view(-1).view(torch.uint8)
        bits[-1] ^= 1
        assert content_hash(changed) != content_hash(values)


def test_the_order_of_elements_counts_and_that_in_memory_does_not():
    values = torch.randn(40, 50)
    assert content_hash(values.t().contiguous().t()) == content_hash(values)
    assert content_hash(values.flip(0)) != content_hash(values)
    assert content_hash(values[:, ::2]) == content_hash(values[:, ::2].clone())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_signs_powers_of_two_and_rows_that_are_swapped_change_the_hash(dtype):
    values = torch.randn(512, 1024, dtype=dtype)
    one_sign = values.clone()
    one_sign[3] *= -1
    swapped = values[[1, 0, *range(2, 512)]]
    constants = [torch.full((512, 1024), value, dtype=dtype) for value in (0.0, 1.0, 2.0, -1.0)]
    all_of_them = [values, -values, 2 * values, values / 2, one_sign, swapped, *constants]
    assert len({content_hash(each) for each in all_of_them}) == len(all_of_them)


def test_a_hash_changes_nothing_and_takes_views_of_complex_numbers():
    values = torch.randn(3000, dtype=torch.complex64)
    before = values.clone()
    assert content_hash(values.conj()) == content_hash(values.conj().resolve_conj())
    assert content_hash(values.conj().imag) == content_hash(-values.imag)
    assert torch.equal(values, before)
