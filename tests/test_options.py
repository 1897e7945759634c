"""What an ``AveragingOptions`` holds; what it refuses is in ``test_bad_input.py``."""

from dataclasses import FrozenInstanceError, fields

import numpy as np
import pytest
import torch
from torch import nn

from lightning_adpsgd import AdaptivePeriod, ADPSGDStrategy, ConstantPeriod, IntCodec, LocalSGD
from lightning_adpsgd.options import AveragingOptions, as_period


def new_local_sgd(**arguments):
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1)
    return LocalSGD(optimizer, **{"period": 8, "total_steps": 100, **arguments})


def test_options_cannot_be_changed_once_they_are_checked():
    options = AveragingOptions()
    with pytest.raises(FrozenInstanceError):
        options.overlap = -1
    with pytest.raises(FrozenInstanceError):
        del options.overlap


def test_numpys_values_are_kept_as_pythons_and_lists_as_tuples():
    patterns = ["*.queue"]
    options = AveragingOptions(
        exclude_buffers=patterns,
        optimizer_state=np.str_("reset"),
        bucket_size_mb=np.int64(2),
        overlap=np.uint8(3),
        reduce_dtype=np.str_("bf16"),
    )
    patterns.append("memory")
    assert options == AveragingOptions(True, ("*.queue",), "reset", 2.0, "raise", False, 3, "bf16")
    kinds = [bool, tuple, str, float, str, bool, int, str, type(None)]
    assert [type(getattr(options, field.name)) for field in fields(options)] == kinds


def test_buckets_are_counted_in_whole_bytes():
    assert AveragingOptions().bucket_bytes == 64 * 2**20
    assert AveragingOptions(bucket_size_mb=100.5 / 2**20).bucket_bytes == 100
    assert AveragingOptions(bucket_size_mb=1e-9).bucket_bytes == 0
    assert type(AveragingOptions(bucket_size_mb=0.3).bucket_bytes) is int


@pytest.mark.parametrize(("name", "dtype"), [(None, None), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_reduce_dtype_names_the_type_that_is_sent(name, dtype):
    assert getattr(AveragingOptions(reduce_dtype=name).codec, "dtype", None) is dtype


@pytest.mark.parametrize(("name", "bits"), [("int8", 8), ("int4", 4)])
def test_reduce_dtype_names_integers_in_blocks_of_128(name, bits):
    assert repr(AveragingOptions(reduce_dtype=name).codec) == repr(IntCodec(bits=bits, block_size=128))


@pytest.mark.parametrize(
    ("options", "is_spread", "transport"),
    [
        ({}, False, "at once"),
        ({"optimizer_state": "average", "reduce_dtype": "fp16"}, False, "in fp16"),
        ({"reduce_dtype": "int4"}, False, "in int4"),
        ({"reduce_dtype": IntCodec(8, 64)}, False, "in IntCodec(bits=8, block_size=64)"),
        ({"stagger": True}, True, "spread over the period"),
        ({"overlap": 2}, True, "adopted 2 step(s) later"),
        (
            {"stagger": True, "overlap": 1, "reduce_dtype": "bf16"},
            True,
            "spread over the period, adopted 1 step(s) later, in bf16",
        ),
    ],
)
def test_transport_describes_how_rounds_are_sent(options, is_spread, transport):
    assert AveragingOptions(**options).is_spread is is_spread
    assert AveragingOptions(**options).transport == transport
    assert ADPSGDStrategy(**options).transport == transport


@pytest.mark.parametrize("make", [AveragingOptions, ADPSGDStrategy, new_local_sgd])
@pytest.mark.parametrize("asked", [{"stagger": True}, {"overlap": 1}])
def test_state_is_not_averaged_while_training_goes_on(make, asked):
    ((name, value),) = asked.items()
    with pytest.raises(ValueError, match=f"optimizer_state='average' with {name}={value}: expected.*Leave out one"):
        make(optimizer_state="average", **asked)


def test_overlap_is_shorter_than_a_constant_period():
    for make in (ADPSGDStrategy, new_local_sgd):
        make(period=5, overlap=4)
        make(period=AdaptivePeriod(initial=2), overlap=4)  # the period may grow
        for period in (4, ConstantPeriod(4), ConstantPeriod(1)):
            with pytest.raises(
                ValueError, match=r"overlap=4 with ConstantPeriod\(.*expected fewer steps than the aver"
            ):
                make(period=period, overlap=4)
    with pytest.raises(ValueError, match="overlap=4 with"):
        new_local_sgd(period=4, options=AveragingOptions(overlap=4))


def test_local_sgd_takes_options_as_one_argument_or_as_single_ones():
    chosen = {
        **{"average_buffers": False, "exclude_buffers": ["a"], "optimizer_state": "reset", "bucket_size_mb": 1.5},
        **{"on_divergence": "drop", "stagger": True, "overlap": 2, "reduce_dtype": "bf16"},
    }
    options = AveragingOptions(**chosen)
    assert new_local_sgd(**chosen).options == options
    assert new_local_sgd(options=options).options is options
    assert ADPSGDStrategy(**chosen)._options == options
    assert new_local_sgd().options == AveragingOptions()
    for name, value in chosen.items():
        alone = AveragingOptions(**{name: value})
        told = f"{name}={getattr(alone, name)!r}".replace("(", r"\(").replace(")", r"\)")
        with pytest.raises(
            ValueError, match=rf"options=.* with {told}: expected one or the other.*Options\({told}\)\.$"
        ):
            new_local_sgd(options=AveragingOptions(), **{name: value})
        new_local_sgd(options=options, **{name: getattr(AveragingOptions(), name)})


def test_period_stands_for_a_rule():
    rule = ConstantPeriod(3)
    assert as_period(rule) is rule
    assert repr(as_period(None)) == repr(AdaptivePeriod())
    assert repr(as_period(np.int64(5))) == repr(ConstantPeriod(5))
