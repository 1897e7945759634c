"""The stages of an averaging round, from the spans that the package sets for PyTorch's profiler."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch.profiler import ProfilerActivity, profile

PREFIX = "adpsgd::"
SPANS = ("handshake", "pack", "encode", "reduce", "decode", "measure", "unpack")


class Taken(NamedTuple):
    """What all spans of one name took."""

    seconds: float = 0.0
    calls: int = 0


@contextmanager
def recorded_spans() -> Iterator[dict[str, Taken]]:
    """Record the spans within this context.

    Yields:
        A dict that is empty until the context ends, and then has an entry for each of ``SPANS``: the time that the
        host spent in it, without other spans inside. A span that did not occur has 0 calls.
    """
    taken: dict[str, Taken] = {}
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        yield taken
    taken |= dict.fromkeys(SPANS, Taken())
    for event in recorded.events():
        if not event.name.startswith(PREFIX):
            continue
        seconds = event.cpu_time_total / 1e6
        _add(taken, event.name, seconds, 1)
        outer = event.cpu_parent
        while outer is not None and not outer.name.startswith(PREFIX):
            outer = outer.cpu_parent
        if outer is not None:
            _add(taken, outer.name, -seconds, 0)


def _add(taken: dict[str, Taken], name: str, seconds: float, calls: int) -> None:
    name = name.removeprefix(PREFIX)
    before = taken.get(name, Taken())
    taken[name] = Taken(before.seconds + seconds, before.calls + calls)
