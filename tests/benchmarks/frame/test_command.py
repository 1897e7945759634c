import argparse

import pytest

from benchmarks.frame.command import (
    FAILED,
    INTERRUPTED,
    folder,
    new_main,
    new_parser,
    number,
    one_of,
    output_file,
    rate,
    settings,
    several,
)
from benchmarks.frame.errors import NotMeasuredError


@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [
        (number(1), "0", "expected int of at least 1, got '0'"),
        (number(1, 3), "4", "expected int from 1 to 3, got '4'"),
        (number(0, kind=float), "nan", "expected float of at least 0, got 'nan'"),
        (number(1), "many", "expected int of at least 1, got 'many'"),
        (several(number(1)), "2,,3", "expected int of at least 1, got ''"),
        (one_of(["a", "b"]), "c", "expected some of a, b, got 'c'"),
        (rate, "slow", "expected float of at least 1, got 'slow'"),
        (output_file, "no_such_folder/file.json", "there is no folder .*/no_such_folder; make it first"),
        (folder, "no_such_folder", "there is no folder no_such_folder; make it first"),
    ],
)
def test_wrong_argument_is_named_with_what_is_expected(kind, given, expected):
    with pytest.raises(argparse.ArgumentTypeError, match=expected):
        kind(given)


def test_list_is_divided_by_commas_and_holds_nothing_twice():
    assert several(number(0.5, kind=float))("1,0.5,1") == [1.0, 0.5]


def test_rate_may_be_none():
    assert [rate("none"), rate("100")] == [None, 100.0]


def parse(arguments):
    return new_parser("benchmarks.some", "Something.").parse_args(arguments)


def test_settings_are_the_options_without_the_file(tmp_path):
    parser = new_parser("benchmarks.some", "Something.")
    parser.add_argument("--turns", type=number(1), default=3)
    parser.add_argument("--traces")
    options = parser.parse_args(["--json", str(tmp_path / "file.json")])
    assert options.json == tmp_path / "file.json"
    assert settings(options, "traces") == {"turns": 3}


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (NotMeasuredError("No GPU."), FAILED, "Nothing was measured. No GPU.\n"),
        (KeyboardInterrupt(), INTERRUPTED, "Interrupted. All processes and hosts that were started are removed.\n"),
    ],
)
def test_failure_is_a_message_and_an_exit_code(error, code, said, capsys):
    def measure(options):
        raise error

    assert new_main(parse, measure)([]) == code
    assert capsys.readouterr().err == said


def test_exit_code_is_that_of_the_measurement():
    assert new_main(parse, lambda options: 1)([]) == 1


def test_unexpected_error_is_not_hidden():
    def measure(options):
        raise ArithmeticError("on purpose")

    with pytest.raises(ArithmeticError, match="on purpose"):
        new_main(parse, measure)([])
