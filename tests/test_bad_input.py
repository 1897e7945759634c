"""Whatever is passed to a public constructor, either makes something that works or is named in an error that helps."""

import inspect
import json
import math
import re
import sys
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.plugins import Precision
from torch import nn

from lightning_adpsgd import (
    AdaptivePeriod,
    ADPSGDStrategy,
    AveragingPeriod,
    AveragingRound,
    CommunicationMonitor,
    ConstantPeriod,
    LocalSGD,
    WorkerGroup,
)
from lightning_adpsgd.cli import main
from lightning_adpsgd.local_sgd import SignalFlags
from lightning_adpsgd.trainer.plot import draw

quick = settings(
    deadline=None,
    max_examples=60,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
INT64 = 2**63 - 1


# Values that nobody expects


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


def optimizer():
    return torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1)


MODULE, OPTIMIZER, WORKERS, NOTICE = nn.Linear(2, 2), optimizer(), WorkerGroup(), SignalFlags()
LIGHTNINGS_OWN = (CPUAccelerator(), LightningEnvironment(), TorchCheckpointIO(), Precision())
ODD = (
    Unshowable(),
    Incomparable(),
    Undecided(),
    object(),
    object,
    print,
    AdaptivePeriod,
    ConstantPeriod(3),
    math.nan,
    math.inf,
    -0.0,
    1e308,
    10**400,
    -(10**400),
    10**5000,  # has no repr
    -(10**5000),
    INT64,
    INT64 + 1,
    Fraction(1, 4),
    Fraction(10**400),
    Decimal("0.25"),
    1j,
    *(kind(1) for kind in (np.int8, np.uint64, np.float16, np.float32, np.float64, np.bool_, np.complex64, np.str_)),
    np.float64("nan"),
    np.uint64(2**64 - 1),
    np.array(1),
    np.arange(5000).reshape(100, 50),
    np.array(["local", "raise"]),
    torch.tensor(1),
    torch.tensor(0.5),
    torch.tensor([1, 2]),
    torch.device("cpu"),
    torch.float32,
    [torch.device("cpu")],
    ("cpu",),
    timedelta(0),
    timedelta(microseconds=1),
    timedelta(minutes=1),
    timedelta.max,
    timedelta(days=-1),
    "x" * 100_000,
    "\ud800",
    "",
    " ",
    "local",
    "drop",
    "spawn",
    "gloo",
    "1",
    "AdaptivePeriod",
    Path("adpsgd"),
    MODULE,
    OPTIMIZER,
    WORKERS,
    NOTICE,
    *LIGHTNINGS_OWN,
    nn.Linear,
    MODULE.parameters(),
    {"class_path": "lightning_adpsgd.AdaptivePeriod"},
    range(4),
)
ANYTHING = (
    st.integers(0, len(ODD) - 1).map(lambda index: ODD[index])  # sampled_from would compare them
    | st.none()
    | st.booleans()
    | st.integers(-3, 9)
    | st.integers()
    | st.floats(-0.1, 1.6)
    | st.floats()
    | st.text()
    | st.binary()
    | st.lists(st.integers(), max_size=3)
    | st.dictionaries(st.text(max_size=2), st.integers(), max_size=2)
)


# What is taken: said once more, and in other words than in the package


def whole(value, least=0, most=INT64):
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and least <= int(value) <= most


def real(value, least=-math.inf, most=math.inf):
    if not isinstance(value, int | float | np.integer | np.floating | Fraction) or isinstance(value, bool):
        return False
    try:
        number = float(value)
    except OverflowError:
        return False
    return math.isfinite(number) and least <= number <= most


def share(value):
    return real(value, 0, 1) and not isinstance(value, int | np.integer)


def one_of(*choices):
    return lambda value: isinstance(value, str) and value in choices


def instance_or_none(kind):
    return lambda value: value is None or isinstance(value, kind)


def flag(value):
    return isinstance(value, bool)


def period(value):
    return value is None or isinstance(value, AveragingPeriod) or whole(value, 1)


def patterns(value):
    return isinstance(value, list | tuple) and all(isinstance(pattern, str) for pattern in value)


def bucket_size(value):
    return real(value) and 0 < float(value) < 2**43


def timeout(value):
    return value is None or (
        isinstance(value, timedelta) and timedelta(milliseconds=1) <= value <= timedelta(days=36_500)
    )


def backend(value):
    return value is None or (isinstance(value, str) and value.strip() != "")


def devices(value):
    return value is None or (
        isinstance(value, list | tuple) and all(isinstance(device, torch.device) for device in value)
    )


def prefix(value):
    return (
        isinstance(value, str)
        and value.isprintable()
        and re.search(r'[\\:*?"<>|]', value) is None
        and all(part.replace(".", " ").strip(" ") for part in value.split("/"))
        and len(value.encode()) <= 200
    )


# What holds of everything that could be made


def rule_works(rule):
    assert type(rule.value) is int
    assert 1 <= rule.value <= INT64
    again = eval(repr(rule), {type(rule).__name__: type(rule)})
    assert repr(again) == repr(rule)
    rule.setup(100)
    rule.update(1, ratio=1.0, learning_rate=0.1)
    again.load_state_dict(json.loads(json.dumps(rule.state_dict())))
    assert again.state_dict() == rule.state_dict()
    assert (again.value, again.target) == (rule.value, rule.target)


def monitor_works(monitor):
    folder = Path("/logs/version_0")
    assert str(folder / f"{monitor.prefix}.png").startswith(f"{folder}/")
    assert ".." not in Path(f"{monitor.prefix}.png").parts
    assert monitor.plot in (True, False)


def local_sgd_works(local_sgd):
    local_sgd.step()
    round_ = local_sgd.average()
    assert round_ is None or all(isinstance(value, int | float | str) for value in round_ if value is not None)
    json.dumps(local_sgd.state_dict())


def strategy_works(strategy):
    assert 1 <= strategy._period.value <= INT64
    assert type(strategy._bucket_size_mb) is float
    assert isinstance(strategy._average_buffers, bool)


class Constructor(NamedTuple):
    """Something public that can be made."""

    make: Any
    works: Any
    taken: dict[str, Any]  # for each argument: whether a value is taken, given the required ones
    required: Any = dict  # makes the arguments that have to be passed


CONSTRUCTORS = {
    "AdaptivePeriod": Constructor(
        AdaptivePeriod,
        rule_works,
        {
            "initial": lambda value: whole(value, 1),
            "sampling": lambda value: whole(value) or share(value),
            "low": lambda value: real(value, 0, 1),
            "high": lambda value: real(value, 1),
            "minimum": lambda value: whole(value, 1, 4),
            "maximum": lambda value: value is None or whole(value, 4),
            "warmup": lambda value: whole(value) or (share(value) and value < 0.25),
        },
    ),
    "ConstantPeriod": Constructor(
        ConstantPeriod,
        rule_works,
        {
            "period": lambda value: whole(value, 1),
            "warmup": lambda value: whole(value) or share(value),
        },
        lambda: {"period": 8},
    ),
    "CommunicationMonitor": Constructor(CommunicationMonitor, monitor_works, {"prefix": prefix, "plot": flag}),
    "LocalSGD": Constructor(
        LocalSGD,
        local_sgd_works,
        {
            "optimizer": lambda value: isinstance(value, torch.optim.Optimizer),
            "period": period,
            "module": instance_or_none(nn.Module),
            "total_steps": lambda value: value is None or whole(value),
            "average_buffers": flag,
            "exclude_buffers": patterns,
            "optimizer_state": one_of("local", "average", "reset"),
            "on_divergence": one_of("raise", "drop"),
            "bucket_size_mb": bucket_size,
            "stagger": flag,
            "overlap": lambda value: whole(value, 0, 7),  # less than the period
            "reduce_dtype": lambda value: value is None or one_of("bf16", "fp16")(value),
            "carrier": instance_or_none(WorkerGroup),
            "workers": instance_or_none(WorkerGroup),
            "notice": instance_or_none(SignalFlags),
            "owners": instance_or_none(dict),
            "index": whole,
        },
        lambda: {"optimizer": optimizer(), "period": 8, "total_steps": 100},
    ),
    "ADPSGDStrategy": Constructor(
        ADPSGDStrategy,
        strategy_works,
        {
            "period": period,
            "average_buffers": flag,
            "exclude_buffers": patterns,
            "optimizer_state": one_of("local", "average", "reset"),
            "on_divergence": one_of("raise", "drop"),
            "bucket_size_mb": bucket_size,
            "stagger": flag,
            "overlap": whole,
            "worker": one_of("device", "node"),
            "reduce_dtype": lambda value: value is None or one_of("bf16", "fp16")(value),
            "accelerator": instance_or_none(CPUAccelerator),
            "parallel_devices": devices,
            "cluster_environment": instance_or_none(LightningEnvironment),
            "checkpoint_io": instance_or_none(TorchCheckpointIO),
            "precision_plugin": instance_or_none(Precision),
            "process_group_backend": backend,
            "timeout": timeout,
            "start_method": one_of("popen", "spawn", "fork", "forkserver"),
        },
    ),
}
EVERY_CONSTRUCTOR = pytest.mark.parametrize("name", CONSTRUCTORS)


def is_named(message, argument, value):
    """Whether a message shows an argument with its value, or with as much of it as can be shown."""
    if isinstance(value, np.number | Fraction) and f"{argument}={plain(value)!r}" in message:
        return True
    try:
        text = re.sub(r"\s*\n\s*", " ", repr(value))
    except Exception:
        return f"{argument}=<" in message and type(value).__name__ in message
    return f"{argument}={text}" in message or (len(text) > 500 and f"{argument}={text[:100]}" in message)


def plain(value):
    """One of NumPy's numbers, or a fraction, as Python's int or float would show it."""
    if isinstance(value, np.integer):
        return int(value)
    return float(value) if real(value) else value


def made_or_refused(constructor, arguments):
    """What ``arguments`` make, or the error that says why not."""
    try:
        return constructor.make(**{**constructor.required(), **arguments}), None
    except (TypeError, ValueError) as error:
        return None, error


def test_every_argument_of_a_constructor_is_looked_at_here():
    for constructor in CONSTRUCTORS.values():
        assert set(constructor.taken) == set(inspect.signature(constructor.make).parameters)


def make_or_be_refused(name, argument, value):
    constructor = CONSTRUCTORS[name]
    made, error = made_or_refused(constructor, {argument: value})
    if constructor.taken[argument](value):
        assert error is None
        constructor.works(made)
    else:
        assert error is not None
        assert is_named(str(error), argument, value)
        assert "expected" in str(error)
        assert len(str(error)) < 1200


@EVERY_CONSTRUCTOR
def test_odd_value_makes_something_that_works_or_is_named_with_what_was_expected(name):
    for argument, value in product(CONSTRUCTORS[name].taken, ODD):
        make_or_be_refused(name, argument, value)


@EVERY_CONSTRUCTOR
@quick
@given(value=ANYTHING)
def test_any_value_makes_something_that_works_or_is_named_with_what_was_expected(name, value):
    for argument in CONSTRUCTORS[name].taken:
        make_or_be_refused(name, argument, value)


@EVERY_CONSTRUCTOR
@quick
@given(data=st.data())
def test_any_values_together_make_something_that_works_or_one_of_them_is_named(name, data):
    constructor = CONSTRUCTORS[name]
    arguments = data.draw(st.fixed_dictionaries({}, optional=dict.fromkeys(constructor.taken, ANYTHING)))
    made, error = made_or_refused(constructor, arguments)
    if error is None:
        constructor.works(made)
    elif "is a share of all optimizer steps" in str(error):
        assert arguments["total_steps"] is None
    else:
        assert any(is_named(str(error), argument, value) for argument, value in arguments.items())
        assert "expected" in str(error)


@EVERY_CONSTRUCTOR
@quick
@given(unknown=st.from_regex(r"[a-z]{1,12}", fullmatch=True) | st.sampled_from(["perod", "find_unused_parameters"]))
def test_unknown_argument_is_refused_by_its_name(name, unknown):
    constructor = CONSTRUCTORS[name]
    if unknown not in constructor.taken:
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{unknown}'"):
            constructor.make(**constructor.required(), **{unknown: 1})


@quick
@given(listener=ANYTHING)
def test_listener_that_cannot_be_called_is_refused_when_it_subscribes(listener):
    for subscribe in (LocalSGD(optimizer(), 8).subscribe, ADPSGDStrategy().subscribe):
        if callable(listener):
            subscribe(listener)
            continue
        with pytest.raises(TypeError, match="expected a function that takes an AveragingRound, got ") as caught:
            subscribe(listener)
        assert is_named(str(caught.value), "listener", listener)


# Numbers, and what only looks like one


def test_numpys_numbers_become_pythons():
    for argument, value, kept in (
        ("initial", np.int64(8), "initial=8"),
        ("maximum", np.uint8(8), "maximum=8"),
        ("sampling", np.int32(50), "sampling=50"),
        ("sampling", np.float64(0.5), "sampling=0.5"),
        ("sampling", np.float32(0.5), "sampling=0.5"),
        ("sampling", Fraction(1, 2), "sampling=0.5"),
        ("low", np.float32(0.5), "low=0.5"),
        ("high", np.int64(2), "high=2.0"),
    ):
        rule = AdaptivePeriod(**{argument: value})
        assert f"{kept}," in repr(rule)
        rule.setup(100)
        assert all(type(entry) in (int, float) for entry in rule.state_dict().values()), kept


def test_what_only_looks_like_an_int_is_refused_with_its_type():
    for value in (torch.tensor(4), np.array(4), np.True_, True, "4", 4.0, Decimal(4), Fraction(4)):
        for make in (lambda value: AdaptivePeriod(initial=value), lambda value: ADPSGDStrategy(period=value)):
            with pytest.raises(TypeError, match=rf"expected .* got (\w+\.)?{type(value).__name__}\.$"):
                make(value)


def new_local_sgd(**options):
    return LocalSGD(optimizer(), **{"total_steps": 100, **options})


def test_error_says_what_to_write_instead():
    for make, arguments, error, message in (
        # A share that was meant as a number of steps
        (AdaptivePeriod, {"sampling": 500.0}, ValueError, r"sampling=500\.0\): expected .* as in sampling=500\.$"),
        # Classes in place of what they make
        (
            ADPSGDStrategy,
            {"period": AdaptivePeriod},
            TypeError,
            r"got the class itself\. Call it: AdaptivePeriod\(\.\.\.\)",
        ),
        (
            ADPSGDStrategy,
            {"checkpoint_io": TorchCheckpointIO},
            TypeError,
            r"got the class itself\. Call it: TorchCheckpointIO\(\.\.\.\)",
        ),
        # PyTorch's type in place of its name, a number of seconds in place of a time
        (
            ADPSGDStrategy,
            {"reduce_dtype": torch.bfloat16},
            TypeError,
            r'reduce_dtype=torch\.bfloat16: expected None, "bf16" or "fp16"',
        ),
        (ADPSGDStrategy, {"timeout": 1800}, TypeError, r"timeout=1800: expected .* timedelta\(seconds=1800\)"),
    ):
        with pytest.raises(error, match=message):
            make(**arguments)


def test_options_that_cannot_be_had_together_are_both_named():
    for options, message in (
        (
            {"period": 4, "overlap": 4},
            r"overlap=4 with ConstantPeriod\(.*expected fewer steps than the averaging period",
        ),
        ({"stagger": True, "optimizer_state": "average"}, "optimizer_state='average' with stagger=True: expected"),
        ({"overlap": 1, "optimizer_state": "average"}, "optimizer_state='average' with overlap=1: expected"),
        ({"reduce_dtype": "int8"}, "reduce_dtype='int8': expected"),
    ):
        for make in (ADPSGDStrategy, new_local_sgd):
            with pytest.raises(ValueError, match=message):
                make(**{"period": 8, **options})


def test_long_value_is_shown_by_its_beginning_and_its_end():
    with pytest.raises(ValueError, match="expected") as caught:
        CommunicationMonitor(prefix="begin" + "x" * 10_000 + "end")
    assert "prefix='beginxxx" in str(caught.value)
    assert "xxxend')" in str(caught.value)
    assert len(str(caught.value)) < 1000


# The length of the run


def test_share_of_the_run_is_the_number_of_steps_that_one_would_write():
    for share, total_steps, steps in (
        *((round(percent / 100, 2), 100, percent) for percent in range(101)),  # 0.29 * 100 is 28.999999999999996
        (0.1, 30, 3),
        (0.7, 10, 7),
        (1 / 3, 300, 100),
        (0.3, 3, 0),
        (0.999, 1, 0),
        (0.57, 10**9, 570_000_000),
        (1.0, INT64, INT64),
        (1e-9, 10**9, 1),
        (0.5, 0, 0),
    ):
        rule = ConstantPeriod(8, warmup=share)
        rule.setup(total_steps)
        assert rule.state_dict()["warmup_steps"] == steps, (share, total_steps)


def test_wrong_length_of_the_run_is_refused_whether_or_not_the_rule_needs_it():
    wrong = {TypeError: (100.0, math.inf, "100", True, [100], torch.tensor(100)), ValueError: (-1, INT64 + 1)}
    for rule in (AdaptivePeriod(sampling=10), ConstantPeriod(8), AdaptivePeriod()):
        for error, values in wrong.items():
            for value in values:
                with pytest.raises(
                    error, match=r"setup\(total_steps=.*expected an int of at .*None if it is not known"
                ):
                    rule.setup(value)


def test_run_of_no_steps_is_a_run():
    for rule in (AdaptivePeriod(), ConstantPeriod(8, warmup=0.1)):
        rule.setup(0)
        assert rule.state_dict()["warmup_steps"] == 0


# Warm-up and sampling can only be compared once the length of the run is known


def test_warm_up_that_outlasts_sampling_leaves_the_target_to_the_first_round_after_it():
    for arguments in (
        {"warmup": 20, "sampling": 0.1},
        {"warmup": 20, "sampling": 0.2},
        {"warmup": 0.2, "sampling": 10},
        {"warmup": 0.2, "sampling": 0},
        {"warmup": 0.2, "sampling": 0.201},
        {"warmup": 20, "sampling": 0.0},
    ):
        local_sgd = LocalSGD(optimizer(), AdaptivePeriod(**arguments), total_steps=100)
        rounds = [round_ for round_ in (local_sgd.step() for _ in range(24)) if round_ is not None]
        assert [round_.step for round_ in rounds] == [*range(1, 21), 24], arguments
        assert {round_.target for round_ in rounds} == {None}, arguments
        assert local_sgd.period.state_dict()["samples"] == 1, arguments
        local_sgd.period.update(28, ratio=1.0, learning_rate=0.1)
        assert local_sgd.period.state_dict()["samples"] == 1, arguments


def test_trial_of_a_few_steps_works_with_the_settings_of_a_long_run():
    for total_steps in (0, 1, 2, 5):
        rule = AdaptivePeriod(warmup=1000, sampling=0.25)
        local_sgd = LocalSGD(optimizer(), rule, total_steps=total_steps)
        assert [local_sgd.step().step for _ in range(total_steps)] == [*range(1, total_steps + 1)]


# Saved states


RULES = {"AdaptivePeriod": AdaptivePeriod, "ConstantPeriod": lambda: ConstantPeriod(8)}
EVERY_RULE = pytest.mark.parametrize("name", RULES)


@EVERY_RULE
def test_saved_state_without_an_entry_is_told_which_one_and_why(name):
    for entry in RULES[name]().state_dict():
        state = RULES[name]().state_dict()
        del state[entry]
        with pytest.raises(
            ValueError, match=f"^{name}.load_state_dict: the saved state has no '{entry}'; expected"
        ) as caught:
            RULES[name]().load_state_dict(state)
        assert "another version of lightning_adpsgd" in str(caught.value)


@EVERY_RULE
def test_saved_state_of_something_else_is_told_what_it_holds(name):
    with pytest.raises(ValueError, match=r"has no '.*expected .*'step'.*found 'cnt', 'loss'"):
        RULES[name]().load_state_dict({"loss": 1.0, "cnt": 2})


@EVERY_RULE
@quick
@given(state=ANYTHING)
def test_saved_state_that_is_no_state_is_refused(name, state):
    with pytest.raises((TypeError, ValueError), match="expected"):
        RULES[name]().load_state_dict(state)


def load_or_be_refused(name, entry, value):
    rule = RULES[name]()
    rule.setup(100)
    before = rule.state_dict()
    state = {**{key: number + 1 for key, number in before.items()}, entry: value}
    if entry == "target":  # infinite: the mean of ratios near the largest float
        taken = real(value, 0) or (isinstance(value, float) and value == math.inf)
    else:
        taken = whole(value, entry == "period", math.inf)
    if taken:
        rule.load_state_dict(state)
        assert rule.state_dict() == {**state, entry: float(value) if entry == "target" else int(value)}
        assert rule.value >= 1
    else:
        with pytest.raises((TypeError, ValueError), match="expected") as caught:
            rule.load_state_dict(state)
        assert is_named(str(caught.value), entry, value)
        assert rule.state_dict() == before


@EVERY_RULE
def test_odd_entry_of_a_saved_state_is_named_and_leaves_the_rule_as_it_was(name):
    for entry, value in product(RULES[name]().state_dict(), ODD):
        load_or_be_refused(name, entry, value)


@EVERY_RULE
@quick
@given(value=ANYTHING)
def test_wrong_entry_of_a_saved_state_is_named_and_leaves_the_rule_as_it_was(name, value):
    for entry in RULES[name]().state_dict():
        load_or_be_refused(name, entry, value)


def test_saved_state_with_more_entries_than_are_needed_is_taken():
    rule = AdaptivePeriod()
    rule.load_state_dict({**rule.state_dict(), "of_a_later_version": [1]})
    assert rule.value == 4


# The plot


ROUND = AveragingRound(4, 0, "period", 4, 4, 0.1, 0.02, 0.2, 0.2, 440, 660, 0.25)


def test_nothing_to_draw_or_nowhere_to_draw_it_is_refused():
    sequence = "expected a sequence of AveragingRound, got"
    for rounds, path, error, message in (
        ([], "plot.png", ValueError, r"draw\(rounds=\[\]\): expected at least one AveragingRound"),
        (iter([ROUND]), "plot.png", TypeError, rf"draw\(rounds=.*{sequence} list_iterator"),
        ([ROUND, None], "plot.png", TypeError, f"{sequence} list"),
        ("rounds", "plot.png", TypeError, rf"draw\(rounds='rounds'\): {sequence} str"),
        ([ROUND], None, TypeError, r"draw\(path=None\): expected a str or a Path, got NoneType"),
        ([ROUND], 3, TypeError, r"draw\(path=3\): expected a str or a Path, got int"),
    ):
        with pytest.raises(error, match=message):
            draw(rounds, path)


def test_prefix_that_would_lead_out_of_the_log_directory_or_name_no_file_is_refused():
    above = ("../adpsgd", "/adpsgd", "a/../../b", "adpsgd/", "a//b", ".", "..", "a/.")
    for wrong in (*above, "C:adpsgd", "a\\b", "a\0", "a\nb", "x" * 201):
        with pytest.raises(ValueError, match=r"CommunicationMonitor\(prefix=.*expected a name .* such as 'adpsgd'"):
            CommunicationMonitor(prefix=wrong)


def test_prefix_that_is_taken_names_a_plot_that_can_be_drawn(tmp_path):
    for name in ("adpsgd", "train/adpsgd", "run 3.1", "γ_k", "x" * 200, "[a]{b}%s$x$"):
        path = tmp_path / f"{CommunicationMonitor(prefix=name).prefix}.png"
        draw([ROUND], path)
        assert path.stat().st_size > 0


# From the command line, and from a file


EXPERIMENT = """
import lightning.pytorch as pl
import torch


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 2)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(8, 4))

    def training_step(self, batch):
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
"""


@pytest.fixture
def folder(alone, tmp_path, monkeypatch):
    (tmp_path / "tiny_model.py").write_text(EXPERIMENT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["adpsgd"])
    # The command has three more, whose parsers take most of a case's time; test_cli.py has them all.
    fit = LightningCLI.subcommands()["fit"]
    monkeypatch.setattr(LightningCLI, "subcommands", staticmethod(lambda: {"fit": fit}))
    yield tmp_path
    sys.modules.pop("tiny_model", None)


def configuration(class_, argument, value):
    """An experiment in which one argument of one class is what it should not be."""
    arguments = {argument: value}
    path = {"class_path": f"lightning_adpsgd.{class_}", "init_args": arguments}
    monitor = {"class_path": "lightning_adpsgd.CommunicationMonitor"}
    strategy: dict[str, Any] = {"class_path": "lightning_adpsgd.ADPSGDStrategy"}
    if class_ == "CommunicationMonitor":
        monitor = path
    elif class_ == "ADPSGDStrategy":
        strategy = path
    else:
        if class_ == "ConstantPeriod":
            arguments.setdefault("period", 8)
        strategy["init_args"] = {"period": path}
    return {
        "trainer": {
            "strategy": strategy,
            "callbacks": [monitor],
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
        "model": {"class_path": "tiny_model.Model"},
    }


def what_it_ends_with(capsys, *arguments):
    """The message with which LightningCLI ends, its parser's own or that of a constructor, and what it blames.

    The parser repeats all that it was given: what is said there blames nobody.
    """
    with pytest.raises((SystemExit, TypeError, ValueError)) as caught:
        main(["fit", *arguments])
    if isinstance(caught.value, SystemExit):
        assert caught.value.code == 2
        message = capsys.readouterr().err.partition("error:")[2]
    else:
        message = str(caught.value)
        assert "expected" in message
    return message, [line for line in message.splitlines() if not line.strip().startswith("Given value:")]


def is_blamed(argument, lines):
    """Whether the parser says that it cannot be so, or a constructor shows its value."""
    return any(re.search(rf"""["']{argument}["']|\b{argument}=""", line) for line in lines)


WRONG = {
    "AdaptivePeriod": {
        "initial": ["four", 4.5, True, 0, None],
        "sampling": ["half", 1.5, -1, True],
        "low": ["less", 1.01, float("nan")],
        "high": ["more", 0.99, float("inf")],
        "minimum": [0, 5, "one"],
        "maximum": [0, 3, "none at all"],
        "warmup": ["some", -1, 0.25],
        "perod": [3],
    },
    "ConstantPeriod": {"period": [0, "often", 2.5], "warmup": ["some", 1.5], "perod": [3]},
    "CommunicationMonitor": {"prefix": ["", "../up", 3, None], "plot": ["perhaps", 2], "prefx": ["adpsgd"]},
    "ADPSGDStrategy": {
        "period": [0, "often", 2.5, {"class_path": "tiny_model.Model"}],
        "average_buffers": ["perhaps", 3],
        "exclude_buffers": ["queue", 3],
        "optimizer_state": ["sometimes", 3, None],
        "on_divergence": ["ignore", True],
        "bucket_size_mb": ["large", 0, -1.0, float("inf"), None],
        "stagger": [1, "perhaps", None],
        "overlap": [-1, 0.5, "one", None],
        "worker": ["host", 2, None],
        "reduce_dtype": ["int8", 16],
        "accelerator": [3, "tiny_model.Model"],
        "parallel_devices": [2, "cpu"],
        "cluster_environment": [3, "nowhere"],
        "checkpoint_io": [3, "disk"],
        "precision_plugin": [16, "bf16"],
        "process_group_backend": ["", 3],
        "timeout": [30, "soon", "0:00:00", "-1 days, 0:00:00"],
        "start_method": ["thread", 3],
        "find_unused_parameters": [True],
    },
}
SHOWN_AS = {"0:00:00": "timedelta(0)", "-1 days, 0:00:00": "timedelta(days=-1)"}
EVERY_CLASS = pytest.mark.parametrize("class_", WRONG)


def test_every_argument_of_a_class_is_wrong_once_in_a_file():
    for class_, wrong in WRONG.items():
        assert set(wrong) >= set(CONSTRUCTORS[class_].taken)


@EVERY_CLASS
def test_wrong_value_in_a_file_ends_with_a_message_that_names_the_argument(folder, capsys, class_):
    for argument, values in WRONG[class_].items():
        for value in values:
            Path("wrong.yaml").write_text(yaml.safe_dump(configuration(class_, argument, value)))
            message, blamed = what_it_ends_with(capsys, "--config=wrong.yaml")
            assert is_blamed(argument, blamed), (argument, value, message)
            assert SHOWN_AS.get(str(value), str(value)) in message, (argument, value)


@EVERY_CLASS
def test_wrong_value_on_the_command_line_ends_with_a_message_that_names_it(folder, capsys, class_):
    place, before = {
        "ADPSGDStrategy": ("trainer.strategy", []),
        "CommunicationMonitor": ("trainer.callbacks", ["--trainer.callbacks+=lightning_adpsgd.CommunicationMonitor"]),
    }.get(class_, ("trainer.strategy.period", [f"--trainer.strategy.period=lightning_adpsgd.{class_}"]))
    for argument, (value, *_) in WRONG[class_].items():
        message, blamed = what_it_ends_with(
            capsys,
            "--model=tiny_model.Model",
            "--trainer.accelerator=cpu",
            "--trainer.logger=false",
            "--trainer.strategy=lightning_adpsgd.ADPSGDStrategy",
            *before,
            *(["--trainer.strategy.period.period=8"] if class_ == "ConstantPeriod" and argument != "period" else []),
            f"--{place}.{argument}={value}",
        )
        assert is_blamed(argument, blamed), (argument, value, message)
        assert str(value) in message, (argument, value)
