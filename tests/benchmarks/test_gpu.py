import traceback
import warnings

import pytest
import torch

from benchmarks import gpu
from benchmarks.frame.device import Device, Timing
from benchmarks.frame.table import table
from benchmarks.gpu import (
    TRACED,
    TRAINING_COLUMNS,
    Trained,
    calls,
    complaints,
    count_synchronizing,
    main,
    trace_rows,
    training_rows,
)
from tests.benchmarks.helpers import measured

# What is missing


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("arguments", [[], ["--backend", "nccl"], ["--parts", "trace"]])
def test_without_cuda_it_says_what_is_missing(arguments, capsys):
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "Nothing was measured. PyTorch" in said
    assert "sees no CUDA device. This needs an NVIDIA GPU, its driver, and a PyTorch that is built for CUDA" in said


def test_without_nccl_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    assert main(["--backend", "nccl"]) == 2
    assert "is built without NCCL. Leave out --backend nccl" in capsys.readouterr().err


# Training


def some_turns(*seconds):
    """Two ranks, the second of which takes half as long again."""
    return [
        [
            Trained(Timing(5.0, 5.0 + factor * each, 0.1, None), 4, 1000, 10 + rank)
            for rank, factor in enumerate((1.0, 1.5))
        ]
        for each in seconds
    ]


def test_speeds_are_taken_within_a_turn_on_the_slowest_rank():
    turns = {"none": some_turns(1, 10, 100), "ddp": some_turns(2, 40, 300), "adpsgd": some_turns(1, 20, 150)}
    none, ddp, adpsgd = training_rows(turns, steps=10)
    assert (none["speed_vs_none"], none["speed_vs_ddp"]) == (1.0, 3.0)
    assert (ddp["speed_vs_none"], ddp["speed_vs_ddp"]) == (1 / 3, 1.0)
    assert (adpsgd["speed_vs_none"], adpsgd["speed_vs_ddp"]) == (2 / 3, 2.0)
    assert adpsgd["step_seconds"] == pytest.approx(3.0)
    assert (adpsgd["rounds"], adpsgd["sent_bytes"], adpsgd["peak_bytes"]) == (4, 1000, 11)
    *_, of_ddp, of_adpsgd = table([ddp, adpsgd], TRAINING_COLUMNS).splitlines()
    assert of_adpsgd.endswith("2.00       4       0.00         11 B")
    assert of_ddp.split()[-3:] == ["1.00", "11", "B"]  # it has no rounds


# The trace


def test_calls_that_wait_or_read_back_are_counted_and_no_others():
    names = ["cudaMemcpyAsync", "Memcpy DtoH (Device -> Pageable)", "Memcpy HtoD (Pageable -> Device)"]
    names += ["aten::item", "aten::items", "cudaStreamSynchronize", "cudaStreamSynchronize", "cudaMemcpy"]
    assert count_synchronizing(names) == {
        "Memcpy DtoH": 1,
        "aten::item": 1,
        "cudaStreamSynchronize": 2,
        "cudaMemcpy": 1,
    }


def some_rows(**answers):
    """Of one rank; all is as it should be by default."""
    seen = {"counts": {"aten::_local_scalar_dense": 4, "cudaDeviceSynchronize": 1}, "warnings": ["a.py:1 f"] * 4}
    quiet = {"counts": {"cudaDeviceSynchronize": 1}, "warnings": []}
    all_answers = {"single": quiet, "adpsgd": quiet, "control": seen} | answers
    return trace_rows({contender: [all_answers[contender]] for contender in TRACED}, steps=4)


def test_nothing_is_reported_if_a_local_step_waits_no_more_than_a_single_device():
    assert complaints(some_rows(), on_cuda=True) == []


def test_call_that_a_local_step_makes_beyond_a_single_device_is_reported():
    waiting = {"counts": {"cudaStreamSynchronize": 4}, "warnings": []}
    (complaint,) = complaints(some_rows(adpsgd=waiting), on_cuda=True)
    assert "cudaStreamSynchronize was called 4 times in 4 local steps, and 0 times" in complaint


def test_place_that_synchronizes_is_reported():
    waiting = {"counts": {}, "warnings": ["lightning_adpsgd/local_sgd.py:9 step"] * 4}
    (complaint,) = complaints(some_rows(adpsgd=waiting), on_cuda=True)
    assert "make the host wait for the device: 4 x lightning_adpsgd/local_sgd.py:9 step." in complaint


@pytest.mark.parametrize(("counted", "told"), [(3, 4), (4, 3)])
def test_control_that_goes_undetected_is_reported(counted, told):
    unseen = {"counts": {"aten::_local_scalar_dense": counted}, "warnings": ["a.py:1 f"] * told}
    (complaint,) = complaints(some_rows(control=unseen), on_cuda=True)
    assert "The measurement is blind" in complaint


def test_trace_without_such_calls_says_none():
    row = {"contender": "adpsgd", "rank": 0, "steps": 4, "counts": {}, "warnings": []}
    assert [(each["call"], each["count"]) for each in calls(row)] == [("none", 0)]


def test_synchronization_is_attributed_to_the_innermost_frame_of_the_package():
    files = ["main.py", "lightning_adpsgd/strategy.py", "lightning_adpsgd/local_sgd.py", "torch/a.py", "torch/b.py"]
    files.append("torch/c.py")
    stack = [
        traceback.FrameSummary(f"/packages/{file}", line, "f", lookup_line=False) for line, file in enumerate(files)
    ]
    assert gpu._called_from(stack) == (
        "lightning_adpsgd/local_sgd.py:2 f > torch/a.py:3 f > torch/b.py:4 f > torch/c.py:5 f"
    )
    assert gpu._called_from(stack[:4]).startswith("lightning_adpsgd/strategy.py:1 f > lightning_adpsgd/local_sgd.py:2")


def test_what_pytorch_reports_is_kept_with_its_place(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    watch = gpu.SyncWatch(Device())
    with watch._warnings_kept():
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert modes == ["warn", "default"]
    (place,) = watch.warnings
    assert "test_gpu.py" in place


# The measurement


@pytest.mark.workers
def test_rehearsal_goes_through_rounds_training_and_trace_on_the_cpu(tmp_path):
    options = "--rehearse --parts round,training,trace --turns 1 --parameters 0.1 --tensors 8"
    options += " --training-parameters 20000 --batch-size 4 --period 3 --steps 6"
    _, numbers = measured(main, tmp_path / "measured.json", *options.split(), "--traces", str(tmp_path))
    assert numbers["arguments"]["device"] == "cpu"
    (averaged,) = [row for row in numbers["rows"] if row["part"] == "round"]
    assert averaged["ratio"] > 0
    trained = {row["contender"]: row for row in numbers["rows"] if row["part"] == "training"}
    assert {"none", "ddp", "constant", "adpsgd"} <= set(trained)
    assert (trained["none"]["rounds"], trained["constant"]["rounds"], trained["adpsgd"]["rounds"]) == (0, 2, 2)
    traced = [(row["contender"], row["rank"]) for row in numbers["rows"] if row["part"] == "trace"]
    assert traced == [(contender, rank) for contender in TRACED for rank in range(2)]
    assert all((tmp_path / f"{contender}.json").stat().st_size > 0 for contender in TRACED)
