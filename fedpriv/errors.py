"""The errors that end a command, each with the exit code that the command line gives it."""


class FedprivError(Exception):
    """A failure that is reported as one line on standard error, without a traceback."""

    exit_code = 1


class InputError(FedprivError):
    """What the user gave is wrong: the message names the key or file and how to mend it."""

    exit_code = 2


class Diverged(InputError):  # noqa: N818 - says what became of a run
    """What a round released made a model that no later round can teach anything.

    It is a function of what was released: a tuning counts such a trial, as the worst of all.
    """


class DamagedFile(FedprivError):  # noqa: N818 - says what is wrong, as the others do
    """A file that fedpriv wrote is not what it wrote; no InputError, which a run might skip."""

    exit_code = 2


class EnvironmentFault(FedprivError):  # noqa: N818 - says whose fault it is, as the others do
    """Files cannot be reached, for a reason that lies in the machine and in nobody's data.

    No InputError, which a run might count as a bad recording and go on: a missing disk would cost
    ε in every round, for noise alone.
    """

    exit_code = 2


class Interrupted(FedprivError):  # noqa: N818 - a request of the user, not an error
    """The user asked the run to stop; every finished round is kept and it can be resumed."""

    exit_code = 130


class WorkerLost(FedprivError):  # noqa: N818 - mostly mended by resuming the run
    """Simulated nodes died again and again, or on a grid that does not replace them."""


class ClientFault(FedprivError):  # noqa: N818 - carries what the client raised
    """The client code raised: a bug, which running on would only hide."""


class ClaimRefuted(FedprivError):  # noqa: N818 - what an audit found
    """A lower bound on ε exceeds the ε that is accounted for."""


class BudgetError(FedprivError):
    """The privacy budget does not allow (another) round."""

    exit_code = 3
