"""Reasons why something could not be measured."""


class NotMeasuredError(RuntimeError):
    """Something cannot be measured here, or a measurement has failed."""


class HostsUnavailableError(NotMeasuredError):
    """This machine or this user cannot make network namespaces."""


class RankFailedError(NotMeasuredError):
    """A rank could not carry out an order, or has ended."""
