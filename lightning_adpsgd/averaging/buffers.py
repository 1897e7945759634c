"""Finds the buffers of a module that are averaged, and their names."""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn

from lightning_adpsgd.averaging.layout import has_mean


class AveragedBuffers:
    """The buffers of a module that rounds average: persistent ones with a floating-point or complex dtype.

    A buffer that is not persistent is a cache (positions, a mask) that the module can rebuild. Its shape may depend on
    the worker's own batch.

    Args:
        module: the module; its submodules are included.
        exclude: ``fnmatch`` patterns of the names of buffers to leave out.
    """

    def __init__(self, module: nn.Module, exclude: Sequence[str] = ()) -> None:
        self._module = module
        self._exclude = exclude
        self._included: dict[tuple[nn.Module, str], bool] = {}

    def tensors(self) -> list[Tensor]:
        """The current buffers."""
        return [buffer for *_, buffer in self._found()]

    def named(self) -> dict[str, Tensor]:
        """The current buffers, by their full names."""
        names = self._names()
        return {names[part, name]: buffer for part, name, buffer in self._found()}

    def _found(self) -> Iterator[tuple[nn.Module, str, Tensor]]:
        """Each buffer: its module, its own name there, and itself."""
        # named_buffers() is slow, and does not tell which buffers are persistent. No public method does.
        parts, seen = [self._module], {self._module}
        while parts:
            part = parts.pop()
            for name, buffer in part._buffers.items():
                if buffer is None or not has_mean(buffer) or name in part._non_persistent_buffers_set:
                    continue
                if not self._exclude or self._is_included(part, name):
                    yield part, name, buffer
            for child in part._modules.values():
                if child is not None and child not in seen:
                    seen.add(child)
                    parts.append(child)

    def _is_included(self, part: nn.Module, name: str) -> bool:
        if (part, name) not in self._included:
            self._included = {
                place: not any(fnmatchcase(full_name, pattern) for pattern in self._exclude)
                for place, full_name in self._names().items()
            }
        return self._included.get((part, name), True)

    def _names(self) -> dict[tuple[nn.Module, str], str]:
        return {
            (part, name): f"{prefix}.{name}" if prefix else name
            for prefix, part in self._module.named_modules()
            for name in part._buffers
        }
