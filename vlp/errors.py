"""The two ways in which input can be bad: the user's request, or one sample of the data."""


class UserError(Exception):
    """A request that cannot be carried out: one line that says what is wrong and what to do.

    The command line prints the message and exits with code 2. Programming errors raise anything else.
    """


class BadSample(Exception):
    """One sample that cannot be used (undecodable, over the pixel limit, no caption, altered); the message is the reason."""
