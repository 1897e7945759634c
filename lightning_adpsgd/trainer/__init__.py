"""The door to Lightning: the strategy, the monitor and the command line, with the classes of ``lightning.pytorch``."""

# First, because the strategies' names are registered as soon as it has been imported.
import lightning.pytorch  # noqa: F401
