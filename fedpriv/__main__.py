"""The command line: `fedpriv`, or `python -m fedpriv`."""

import os
import sys
import warnings

# What Python itself does not show of them outside of tests.
_QUIET = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)


def main() -> None:
    """Run the command line, whatever was inherited from whoever started it."""
    try:
        os.getcwd()
    except FileNotFoundError:  # which torch answers by ending the process
        sys.exit("error: the working directory is gone; change to one that is there")
    if any(option.startswith("error") for option in sys.warnoptions):
        # Libraries warn as they are imported: as errors, that would end every command and worker.
        warnings.resetwarnings()
        for category in _QUIET:
            warnings.simplefilter("ignore", category)
        os.environ.pop("PYTHONWARNINGS", None)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started it: `>&-`
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    # Imported here, as it imports the libraries.
    from fedpriv import cli

    cli.main()


if __name__ == "__main__":
    main()
