"""The errors that concern several workers."""


class WorkersDisagreeError(RuntimeError):
    """The workers are not about to do the same thing, such as the same averaging round."""


class WorkersDivergedError(RuntimeError):
    """Parameters of at least one worker are not finite."""


class WorkerLostError(RuntimeError):
    """A collective could not be completed: a worker has failed, was killed, or did not join in time.

    The process group is no longer usable: with gloo it was destroyed, so that other workers notice at once; with NCCL
    it was aborted.
    """
