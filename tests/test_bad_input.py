"""What is passed to a public constructor either makes something that works or is named in a helpful error."""

import inspect
import json
import math
import re
import sys
from collections.abc import Callable
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as L
import numpy as np
import pytest
import torch
import yaml
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.plugins import Precision
from torch import nn

from lightning_adpsgd import (
    AdaptivePeriod,
    ADPSGDStrategy,
    AveragingRound,
    CommunicationMonitor,
    ConstantPeriod,
    LocalSGD,
    WorkerGroup,
)
from lightning_adpsgd.averaging.codec import Codec
from lightning_adpsgd.averaging.update import Adopt, Update
from lightning_adpsgd.cli import main
from lightning_adpsgd.elastic.options import ElasticOptions
from lightning_adpsgd.options import AveragingOptions
from lightning_adpsgd.plot import draw
from lightning_adpsgd.rounds.handshake import SignalFlags

INT64 = 2**63 - 1


class Unshowable:
    def __repr__(self):
        raise RuntimeError("no repr today")


class Incomparable:
    def __eq__(self, other):
        raise RuntimeError("no comparison today")

    __hash__ = None


class Undecided:
    def __bool__(self):
        raise RuntimeError("neither true nor false")


# Values that no argument takes; and those that no number, whole number or string argument takes
NEVER = (
    *(Unshowable(), Incomparable(), Undecided(), object(), 1j, b"local", Decimal("0.25"), Path("adpsgd"), range(4)),
    *(np.bool_(True), np.complex64(1), np.array(1), np.arange(5000).reshape(100, 50), np.array(["local", "raise"])),
    *(torch.tensor(1), torch.tensor(0.5), torch.float32, nn.Linear(2, 2).parameters()),
)
NO_NUMBER = (*NEVER, True, False, "1", "x" * 100_000, [1], (1,), {}, timedelta(1), torch.device("cpu"), AdaptivePeriod)
NO_INT = (*NO_NUMBER, 4.0, 0.5, -0.0, math.nan, math.inf, 1e308, np.float32(4), Fraction(4), Fraction(10**400))
NO_STRING = (*NEVER, True, 3, 0.5, ["local"], {}, AdaptivePeriod)
TOO_LARGE = (INT64 + 1, np.uint64(2**64 - 1), 10**400, 10**5000)  # the last one has no repr
NOT_FINITE = (math.nan, math.inf, -math.inf, np.float64("nan"), 10**400, Fraction(10**400))


class Argument(NamedTuple):
    """What an argument takes, and the message for anything else."""

    expected: str  # found in the message; a regular expression
    wrong_types: tuple[Any, ...]
    wrong_values: tuple[Any, ...] = ()
    right: tuple[Any, ...] = ()
    in_file: tuple[Any, ...] = ()  # wrong too, but written in YAML


def whole(least, right, or_none=False):
    wrong_types = NO_INT if or_none else (*NO_INT, None)
    wrong_values = (least - 1, -3, np.int8(-1), -(10**5000), *TOO_LARGE)
    expected = rf"expected an int of at (least {least}|most {INT64})"
    return Argument(expected, wrong_types, wrong_values, right, ("four", -1))


def share(*right):
    expected = r"expected (a number of steps \(int\) or a share of the run \(float between 0 and 1\)|an int of at )"
    wrong_values = (-1, -0.1, 1.1, 500.0, np.float32(2), Fraction(3, 2), *NOT_FINITE, *TOO_LARGE)
    return Argument(expected, (*NO_NUMBER, None), wrong_values, (0, 0.0, *right), ("half", 1.5))


def number(expected, wrong_values, right):
    return Argument(expected, (*NO_NUMBER, None), (*wrong_values, *NOT_FINITE), right, ("less", wrong_values[0]))


def choice(*choices, or_none=False):
    named = [*(f'"{each}"' for each in choices), *(["None"] if or_none else [])]
    wrong_types = (*NO_STRING, torch.bfloat16) if or_none else (*NO_STRING, None)
    wrong_values = ("", " ", "sometimes", choices[0].upper(), "x" * 100_000, "\ud800")
    right = (*choices, np.str_(choices[0]), *([None] if or_none else []))
    return Argument(f"expected {', '.join(named[:-1])} or {named[-1]}", wrong_types, wrong_values, right, ("no", 3))


def instance(class_, right):
    expected = f"expected an instance of {class_.__name__} or None"
    return Argument(expected, (*NEVER, True, 3, "x", [1], type(right)), (), (None, right), (3, "nowhere"))


def optimizer():
    return torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1)


def new_local_sgd(**arguments):
    return LocalSGD(**{"optimizer": optimizer(), "period": 8, "total_steps": 100, **arguments})


FLAG = Argument("expected True or False, got", (*NEVER, None, 0, 1, "yes", [True]), (), (True, False), ("perhaps", 2))
PERIOD = Argument(
    "expected an (AveragingPeriod, such as AdaptivePeriod.., or an int|int of at)",
    NO_INT,
    (0, -1, np.int8(-1), *TOO_LARGE),
    (None, 1, INT64, np.uint8(3), ConstantPeriod(3), AdaptivePeriod(sampling=2)),
    (0, "often", 2.5, {"class_path": "tiny_model.Model"}),
)
AVERAGING = {
    "average_buffers": FLAG,
    "exclude_buffers": Argument(
        r'expected a list of patterns of names, for example \["\*\.queue"\], got',
        wrong_types=(*NEVER, None, True, 3, "*.queue", [3], ["*.queue", None], {"*.queue"}, {}),
        right=([], (), ["*.queue"], ("a", "b")),
        in_file=("queue", 3),
    ),
    "optimizer_state": choice("local", "average", "reset", "estimate"),
    "bucket_size_mb": number("expected a positive, finite number of MiB", (-1, 0, -0.0, 2.0**43), (1, 1e-9, 2.0**42)),
    "on_divergence": choice("raise", "drop"),
    "stagger": FLAG,
    "overlap": whole(0, (0, 3, np.int64(2))),
    "reduce_dtype": choice("bf16", "fp16", "int8", "int4", or_none=True),
    "update": instance(Update, Adopt()),
}
PREFIX = Argument(
    "expected a (str|name for log entries and the plot's file, such as 'adpsgd')",
    (*NO_STRING, None),
    # Outside the log directory, no file name, or not one for every file system
    (
        *("../adpsgd", "/adpsgd", "a/../../b", "adpsgd/", "a//b", ".", "..", "a/.", "", " "),
        *("C:adpsgd", "a\\b", "a\0", "a\nb", "\ud800", "x" * 201, "γ" * 101, "begin" + "x" * 100_000),
    ),
    ("adpsgd", "train/adpsgd", "run 3.1", "γ_k", "x" * 200, "[a]{b}%s$x$"),
    ("../up", 3),
)
TIMEOUT = Argument(
    r"expected (a datetime.timedelta, such as timedelta\(seconds=1800\) or None|between a millisecond and a hundred)",
    (*NEVER, True, 1800, 0.5, "0:30:00", [1]),
    (timedelta(0), timedelta(microseconds=1), timedelta(days=-1), timedelta.max),
    (None, timedelta(milliseconds=1), timedelta(days=36_500)),
    (30, "soon", "0:00:00", "-1 days, 0:00:00"),
)


# What holds for every valid value


def rule_works(rule):
    assert type(rule.value) is int
    assert 1 <= rule.value <= INT64
    again = eval(repr(rule), {type(rule).__name__: type(rule)})
    assert repr(again) == repr(rule)  # so NumPy's numbers have become Python's
    rule.setup(100)
    rule.update(1, ratio=1.0, learning_rate=0.1)
    again.load_state_dict(json.loads(json.dumps(rule.state_dict())))
    assert again.state_dict() == rule.state_dict()
    assert (again.value, again.target) == (rule.value, rule.target)


def monitor_works(monitor):
    path = Path("/logs/version_0") / f"{monitor.prefix}.png"
    assert str(path).startswith("/logs/version_0/")
    assert ".." not in path.parts


def options_work(options):
    kinds = (bool, tuple, str, float, str, bool, int, str | Codec | None, Update | None)
    assert all(isinstance(value, kind) for value, kind in zip(vars(options).values(), kinds, strict=True))
    if options.update is None:
        assert repr(eval(repr(options))) == repr(options)
    assert 0 <= options.bucket_bytes <= INT64
    assert hash(options) == hash(AveragingOptions(**vars(options)))


def local_sgd_works(local_sgd):
    options_work(local_sgd.options)
    local_sgd.step()
    round_ = local_sgd.average()
    assert round_ is None or all(isinstance(value, int | float | str) for value in round_ if value is not None)
    json.dumps(local_sgd.state_dict())


def strategy_works(strategy):
    assert 1 <= strategy._period.value <= INT64
    options_work(strategy._options)


ADAPTIVE = {
    "initial": whole(1, (1, INT64, np.int64(8))),
    "sampling": share(1, 50, 1.0, np.int32(50), np.float32(0.5), Fraction(1, 2)),
    "low": number("expected a number from 0 to 1, because", (1.01, -0.1), (0, 1, np.float32(0.5))),
    "high": number("expected a finite number of at least 1, because", (0.99, -1), (1, 1e308, np.int64(2))),
    "minimum": whole(1, (1, 4)),
    "maximum": whole(1, (None, 4, INT64, np.uint8(8)), or_none=True),
    "warmup": share(100, 0.2, np.float64(0.1)),
    "growth": choice("additive", "proportional"),
    "skip_rising": FLAG,
}
CONSTANT = {"period": whole(1, (1, INT64, np.uint64(3))), "warmup": share(5, 1.0, 0.5, np.int8(2))}
PLAIN_LOOP = {
    "optimizer": Argument(
        r"expected a torch.optim.Optimizer, such as torch.optim.SGD\(",
        wrong_types=(*NEVER, None, True, 3, "sgd", [1], torch.optim.SGD),
        right=(optimizer(),),
    ),
    "period": PERIOD,
    "module": instance(nn.Module, nn.Linear(2, 2)),
    "total_steps": whole(0, (None, 0, np.int64(9)), or_none=True),
    **AVERAGING,
    "options": instance(AveragingOptions, AveragingOptions(overlap=1)),
    "workers": instance(WorkerGroup, WorkerGroup()),
    "async_group": instance(WorkerGroup, WorkerGroup()),
    "flags": instance(SignalFlags, SignalFlags()),
    "owners": instance(dict, {}),
    "index": whole(0, (0, INT64, np.int64(1))),
}
STRATEGY = {
    "period": PERIOD,
    **AVERAGING,
    "worker": choice("device", "node"),
    "elastic": Argument(
        r"expected ElasticOptions\(\.\.\.\), or True; or None",
        wrong_types=(*NEVER, 3, "yes", [1], ElasticOptions),
        in_file=(3, "maybe"),
        right=(None, False),
    ),
    "checkpoint_io": instance(CheckpointIO, TorchCheckpointIO()),
    "precision_plugin": instance(Precision, Precision()),
    "timeout": TIMEOUT,
}
LEFT_TO_LIGHTNING = ("accelerator", "parallel_devices", "cluster_environment", "process_group_backend", "start_method")


class Door(NamedTuple):
    """A public entry point that takes arguments."""

    make: Callable[..., Any]
    works: Callable[[Any], None]
    arguments: dict[str, Argument]
    required: Callable[[], dict[str, Any]] = dict


DOORS = {
    "AdaptivePeriod": Door(AdaptivePeriod, rule_works, ADAPTIVE),
    "ConstantPeriod": Door(ConstantPeriod, rule_works, CONSTANT, lambda: {"period": 8}),
    "CommunicationMonitor": Door(
        CommunicationMonitor, monitor_works, {"prefix": PREFIX, "plot": FLAG, "progress_bar": FLAG}
    ),
    "AveragingOptions": Door(AveragingOptions, options_work, AVERAGING),
    "LocalSGD": Door(new_local_sgd, local_sgd_works, PLAIN_LOOP),
    "ADPSGDStrategy": Door(ADPSGDStrategy, strategy_works, STRATEGY),
}
EVERY_DOOR = pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)


def is_named(message, argument, value):
    """Whether a message shows an argument with its value, or as much of the value as can be shown."""
    if isinstance(value, np.integer) and f"{argument}={int(value)}" in message:
        return True
    try:
        text = re.sub(r"\s*\n\s*", " ", repr(value))
    except Exception:
        return f"{argument}=<" in message and type(value).__name__ in message
    return f"{argument}={text}" in message or (len(text) > 500 and f"{argument}={text[:100]}" in message)


def test_every_argument_of_an_entry_point_is_in_the_table():
    for name, door in DOORS.items():
        make = LocalSGD if name == "LocalSGD" else door.make
        assert {*door.arguments} == {*inspect.signature(make).parameters} - {*LEFT_TO_LIGHTNING, "former"}


@EVERY_DOOR
def test_valid_value_makes_something_that_works(door):
    for argument, row in door.arguments.items():
        for value in row.right:
            door.works(door.make(**{**door.required(), argument: value}))


def check_refused(call, argument, row, expected=None):
    """Every wrong value ends ``call(value)`` with an error that names it, its type and what was expected."""
    for kind, values in ((TypeError, row.wrong_types), (ValueError, row.wrong_values)):
        for value in values:
            with pytest.raises(kind, match=expected or row.expected) as caught:
                call(value)
            message = str(caught.value)
            assert is_named(message, argument, value)
            assert len(message) < 1200
            if kind is TypeError and not isinstance(value, type):
                assert re.search(rf", got (\w+\.)*{type(value).__name__}\.$", message)


@EVERY_DOOR
def test_wrong_value_is_named_with_its_type_and_what_was_expected(door):
    for argument, row in door.arguments.items():
        check_refused(lambda value: door.make(**{**door.required(), argument: value}), argument, row)  # noqa: B023


@EVERY_DOOR
def test_of_two_wrong_values_one_is_named(door):
    for (one, row), (other, other_row) in combinations(door.arguments.items(), 2):
        for value, other_value in product(row.wrong_types[:4:3], other_row.wrong_types[:4:3]):
            with pytest.raises(TypeError, match="expected") as caught:
                door.make(**{**door.required(), one: value, other: other_value})
            assert is_named(str(caught.value), one, value) or is_named(str(caught.value), other, other_value)


@EVERY_DOOR
def test_unknown_argument_is_refused_by_its_name(door):
    for unknown in ("perod", "find_unused_parameters"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{unknown}'"):
            door.make(**door.required(), **{unknown: 1})


def test_periods_that_contradict_each_other_are_named_together():
    bounds, phases = "expected minimum <= initial <= maximum", "expected warmup < sampling.*Make sampling longer"
    for arguments, message in (
        ({"minimum": 5}, rf"initial=4, minimum=5, maximum=None\): {bounds}"),
        ({"maximum": 3}, rf"initial=4, minimum=1, maximum=3\): {bounds}"),
        ({"minimum": 6, "maximum": 5}, rf"initial=4, minimum=6, maximum=5\): {bounds}"),
        ({"warmup": 10, "sampling": 10}, rf"warmup=10, sampling=10\): {phases}"),
        ({"warmup": 1, "sampling": 0}, rf"warmup=1, sampling=0\): {phases}"),
        ({"warmup": 0.25}, rf"warmup=0\.25, sampling=0\.25\): {phases}"),
    ):
        with pytest.raises(ValueError, match=rf"^AdaptivePeriod\(.*{message}"):
            AdaptivePeriod(**arguments)


def test_error_says_what_to_write_instead():
    for make, message in (
        (lambda: AdaptivePeriod(sampling=500.0), r"expected .* as in sampling=500\.$"),
        (lambda: ADPSGDStrategy(AdaptivePeriod), r"got the class itself\. Call it: AdaptivePeriod\(\.\.\.\)"),
        (lambda: ADPSGDStrategy(checkpoint_io=TorchCheckpointIO), r"Call it: TorchCheckpointIO\(\.\.\.\)"),
        (lambda: LocalSGD(torch.optim.SGD), r"Call it: SGD\(\.\.\.\)"),
        (lambda: CommunicationMonitor("begin" + "x" * 10_000 + "end"), r"prefix='beginxxx.*\.\.\..*xxxend'\)"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            make()


def test_arguments_that_lightning_checks_are_not_checked_before():
    for arguments, error, message in (
        ({"start_method": "thread", "accelerator": CPUAccelerator()}, ValueError, "start method 'thread' is not avail"),
        ({"accelerator": 3}, KeyError, "'3' not found in registry"),
    ):
        strategy = ADPSGDStrategy(**arguments)
        with pytest.raises(error, match=message):
            L.Trainer(strategy=strategy, devices=1, logger=False)


def test_listener_that_cannot_be_called_is_refused_when_it_subscribes():
    row = Argument("expected a function that takes an AveragingRound, got ", (*NEVER, None, 3, "print"))
    for subscribe in (new_local_sgd().subscribe, ADPSGDStrategy().subscribe):
        subscribe(AveragingRound)
        check_refused(subscribe, "listener", row)


# What rules are given later: the length of the run, a saved state


RULES = {"AdaptivePeriod": lambda: AdaptivePeriod(sampling=10), "ConstantPeriod": lambda: ConstantPeriod(8)}
EVERY_RULE = pytest.mark.parametrize("name", RULES)


@EVERY_RULE
def test_wrong_length_of_the_run_is_refused_whether_or_not_the_rule_needs_it(name):
    expected = rf"^{name}\.setup\(total_steps=.*, or None if it is not known"
    check_refused(RULES[name]().setup, "total_steps", PLAIN_LOOP["total_steps"], expected)


@EVERY_RULE
def test_saved_state_without_an_entry_is_told_which_one_and_why(name):
    complete = [entry for entry in RULES[name]().state_dict() if entry != "highest_rate"]  # which old files do not have
    why = "expected.*another version of lightning_adpsgd"
    for state, message in (
        *(({**{key: 1 for key in complete if key != entry}}, f"no '{entry}'; {why}") for entry in complete),
        ({"loss": 1.0, "cnt": 2}, "no '.*; expected .*'step'.*, found 'cnt', 'loss'"),
        ({}, "found nothing"),
    ):
        with pytest.raises(ValueError, match=f"^{name}.load_state_dict: the saved state has .*{message}"):
            RULES[name]().load_state_dict(state)
    row = Argument(rf"^{name}\.load_state_dict\(state=.*expected a dict with '", (*NEVER, None, 3, "step", ["step"]))
    check_refused(RULES[name]().load_state_dict, "state", row)


@EVERY_RULE
def test_wrong_entry_of_a_saved_state_is_named_and_leaves_the_rule_as_it_was(name):
    rule = RULES[name]()
    rule.setup(100)
    before = rule.state_dict()
    changed = {key: value + 1 for key, value in before.items()}
    for entry in before:
        row = whole(int(entry == "period"), (1, 10**18, np.int64(7)))
        if entry == "highest_rate":
            row = number("expected a number of at least 0", (-1, -1e-9), (0, 0.5, np.float32(0.5)))
        if entry == "target":  # infinite: the mean of ratios near the largest float
            row = number("expected a number of at least 0", (-1, -1e-9), (0, math.inf, np.float32(0.5)))
            row = row._replace(wrong_values=(-1, -1e-9, math.nan, -math.inf, Fraction(10**400)))
        check_refused(lambda value: rule.load_state_dict({**changed, entry: value}), entry, row)  # noqa: B023
        assert rule.state_dict() == before
        for value in row.right:
            other = RULES[name]()
            other.load_state_dict({**changed, entry: value, "of_a_later_version": [1]})
            assert other.state_dict() == {**changed, entry: value}
            assert all(type(kept) in (int, float) for kept in other.state_dict().values())


# The plot


def test_nothing_to_draw_or_nowhere_to_draw_it_is_refused(tmp_path):
    round_ = AveragingRound(4, 0, "period", 4, 4, 0.1, 0.02, 0.2, 0.2, 440, 660, 0.25)
    sequence = "expected a sequence of AveragingRound, got"
    for rounds, path, error, message in (
        ([], "plot.png", ValueError, r"draw\(rounds=\[\]\): expected at least one AveragingRound"),
        (iter([round_]), "plot.png", TypeError, rf"draw\(rounds=.*{sequence} list_iterator"),
        ([round_, None], "plot.png", TypeError, f"{sequence} list"),
        ("rounds", "plot.png", TypeError, rf"draw\(rounds='rounds'\): {sequence} str"),
        ([round_], None, TypeError, r"draw\(path=None\): expected a str or a Path, got NoneType"),
        ([round_], 3, TypeError, r"draw\(path=3\): expected a str or a Path, got int"),
    ):
        with pytest.raises(error, match=message):
            draw(rounds, path)
    for prefix in ("train/adpsgd", "x" * 200, "[a]{b}%s$x$ γ"):  # an accepted prefix names a file that can be written
        path = tmp_path / f"{CommunicationMonitor(prefix).prefix}.png"
        draw([round_], path)
        assert path.stat().st_size > 0


# From a file, and from the command line


MODEL = """
import lightning.pytorch as pl
import torch


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 2)
"""


@pytest.fixture
def folder(alone, tmp_path, monkeypatch):
    (tmp_path / "tiny_model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["adpsgd"])
    # The command has three more subcommands, whose parsers take most of a case's time; test_cli.py covers them.
    fit = LightningCLI.subcommands()["fit"]
    monkeypatch.setattr(LightningCLI, "subcommands", staticmethod(lambda: {"fit": fit}))
    yield tmp_path
    sys.modules.pop("tiny_model", None)


def configuration(name, arguments):
    """An experiment in which one class is given these arguments."""
    path = {"class_path": f"lightning_adpsgd.{name}", "init_args": arguments}
    strategy = {"class_path": "lightning_adpsgd.ADPSGDStrategy", "init_args": {"period": path}}
    trainer = {
        "strategy": path if name == "ADPSGDStrategy" else strategy,
        **{"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False},
    }
    if name == "CommunicationMonitor":
        trainer |= {"strategy": "adpsgd", "callbacks": [path]}
    return {"trainer": trainer, "model": {"class_path": "tiny_model.Model"}}


def check_blamed(capsys, argument, value, *command):
    """The command ends with a message, its parser's or a constructor's, that names the argument and shows the value."""
    with pytest.raises((SystemExit, TypeError, ValueError)) as caught:
        main(["fit", *command])
    if isinstance(caught.value, SystemExit):
        assert caught.value.code == 2
        message = capsys.readouterr().err.partition("error:")[2]
    else:
        message = str(caught.value)
        assert "expected" in message
    # The parser repeats all that it was given, which blames no argument.
    blamed = [line for line in message.splitlines() if not line.strip().startswith("Given value:")]
    assert any(re.search(rf"""["']{argument}["']|\b{argument}=""", line) for line in blamed), (argument, value, message)
    assert {"0:00:00": "timedelta(0)", "-1 days, 0:00:00": "timedelta(days=-1)"}.get(str(value), str(value)) in message


@pytest.mark.parametrize("name", ["AdaptivePeriod", "ConstantPeriod", "CommunicationMonitor", "ADPSGDStrategy"])
def test_wrong_value_in_a_file_ends_with_a_message_that_names_the_argument(folder, capsys, name):
    wrong = [(argument, value) for argument, row in DOORS[name].arguments.items() for value in row.in_file]
    assert {argument for argument, _ in wrong} == {*DOORS[name].arguments}
    for argument, value in (*wrong, ("perod", 3)):
        arguments = {**DOORS[name].required(), argument: value}
        Path("wrong.yaml").write_text(yaml.safe_dump(configuration(name, arguments)))
        check_blamed(capsys, argument, value, "--config=wrong.yaml")


def test_wrong_value_on_the_command_line_ends_with_a_message_that_names_it(folder, capsys):
    rest = ["--model=tiny_model.Model", "--trainer.accelerator=cpu", "--trainer.logger=false"]
    rest += ["--trainer.strategy=lightning_adpsgd.ADPSGDStrategy"]
    rule, monitor = "--trainer.strategy.period", "--trainer.callbacks"
    for before, argument, value in (
        ("--trainer.strategy.worker=device", "--trainer.strategy.overlap", "-1"),
        (f"{rule}=lightning_adpsgd.AdaptivePeriod", f"{rule}.initial", "four"),
        (f"{rule}=lightning_adpsgd.ConstantPeriod", f"{rule}.period", "0"),
        (f"{monitor}+=lightning_adpsgd.CommunicationMonitor", f"{monitor}.prefix", "../up"),
        ("--trainer.strategy.worker=device", "--trainer.strategy.perod", "8"),
    ):
        check_blamed(capsys, argument.rpartition(".")[2], value, *rest, before, f"{argument}={value}")
