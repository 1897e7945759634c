"""What can go wrong between workers."""


class WorkersDisagreeError(RuntimeError):
    """The workers met for an averaging round, but not for the same one."""


class WorkersDivergedError(RuntimeError):
    """Parameters of at least one worker are not finite."""


class WorkerLostError(RuntimeError):
    """An averaging round could not be finished, because a worker has failed, was killed, or did not come in time.

    The process group is of no use any more. With gloo it has been destroyed, so that other workers notice at once; with
    NCCL it has been aborted.
    """
