"""Which of a module's buffers are averaged, and under which names people know them."""

from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn

from lightning_adpsgd.averaging.layout import has_mean


def averaged_buffers(module: nn.Module, exclude: Sequence[str] = ()) -> Iterator[tuple[str, Tensor]]:
    """The buffers of a module that rounds average, with their names: those that it saves, and that have a mean.

    A buffer that is not persistent is a cache (of positions, of a mask), which a module makes anew when it needs it.
    Its shape may depend on the worker's own batch.

    Args:
        module: with its submodules.
        exclude: patterns, as of ``fnmatch``, of names that are left out.
    """
    names = {(part, name): full_name for part, name, full_name in buffer_names(module)}
    for part, name, buffer in buffers_of(module, lambda part, name: not matches(names[part, name], exclude)):
        yield names[part, name], buffer


def buffers_of(
    module: nn.Module, is_included: Callable[[nn.Module, str], bool]
) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Each averaged buffer: its module, its own name there, and itself.

    Args:
        module: with its submodules.
        is_included: whether a buffer, of a module and a name, is one of them.
    """
    # Not by named_buffers(), which is slow, and does not tell which are persistent: there is no public way to ask that.
    parts, seen = [module], {module}
    while parts:
        part = parts.pop()
        if part._buffers:
            for name, buffer in part._buffers.items():
                if buffer is None or not has_mean(buffer) or name in part._non_persistent_buffers_set:
                    continue
                if is_included(part, name):
                    yield part, name, buffer
        for child in part._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                parts.append(child)


def buffer_names(module: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """Each buffer: its module, its own name there, and its full name."""
    for prefix, part in module.named_modules():
        for name in part._buffers:
            yield part, name, f"{prefix}.{name}" if prefix else name


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name fits any of the patterns, as of :mod:`fnmatch`."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)
