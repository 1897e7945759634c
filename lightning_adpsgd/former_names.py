"""Names of version 0.1, which still work, with a warning that gives the new name."""

import warnings
from collections.abc import Callable
from typing import Any

from lightning_adpsgd.options import AveragingOptions

_ARGUMENTS = {"carrier": "async_group", "notice": "flags"}
_OPTIONS = ("stagger", "overlap", "reduce_dtype", "optimizer_state", "on_divergence")


class FormerNames:
    """Former names of :class:`LocalSGD`'s members."""

    options: AveragingOptions
    mark_synchronized: Callable[[], None]

    def __getattr__(self, name: str) -> Any:
        if name in _OPTIONS:
            warn_of_former_name(f"LocalSGD.{name}", f"LocalSGD.options.{name}")
            return getattr(self.options, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def start_from_the_same(self) -> None:
        """Former name of :meth:`LocalSGD.mark_synchronized`."""
        warn_of_former_name("LocalSGD.start_from_the_same", "LocalSGD.mark_synchronized")
        self.mark_synchronized()


def former_arguments(given: dict[str, Any], **by_former_name: Any) -> list[Any]:
    """The values of arguments that may be given by their former names.

    Args:
        given: unexpected keyword arguments.
        by_former_name: for each former name, the value given by the new name.

    Raises:
        TypeError: if there is any other unexpected argument.
    """
    unknown = [name for name in given if name not in by_former_name]
    if unknown:
        raise TypeError(f"LocalSGD() got an unexpected keyword argument {unknown[0]!r}")
    for name in given:
        warn_of_former_name(f"LocalSGD({name}=...)", f"LocalSGD({_ARGUMENTS[name]}=...)", stacklevel=4)
    return [given.get(name, value) for name, value in by_former_name.items()]


def warn_of_former_name(former: str, new: str, stacklevel: int = 3) -> None:
    """Warn that something has a new name."""
    warnings.warn(f"{former} is now called {new}; use that name.", FutureWarning, stacklevel=stacklevel)
