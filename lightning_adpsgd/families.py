"""The two families of Lightning's classes: which of them is there, and the names of strategies registered in each.

``lightning.pytorch`` and ``pytorch_lightning`` are two packages with classes of the same names, which cannot be mixed.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

ROOMS = {"lightning.pytorch": "lightning_adpsgd.trainer", "pytorch_lightning": "lightning_adpsgd.pytorch_lightning"}
"""For each family, the package of this project that is made for its Trainer."""
FABRIC_ROOMS = {"lightning.fabric": "lightning_adpsgd.fabric", "lightning_fabric": "lightning_adpsgd.lightning_fabric"}
"""The same for Fabric."""


def room_of_the_family_in_use() -> str:
    """The package made for the family that is imported already; if both or none are, ``lightning`` comes first.

    Raises:
        ModuleNotFoundError: if none is installed.
    """
    for family, room in ROOMS.items():
        if family in sys.modules:
            return room
    for family, room in ROOMS.items():
        if importlib.util.find_spec(family.partition(".")[0]) is not None:
            return room
    raise ModuleNotFoundError(
        "lightning_adpsgd found neither `lightning` nor `pytorch-lightning`, and all but LocalSGD needs one of them."
        " Install one: pip install 'lightning-adpsgd[lightning]', or 'lightning-adpsgd[pytorch-lightning]'."
    )


def family_of(kind: type) -> str:
    """The family that a class is derived from.

    Raises:
        ImportError: if it is derived from none.
    """
    for family in ROOMS:
        if any(base.__module__.startswith(f"{family}.") for base in kind.__mro__):
            return family
    raise ImportError(f"{kind.__module__}.{kind.__name__}: expected a class derived from one of {' or '.join(ROOMS)}.")


def register_strategies() -> None:
    """Register the strategies' names in each family: now if it is imported, otherwise as soon as it is."""
    families = (*FABRIC_ROOMS, *ROOMS)
    for family in families:
        if family in sys.modules:
            _register_in(family)
    waiting = {family for family in families if family not in sys.modules}
    if waiting and not any(isinstance(finder, _AtImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AtImport(waiting))


def _register_in(family: str) -> None:
    importlib.import_module(f"{(ROOMS | FABRIC_ROOMS)[family]}.strategy").ADPSGDStrategy.register_strategies()


class _AtImport(MetaPathFinder):
    """Finds no module itself, but registers the names once a family has been imported."""

    def __init__(self, waiting: set[str]) -> None:
        self._waiting = waiting
        self._asking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self._waiting or self._asking:
            return None
        self._asking = True  # the other finders
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._asking = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: Any) -> None:
                execute(module)
                self._waiting.discard(fullname)
                _register_in(fullname)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
