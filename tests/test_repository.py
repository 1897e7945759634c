"""What several files say of one thing agrees: versions, requirements, targets of make, the repository's address."""

import re
import sys
from pathlib import Path

import pytest
import yaml

from lightning_adpsgd import __version__

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
CONDA_NAMES = {"torch": "pytorch", "jsonargparse[signatures]": "jsonargparse"}
# What the extra jsonargparse[signatures] stands for; conda has no extras
SIGNATURES = {"docstring_parser", "typeshed-client", "typing_extensions"}


def parsed(file):
    return yaml.safe_load((ROOT / file).read_text())


def in_conda_words(requirements):
    """``torch>=2.8`` is ``pytorch >=2.8`` there."""
    pairs = [re.fullmatch(r"([\w.-]+(?:\[\w+\])?)(.*)", requirement).groups() for requirement in requirements]
    return {f"{CONDA_NAMES.get(name, name)} {rule}" for name, rule in pairs}


def targets():
    return set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def made_by(text):
    return set(re.findall(r"\bmake ([a-z][\w-]*)", text))


def commands_of(workflow):
    steps = [step for job in parsed(workflow)["jobs"].values() for step in job["steps"]]
    return "\n".join(step.get("run", "") for step in steps)


def test_the_version_is_stated_in_the_package_and_other_files_follow():
    assert "version" in PROJECT["dynamic"]
    assert PYPROJECT["tool"]["hatch"]["version"]["path"] == "lightning_adpsgd/__init__.py"
    newest, date = re.search(
        r"^## \[([\d.]+)\] - ([\d-]+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    ).groups()
    citation = parsed("CITATION.cff")
    assert {newest, citation["version"], parsed("conda/recipe.yaml")["context"]["version"]} == {__version__}
    assert str(citation["date-released"]) == date


def test_the_citation_has_the_license_of_the_project():
    assert parsed("CITATION.cff")["license"] == parsed("conda/recipe.yaml")["about"]["license"] == PROJECT["license"]


def test_the_conda_recipe_requires_what_the_package_does():
    requirements = parsed("conda/recipe.yaml")["requirements"]
    assert set(requirements["host"][2:]) == in_conda_words(PYPROJECT["build-system"]["requires"])
    run = set(requirements["run"]) - SIGNATURES
    assert run == {"python >=${{ python_min }}"} | in_conda_words(PROJECT["dependencies"])
    extras = PROJECT["optional-dependencies"]
    families = in_conda_words(extras["lightning"] + extras["pytorch-lightning"])
    assert set(requirements["run_constraints"]) == families


def test_the_conda_recipe_installs_the_same_commands():
    scripts = [f"{name} = {function}" for name, function in PROJECT["scripts"].items()]
    assert parsed("conda/recipe.yaml")["build"]["python"]["entry_points"] == scripts


def test_all_supported_versions_of_python_are_tested():
    prefix = "Programming Language :: Python :: 3."
    supported = {classifier.removeprefix(prefix) for classifier in PROJECT["classifiers"] if prefix in classifier}
    jobs = parsed(ROOT / ".github" / "workflows" / "tests.yml")["jobs"]
    oldest = next(
        step["with"]["python-version"] for step in jobs["oldest"]["steps"] if "python-version" in step.get("with", {})
    )
    tested = {oldest, *jobs["newest"]["strategy"]["matrix"]["python"]}
    assert {f"3.{minor}" for minor in supported} == tested
    tools = PYPROJECT["tool"]
    lowest = {
        PROJECT["requires-python"].removeprefix(">="),
        parsed("conda/recipe.yaml")["context"]["python_min"],
        tools["mypy"]["python_version"],
        tools["ruff"]["target-version"].replace("py3", "3."),
    }
    assert lowest == {oldest}


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda workflow: workflow.name)
def test_make_has_every_target_that_a_workflow_calls(workflow):
    called = made_by(commands_of(workflow))
    assert called, "it calls the targets that continuous integration calls, so that both can be repeated by hand"
    assert called - targets() == set()


def test_make_has_every_target_that_the_guide_names():
    named = set(re.findall(r"`make ([a-z][\w-]*)`", (ROOT / "CONTRIBUTING.md").read_text()))
    assert {"lint", "test"} < named <= targets()


def test_workflows_do_everything_that_continuous_integration_does():
    in_workflows = {target for workflow in WORKFLOWS for target in made_by(commands_of(workflow))}
    assert made_by((ROOT / ".ci" / "run").read_text()) <= in_workflows


def test_the_repository_has_one_address():
    address, pages = PROJECT["urls"]["Homepage"], PROJECT["urls"]["Documentation"]
    owner = address.split("/")[-2]
    files = [file for part in ("*", "docs/**/*", ".github/**/*", "conda/*") for file in ROOT.glob(part)]
    text = "\n".join(
        file.read_text() for file in files if file.suffix in (".md", ".toml", ".yml", ".yaml", ".cff", ".rst")
    )
    owners = re.findall(r"github\.com/([\w-]+)/lightning-adpsgd", text)
    sites = re.findall(r"//([\w-]+)\.github\.io/lightning-adpsgd", text)
    assert set(owners) == set(sites) == {owner}
    assert f"https://{owner}.github.io/{PROJECT['name']}/" == pages == parsed("mkdocs.yml")["site_url"]
