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
