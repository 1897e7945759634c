"""Lightning's private names are used in one file for each door, and never by accident."""

import ast
import importlib
import inspect
import re
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Callback, Timer
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO, async_plugin

import lightning_adpsgd
from lightning_adpsgd.trainer.compat import snapshot, time_checks

PACKAGE = Path(lightning_adpsgd.__file__).parent
PLACES = (PACKAGE / "trainer" / "compat.py", PACKAGE / "fabric" / "compat.py")
LIGHTNING = ("lightning", "lightning_fabric", "pytorch_lightning")
TORCH = ("torch",)  # has private names of its own, which are not Lightning's
OF_NAMED_TUPLES = ("_fields", "_make", "_replace", "_asdict")  # public, despite their underscore
OF_TORCH = tuple(name for owner in (torch.nn.Module(), torch.ones(1)) for name in dir(owner) if name.startswith("_"))
BY_NAME = ("getattr", "setattr", "hasattr", "delattr")


def is_private(name):
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def modules():
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def definitions(class_):
    """The private names that a class defines: methods, class variables, and attributes of ``self``."""
    names = set()
    for node in ast.walk(class_):
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            names.add(node.attr)
    return {name for name in names if is_private(name)}


def is_self(node):
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def classes(trees):
    """For each class by name: the names of its bases, and its own private names. Doors have classes of one name."""
    found = {}
    for node in (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        bases, names = found.setdefault(node.name, ([], set()))
        bases += [base.id for base in node.bases if isinstance(base, ast.Name)]
        names |= definitions(node)
    return found


def own_names(name, known):
    bases, names = known.get(name, ([], set()))
    return names.union(*(own_names(base, known) for base in bases))


def roots(tree, of):
    """The names in a file under which modules of ``of`` are known."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {
                alias.asname or alias.name.split(".")[0] for alias in node.names if alias.name.split(".")[0] in of
            }
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] in of:
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def imports(tree):
    """Private names of Lightning, or in private modules of Lightning, that a file imports."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            root, *others = name.split(".")
            if root in LIGHTNING and any(map(is_private, others)):
                yield node.lineno, name


def attributes(tree, known):
    """Private attributes that a file uses and that are not its own, by attribute or by name.

    An attribute of anything but ``self`` counts as the file's own if a class in the same file has its name.
    """
    torch_roots = roots(tree, TORCH)
    in_this_file = set().union(*(names for _, names in classes([tree]).values()))
    owners = {
        id(inner): node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        name, value = reached(node)
        if name is None or not is_private(name) or name in OF_NAMED_TUPLES or name in OF_TORCH:
            continue
        if is_self(value) or is_super(value):
            if name not in own_names(owners.get(id(node)), known):
                yield node.lineno, ast.unparse(node)
        elif root_of(value) not in torch_roots and name not in in_this_file:
            yield node.lineno, ast.unparse(node)


def reached(node):
    """The name of an attribute that a node uses, and whose it is."""
    if isinstance(node, ast.Attribute):
        return node.attr, node.value
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in BY_NAME:
        owner, name = node.args[:2]
        return (name.value, owner) if isinstance(name, ast.Constant) and isinstance(name.value, str) else (None, None)
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str):
        if isinstance(node.value, ast.Attribute) and node.value.attr == "__dict__":
            return node.slice.value, node.value.value
        if isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "vars":
            return node.slice.value, node.value.args[0]
    return None, None


def is_super(node):
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"


def root_of(node):
    while isinstance(node, ast.Attribute | ast.Call):  # what torch's functions return is torch's
        node = node.value if isinstance(node, ast.Attribute) else node.func
    return node.id if isinstance(node, ast.Name) else None


def found_in(source):
    tree = ast.parse(dedent(source))
    return [what for _, what in (*imports(tree), *attributes(tree, classes([tree])))]


def test_one_file_of_each_door_has_all_private_names_of_lightning():
    trees = modules()
    known = classes(trees.values())
    places = [
        f"{path.relative_to(PACKAGE.parent)}:{line}: {what}"
        for path, tree in trees.items()
        if path not in PLACES
        for line, what in (*imports(tree), *attributes(tree, known))
    ]
    assert places == []


@pytest.mark.parametrize("place", PLACES, ids=["trainer", "fabric"])
def test_these_files_have_some(place):
    tree = modules()[place]
    assert list(attributes(tree, classes([tree])))


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from lightning.pytorch.core import _x", ["lightning.pytorch.core._x"]),
        ("from lightning.pytorch._graveyard import x", ["lightning.pytorch._graveyard.x"]),
        ("import pytorch_lightning._x.y as z", ["pytorch_lightning._x.y"]),
        ("def f():\n    from lightning_fabric.x import (a, _b as b)", ["lightning_fabric.x._b"]),
        ("trainer._signal_connector.x", ["trainer._signal_connector"]),
        ("a.b().c._d = 3", ["a.b().c._d"]),
        ("import lightning as L\nL.pytorch._x", ["L.pytorch._x"]),
        ("getattr(trainer, '_x', None)", ["getattr(trainer, '_x', None)"]),
        ("vars(trainer)['_x']", ["vars(trainer)['_x']"]),
        ("trainer.__dict__['_x']", ["trainer.__dict__['_x']"]),
        ("class A(Strategy):\n    def f(self):\n        return self._launcher", ["self._launcher"]),
        ("class A(Strategy):\n    def f(self):\n        super()._f()", ["super()._f"]),
        ("def f(self):\n    self._x", ["self._x"]),
    ],
)
def test_private_name_of_another_library_is_found(source, found):
    assert found_in(source) == found


@pytest.mark.parametrize(
    "source",
    [
        "from lightning.pytorch import Trainer\nTrainer.__init__.__name__",
        "from lightning_adpsgd.trainer.compat import current_hook",
        "from torch.x import _y\nimport torch\ntorch._foreach_norm([])\nimport torch.distributed as dist\ndist.a._b()",
        "from __future__ import annotations\nimport _thread",
        "AveragingRound._fields",
        "_x = 3\nprint(_x)",
        "class A:\n    _y = 3\n    def f(self, other):\n        self._x = other._x + self._y",
        "class A:\n    def _x(self): ...\nclass B(A):\n    def f(self):\n        return self._x() + super()._x()",
        "getattr(trainer, 'x')\ngetattr(trainer, name)\nvars(trainer)[name]\n{}['_x']",
    ],
)
def test_own_and_public_names_are_not_reported(source):
    assert found_in(source) == []


def subclasses_of_lightning():
    for path, tree in modules().items():
        module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        if path.name == "__main__.py":
            continue
        for name, (_, names) in classes([tree]).items():
            class_ = getattr(importlib.import_module(module.removesuffix(".__init__")), name, None)
            if class_ is not None and any(base.__module__.split(".")[0] in LIGHTNING for base in class_.__mro__):
                yield pytest.param(class_, names, id=name)


def test_what_is_written_in_the_background_is_a_copy_where_lightning_takes_none(monkeypatch):
    weights = torch.zeros(3)
    background = AsyncCheckpointIO()
    monkeypatch.delattr(async_plugin, "_clone_tensor", raising=False)
    copied = snapshot({"state_dict": {"w": weights}, "epoch": 1}, background)
    at_once = snapshot({"state_dict": {"w": weights}}, TorchCheckpointIO())
    weights += 1
    assert copied["state_dict"]["w"].tolist() == [0, 0, 0]
    assert copied["epoch"] == 1
    assert at_once["state_dict"]["w"] is weights
    background.teardown()


def test_only_timers_with_a_limit_look_at_the_clock_at_every_step():
    limited, of_epochs, unlimited = Timer({"hours": 1}), Timer({"hours": 1}, interval="epoch"), Timer(None)
    trainer = SimpleNamespace(callbacks=[unlimited, limited, of_epochs, Callback()])
    assert [timer for timer, _ in time_checks(trainer)] == [limited]
    assert all(callable(getattr(*check)) for check in time_checks(trainer))


@pytest.mark.parametrize(("class_", "names"), [*subclasses_of_lightning()])
def test_own_private_name_is_not_one_that_lightning_uses(class_, names):
    theirs = set()
    for base in class_.__mro__:
        if base.__module__.split(".")[0] in LIGHTNING:
            theirs |= {*vars(base), *re.findall(r"\b(?:self|cls|super\(\))\.(_\w+)", inspect.getsource(base))}
    assert theirs
    assert names & theirs == set()
