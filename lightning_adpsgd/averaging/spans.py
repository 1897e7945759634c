"""What a round does, by names that ``torch.profiler`` shows."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

from torch.autograd import profiler

Name = Literal["handshake", "pack", "encode", "reduce", "decode", "measure", "unpack"]

_NOTHING: AbstractContextManager[Any] = nullcontext()


def span(name: Name) -> AbstractContextManager[Any]:
    """A context in which everything counts as one stage of a round: ``adpsgd::pack``, for example.

    "reduce" is the wait for what the workers reduce together; the collectives themselves show under c10d's own names.
    Without a profiler it is next to nothing, so that short loops can be told apart too.
    """
    if not getattr(profiler, "_is_profiler_enabled", True):  # there is no public way to ask
        return _NOTHING
    return profiler.record_function(f"adpsgd::{name}")
