"""The errors that end a command, each with the exit code that the command line gives it."""


class FedprivError(Exception):
    """A failure that is reported as one line on standard error, without a traceback."""

    exit_code = 1


class InputError(FedprivError):
    """What the user gave is wrong: the message names the key or file and how to mend it."""

    exit_code = 2


class BudgetError(FedprivError):
    """The privacy budget does not allow (another) round."""

    exit_code = 3
