"""Errors that callers distinguish: a bad request, a bad sample of the data, a loss that is not finite."""


class UserError(Exception):
    """A request that cannot be carried out: one line that says what is wrong and what to do.

    The command line prints the message and exits with code 2. Programming errors raise anything else.
    """


class BadSample(Exception):
    """One sample that cannot be used (undecodable, over the pixel limit, no caption, altered); the message is the reason."""


class NonFiniteLoss(ValueError):
    """A loss whose value is not finite. The message names the input row that caused it."""
