import contextlib
import json
import re
import runpy
import shlex
import sys
from types import SimpleNamespace

import pytest

from benchmarks import __main__ as bench
from benchmarks.frame.errors import HostsUnavailableError
from benchmarks.frame.results import machine, write_json
from tests.benchmarks.helpers import REPOSITORY

TITLES = [benchmark.title for benchmark in bench.BENCHMARKS]
NEED_HOSTS = [benchmark.title for benchmark in bench.BENCHMARKS if benchmark.hosts is not None]
REASON = "Only root makes network namespaces: run this with sudo."


def found_by(benchmark):
    return f"what {benchmark.module.__name__} {benchmark.short} found"


class Benchmarks:
    """Replace the functions that measure."""

    def __init__(self):
        self.given = {}
        self.hosts = []
        self.instead = {}
        """By title, what to do instead of measuring."""

    def replace(self, benchmark):
        def main(arguments):
            self.given[benchmark.title] = list(arguments)
            print(f"{benchmark.title} goes on", file=sys.stderr)
            if benchmark.title in self.instead:
                return self.instead[benchmark.title]()
            print(found_by(benchmark))
            if "--json" in arguments:
                write_json(arguments[arguments.index("--json") + 1], benchmark.title, {}, [])
            return 0

        module = SimpleNamespace(__name__=benchmark.module.__name__, main=main)
        return benchmark._replace(module=module, needs=benchmark.needs and "json")  # which is there

    @contextlib.contextmanager
    def lay_out(self, count, **settings):
        self.hosts.append(settings)
        yield []


@pytest.fixture
def benchmarks(monkeypatch):
    benchmarks = Benchmarks()
    monkeypatch.setattr(bench, "BENCHMARKS", tuple(map(benchmarks.replace, bench.BENCHMARKS)))
    monkeypatch.setattr(bench, "hosts", benchmarks.lay_out)
    return benchmarks


def without_hosts(*_, **__):
    raise HostsUnavailableError(REASON)


def failing():
    raise OSError("on purpose")


def interrupted():
    raise KeyboardInterrupt


def sections_of(page):
    """What stands below each underlined title."""
    parts = re.split(r"^(.+)\n-{3,}$", page, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


# The page


def test_page_has_a_section_for_each_benchmark_in_order(benchmarks, capsys):
    assert bench.main([]) == 0
    sections = sections_of(capsys.readouterr().out)
    assert list(sections) == TITLES
    for benchmark in bench.BENCHMARKS:
        text = sections[benchmark.title]
        assert benchmark.measures in text
        assert benchmark.command in text
        assert text.rstrip().endswith(found_by(benchmark))


def test_all_five_modules_take_part():
    names = {benchmark.name.removeprefix("benchmarks.") for benchmark in bench.BENCHMARKS}
    assert names == {"local_step", "round", "link", "interface_bytes", "survival"}


def test_headline_says_what_was_measured_on(benchmarks, capsys):
    bench.main([])
    headline = capsys.readouterr().out.partition(TITLES[0])[0]
    here = machine()
    assert here["cpu"] in headline
    assert f"{here['cpus_usable']} of {here['cpu_count']} cores" in headline
    for name in ("torch", "lightning", "numpy"):
        assert f"{name} {here['versions'][name]}" in headline


@pytest.mark.parametrize("installed", [True, False])
def test_versions_of_peers_are_named_if_they_are_installed(installed, monkeypatch):
    monkeypatch.setattr(bench, "find_spec", lambda name: installed)
    monkeypatch.setattr(bench, "version", lambda name: "0.12.34")
    assert ("accelerate 0.12.34, torchft 0.12.34" in bench.headline()) == installed


@pytest.mark.parametrize(("load", "disturbed"), [(0.5, False), (3.0, True)])
def test_headline_warns_if_something_else_is_running(load, disturbed, monkeypatch):
    monkeypatch.setattr(
        bench,
        "machine",
        lambda: dict.fromkeys(("python", "cpu", "platform", "cpu_count"), "") | {"versions": {}, "cpus_usable": 2},
    )
    monkeypatch.setattr(bench.os, "getloadavg", lambda: (load, 0.0, 0.0), raising=False)
    assert ("something else is running" in bench.headline()) == disturbed


def test_progress_is_not_on_the_page(benchmarks, capsys):
    bench.main([])
    printed, said = capsys.readouterr()
    for place, title in enumerate(TITLES, start=1):
        assert f"{title} goes on" not in printed
        assert f"{title} goes on" in said
        assert f"{place} of {len(TITLES)}: {title}" in said


# What cannot be measured, and what fails


def test_benchmark_that_cannot_run_here_is_replaced_by_what_is_missing(benchmarks, monkeypatch, capsys):
    monkeypatch.setattr(bench, "hosts", without_hosts)
    assert bench.main([]) == 0
    sections = sections_of(capsys.readouterr().out)
    assert list(sections) == TITLES
    for benchmark in bench.BENCHMARKS:
        needs_hosts = benchmark.title in NEED_HOSTS
        assert (REASON in sections[benchmark.title]) == needs_hosts
        assert (found_by(benchmark) in sections[benchmark.title]) != needs_hosts
        assert (benchmark.title in benchmarks.given) != needs_hosts


def test_package_that_is_not_installed_is_named_and_the_others_run(benchmarks, monkeypatch, capsys):
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    assert bench.main([]) == 0
    sections = sections_of(capsys.readouterr().out)
    needing = [benchmark.title for benchmark in bench.BENCHMARKS if benchmark.needs is not None]
    assert needing == ["Faults"]
    for title in TITLES:
        assert ("Not measured here. json is not installed." in sections[title]) == (title in needing)
        assert (title in benchmarks.given) != (title in needing)


def test_three_benchmarks_need_no_hosts():
    assert [title for title in TITLES if title not in NEED_HOSTS] == [
        "Local step",
        "Averaging round, loopback",
        "Faults",
    ]


def test_hosts_are_tried_with_the_settings_that_the_benchmark_gives_them(benchmarks):
    bench.main([])
    assert benchmarks.hosts == [{"rate_mbit": 1000}, {"rate_mbit": 300}, {}]
    for benchmark in bench.BENCHMARKS:
        if benchmark.hosts:
            assert f"--rate-mbit {benchmark.hosts['rate_mbit']} " in f"{benchmark.short} "


@pytest.mark.parametrize("fails", [failing, lambda: 2])
def test_benchmark_that_fails_does_not_keep_the_others_from_running(fails, benchmarks, capsys):
    benchmarks.instead[TITLES[0]] = fails
    assert bench.main([]) == 2
    sections = sections_of(capsys.readouterr().out)
    assert list(sections) == TITLES
    assert "Failed" in sections[TITLES[0]]
    for benchmark in bench.BENCHMARKS[1:]:
        assert found_by(benchmark) in sections[benchmark.title]


def test_unexpected_error_is_printed_in_full(benchmarks, capsys):
    benchmarks.instead[TITLES[-1]] = failing
    bench.main([])
    assert "OSError: on purpose" in capsys.readouterr().err


def test_finding_that_bytes_are_not_as_claimed_is_on_the_page_and_in_the_exit_code(benchmarks, capsys):
    def complaining():
        print("More than is reported.")
        return 1

    benchmarks.instead[TITLES[-1]] = complaining
    assert bench.main([]) == 1
    assert "More than is reported." in sections_of(capsys.readouterr().out)[TITLES[-1]]
    benchmarks.instead[TITLES[0]] = failing
    assert bench.main([]) == 2


@pytest.mark.parametrize("stopped", [interrupted, lambda: 130])
def test_ctrl_c_ends_it_and_leaves_the_sections_that_were_complete(stopped, benchmarks, capsys):
    benchmarks.instead[TITLES[2]] = stopped
    assert bench.main([]) == 130
    assert list(sections_of(capsys.readouterr().out)) == TITLES[:2]
    assert list(benchmarks.given) == TITLES[:3]


def test_nothing_is_printed_after_ctrl_c_if_no_section_was_complete(benchmarks, capsys):
    benchmarks.instead[TITLES[0]] = interrupted
    assert bench.main([]) == 130
    assert capsys.readouterr().out == ""


# Arguments


def test_each_benchmark_writes_a_file_of_its_own_into_the_folder(benchmarks, tmp_path):
    assert bench.main(["--json", str(tmp_path)]) == 0
    written = {path.name: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert {name: numbers["benchmark"] for name, numbers in written.items()} == {
        benchmark.file: benchmark.title for benchmark in bench.BENCHMARKS
    }
    assert len(written) == len(TITLES)
    for benchmark in bench.BENCHMARKS:  # the recorded command repeats it
        command = [*benchmark.short.split(), "--json", str(tmp_path / benchmark.file)]
        assert written[benchmark.file]["command"][3:] == command


def test_nothing_is_written_unless_asked_for(benchmarks):
    bench.main([])
    assert not any("--json" in arguments for arguments in benchmarks.given.values())


def test_command_line_is_what_it_was_afterwards(benchmarks, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench", "as", "given"])
    benchmarks.instead[TITLES[1]] = failing
    bench.main([])
    assert sys.argv == ["bench", "as", "given"]


def test_folder_that_is_not_there_is_an_error_before_anything_is_measured(benchmarks, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        bench.main(["--json", str(tmp_path / "nowhere")])
    assert left.value.code == 2
    assert "argument --json" in (said := capsys.readouterr().err)
    assert "there is no folder" in said
    assert benchmarks.given == {}


@pytest.mark.parametrize("benchmark", bench.BENCHMARKS, ids=lambda benchmark: benchmark.title)
def test_benchmarks_take_the_arguments_they_are_given_here(benchmark, tmp_path):
    for arguments in (benchmark.short, benchmark.full):
        options = benchmark.module.parse([*arguments.split(), "--json", str(tmp_path / benchmark.file)])
        assert options.json == tmp_path / benchmark.file


@pytest.mark.parametrize("benchmark", bench.BENCHMARKS, ids=lambda benchmark: benchmark.title)
def test_command_on_the_page_runs_the_module_that_was_measured_with(benchmark, monkeypatch, capsys):
    python, dash_m, module, *arguments = shlex.split(benchmark.command)
    assert (python, dash_m, arguments) == ("python", "-m", benchmark.full.split())
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    monkeypatch.delitem(sys.modules, benchmark.module.__name__)
    with pytest.raises(SystemExit) as left:
        runpy.run_module(module, run_name="__main__")
    assert left.value.code == 0
    assert f"usage: python -m {module}" in capsys.readouterr().out


def test_make_runs_it_after_installing_what_it_compares_with():
    target = (REPOSITORY / "Makefile").read_text().partition("\nbench:")[2].splitlines()[:2]
    assert target == [" $(VENV)/.installed-bench", "\t$(BIN)/python -m benchmarks"]
