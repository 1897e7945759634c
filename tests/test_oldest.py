"""`make test-oldest` runs the suite with the lowest versions that pyproject.toml allows, and with no newer ones.

`make test`, `make test-bench` and `make test-ray` split it into the package's tests, the benchmarks' and Ray's.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parent.parent
# Needed only to work on the package, or to compare it with others
OWN_TOOLS = (
    "pytest",
    "pytest-xdist",
    "hypothesis",
    "ruff",
    "mypy",
    "mkdocs",
    "mkdocs-material",
    "mkdocstrings",
    "accelerate",
    "torchft",
    "tensorboard",
    "wandb",
    "mlflow-skinny",
    "nbclient",
    "ipykernel",
)
# Not bounded by the package
ONLY_CAPPED = {"numpy", "pyparsing", "pyarrow"}


def name_of(requirement):
    return re.match(r"[\w.-]+", requirement)[0].lower()


def lower_bounds():
    """The smallest version of everything that a user may install with the package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [
        *project["dependencies"],
        *(r for extra in project["optional-dependencies"].values() for r in extra),
    ]
    return {
        name_of(requirement): re.search(r">=([\d.]+)", requirement)[1]
        for requirement in requirements
        if name_of(requirement) not in ("lightning-adpsgd", *OWN_TOOLS)
    }


def constraints():
    lines = (line.partition("#")[0].strip() for line in (ROOT / "tests" / "oldest.txt").read_text().splitlines())
    return {name_of(line): line[len(name_of(line)) :] for line in lines if line}


def in_full(number):
    return (*map(int, number.split(".")), 0, 0)[:3]


def test_constrained_versions_are_the_lower_bounds():
    pinned = {name: rule.removeprefix("==") for name, rule in constraints().items() if rule.startswith("==")}
    assert {name: in_full(version) for name, version in pinned.items()} == {
        name: in_full(version) for name, version in lower_bounds().items()
    }


def test_everything_else_is_only_capped():
    assert {name for name, rule in constraints().items() if not rule.startswith("==")} == ONLY_CAPPED


@pytest.mark.skipif(".venv-oldest" not in sysconfig.get_path("purelib"), reason="not the oldest supported versions")
def test_oldest_versions_are_those_that_the_suite_runs_with():
    pinned = {name: rule.removeprefix("==") for name, rule in constraints().items() if rule.startswith("==")}
    assert {name: version(name).partition("+")[0] for name in pinned} == pinned


def make(*arguments):
    environment = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    }
    return subprocess.run(["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True).stdout


NEEDS_MAKE = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@NEEDS_MAKE
def test_oldest_versions_are_installed_once_and_again_when_a_bound_changes(tmp_path):
    oldest = tmp_path / "oldest"
    (oldest / "bin").mkdir(parents=True)
    (oldest / "bin" / "pip").touch()
    dry = ("--dry-run", "test-oldest", f"OLDEST={oldest}")
    assert "--constraint tests/oldest.txt" in make(*dry)
    (oldest / ".installed-dev").touch()
    assert make(*dry).split() == [f"{oldest}/bin/python", "-m", "pytest", "--ignore=tests/clients"]
    for changed in ("pyproject.toml", "tests/oldest.txt"):
        assert "pip install" in make(*dry, f"--what-if={changed}")


@NEEDS_MAKE
def test_three_targets_divide_the_suite(tmp_path):
    (tmp_path / "bin").mkdir()
    for file in ("bin/pip", ".installed-dev"):
        (tmp_path / file).touch()
    run, beside = (
        [f"{tmp_path}/bin/python", "-m", "pytest"],
        ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"],
    )
    others = {"test-bench": "tests/benchmarks", "test-ray": "tests/ray"}
    left_out = [f"--ignore={folder}" for folder in ("tests/benchmarks", "tests/clients", "tests/ray")]
    assert make("--dry-run", "test", f"VENV={tmp_path}").split() == [*run, *beside, *left_out]
    for target, folder in others.items():
        assert make("--dry-run", target, f"VENV={tmp_path}").split() == [*run, folder]


@pytest.mark.parametrize("fails", ["nothing", "lint", "build", "docs", "test", "test-bench", "test-ray"])
def test_ci_runs_everything_and_fails_if_anything_does(tmp_path, fails):
    fake = tmp_path / "make"
    fake.write_text(f'#!/bin/sh\necho "made $1"\n[ "$1" != {fails} ]\n')
    fake.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ended = subprocess.run([ROOT / ".ci" / "run"], env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode == 0) == (fails == "nothing")
    first, beside = ["lint", "build", "docs"], ["test", "test-bench", "test-ray"]
    made = first[: first.index(fails) + 1] if fails in first else first + beside
    assert ended.stdout.split("\n")[:-1] == [f"made {target}" for target in made]
