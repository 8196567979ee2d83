"""What code from outside raises is told in one line, and names the line of that code."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from fedpriv.errors import FedprivError, InputError


@contextmanager
def told_as(what: str, kind: type[InputError] = InputError) -> Iterator[None]:
    """Tell whatever the body raises as `what: what it says (file, line)`.

    What fedpriv itself has to say passes as it is, and so does a lack of memory, which is the
    machine's.

    Raises:
        InputError: the body raised; of that `kind`.
    """
    try:
        yield
    except (FedprivError, MemoryError):
        raise
    except Exception as error:
        if _of_a_gpu(error):
            raise
        raise kind(f"{what}: {_failure(error, _beyond_the_body(error))}") from error


def failure_of(error: Exception) -> str:
    """Return what an exception says, and the line of whose code it is from."""
    return _failure(error, error.__traceback__)


def _failure(error: Exception, trace: TracebackType | None) -> str:
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    said = " ".join(str(error).split()) or type(error).__name__
    if trace is None:
        return said
    file = Path(trace.tb_frame.f_code.co_filename).name
    return f"{said} ({file}, line {trace.tb_lineno})"


def _beyond_the_body(error: Exception) -> TracebackType | None:
    """Return the frames of what the body called: its own line, a call with arguments, is ours."""
    here = error.__traceback__
    body = here.tb_next if here is not None else None
    return body.tb_next if body is not None else None


def _of_a_gpu(error: Exception) -> bool:
    """Say whether it is a GPU's memory that was too small; without torch there is none."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)
