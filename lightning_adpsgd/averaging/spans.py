"""Names the stages of a round for ``torch.profiler``."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

from torch.autograd import profiler

Name = Literal["handshake", "pack", "encode", "reduce", "decode", "measure", "unpack"]

_NOTHING: AbstractContextManager[Any] = nullcontext()


def span(name: Name) -> AbstractContextManager[Any]:
    """A context that a profile shows as one stage of a round: ``adpsgd::pack``, for example.

    "reduce" is the wait for a reduction; the collectives themselves appear under c10d's own names. Without a profiler
    the context costs next to nothing, so it can be used in short loops.
    """
    if not getattr(profiler, "_is_profiler_enabled", True):  # there is no public way to ask
        return _NOTHING
    return profiler.record_function(f"adpsgd::{name}")
