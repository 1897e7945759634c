"""The package's parts: which may import which, and how large files and classes may grow."""

import ast
from importlib.util import resolve_name
from pathlib import Path

import pytest

import lightning_adpsgd
from tests.hidden import run

PACKAGE = Path(lightning_adpsgd.__file__).parent
LIGHTNING = ("lightning", "lightning_fabric", "pytorch_lightning")
DOORS = ("trainer", "fabric", "ray")
BELOW = {  # each part, and those that it must not import
    "periods": ("averaging", "rounds", "workers", "options", "local_sgd", "session", *DOORS),
    "workers": ("periods", "averaging", "rounds", "options", "local_sgd", "session", *DOORS),
    "averaging": ("periods", "rounds", "options", "local_sgd", "session", *DOORS),
    "rounds": ("periods", "local_sgd", "session", *DOORS),
    "options.py": (
        "averaging.averager",
        "averaging.tensors",
        "rounds",
        "workers",
        "local_sgd",
        "session",
        *DOORS,
    ),
    "local_sgd.py": ("session", *DOORS),
    "session.py": DOORS,
    "trainer": ("fabric", "ray"),
    "fabric": ("trainer", "ray"),
    "ray": ("fabric", "session"),
    "history.py": ("periods", "local_sgd", "session", *DOORS),
    "trainer/monitor.py": ("periods", "local_sgd", "trainer.strategy"),
    "trainer/strategy.py": ("trainer.monitor",),
}


def files_of(part):
    path = PACKAGE / part
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


def module_of(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def names_used_by(path, when_imported=False):
    """Dotted names of all that a file imports (perhaps only while it is imported), and of every ``torch.something``."""
    module = module_of(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in tree.body if when_imported else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = resolve_name("." * node.level + (node.module or ""), package)
            names |= {f"{origin}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            names.add(f"torch.{node.attr}")
    return names


def forbidden_in(files, forbidden):
    return [
        f"{file.relative_to(PACKAGE)}: {name}"
        for file in files
        for name in sorted(names_used_by(file))
        if any(name == other or name.startswith(f"{other}.") for other in forbidden)
    ]


@pytest.mark.parametrize("part", BELOW)
def test_a_part_imports_nothing_it_must_not_know(part):
    assert forbidden_in(files_of(part), [f"lightning_adpsgd.{room}" for room in BELOW[part]]) == []


def test_one_file_imports_each_family_of_lightning():
    importing = {str(file.relative_to(PACKAGE)) for file in files_of(".") if forbidden_in([file], LIGHTNING)}
    families = {f"{room}/family.py" for room in ("trainer", "pytorch_lightning", "fabric", "lightning_fabric")}
    for_type_checkers = {"pytorch_lightning/__init__.py", "lightning_fabric/__init__.py"}
    assert importing == {"trainer/__init__.py", *families, *for_type_checkers}


def test_only_workers_uses_torch_distributed():
    users = {file.parent.name for file in files_of(".") if forbidden_in([file], ("torch.distributed",))}
    assert users == {"workers"}


def test_no_two_modules_import_each_other():
    modules = {module_of(file): file for file in files_of(".")}
    imports = {
        module: {other for other in modules if any(name == other or name.startswith(f"{other}.") for name in names)}
        - {module}
        for module, file in modules.items()
        for names in [names_used_by(file, when_imported=True)]
    }
    packages = {module for module, file in modules.items() if file.name == "__init__.py"}
    imports = {module: found - packages for module, found in imports.items() if module not in packages}
    while True:
        leaves = {module for module, found in imports.items() if not found}
        if not leaves:
            break
        imports = {module: found - leaves for module, found in imports.items() if module not in leaves}
    assert imports == {}


def test_no_file_and_no_class_is_too_long_to_be_read_at_once():
    for file in files_of("."):
        text = file.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 330, file
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef) and node.end_lineno is not None:
                assert node.end_lineno - node.lineno < 250, (file, node.name)


def test_no_two_files_of_tests_have_one_name():
    names = [file.name for file in (PACKAGE.parent / "tests").rglob("*.py")]
    twice = {name for name in names if names.count(name) > 1}
    assert twice == {"__init__.py", "conftest.py"}  # which have to be called that


def test_local_sgd_works_where_lightning_is_not_installed():
    script = """
import sys
import torch
from lightning_adpsgd import AdaptivePeriod, LocalSGD

optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
local_sgd = LocalSGD(optimizer, AdaptivePeriod(), total_steps=4)
for _ in range(4):
    local_sgd.step()
assert not any(name.startswith("lightning.") or name == "lightning" for name in sys.modules)
try:
    from lightning_adpsgd import ADPSGDStrategy
except ModuleNotFoundError as error:
    print(error)
"""
    assert "lightning" in run(script, *LIGHTNING)
