"""What a round does, by names that ``torch.profiler`` shows."""

from typing import Literal

from torch.profiler import record_function

Name = Literal["handshake", "pack", "encode", "reduce", "decode", "measure", "unpack"]


def span(name: Name) -> record_function:
    """A context in which everything counts as one stage of a round: ``adpsgd::pack``, for example.

    "reduce" is the wait for what the workers reduce together; what it takes where nobody waits shows as c10d's own.
    """
    return record_function(f"adpsgd::{name}")
