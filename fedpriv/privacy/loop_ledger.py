"""The ledger of a training loop that is somebody else's, which no config describes."""

from __future__ import annotations

import secrets
from dataclasses import replace
from pathlib import Path

from fedpriv.errors import InputError
from fedpriv.privacy.ledger import Header, Ledger, read_ledger

_BEGINNING = b'{"kind": "header"'


def loop_ledger(path: Path, header: Header) -> Ledger:
    """Begin the ledger at `path`, or go on with it.

    Its fingerprint is drawn when it begins: nothing else tells two loops of equal settings apart,
    whose releases add up.

    Raises:
        InputError: the file is damaged or another ledger, or cannot be written.
    """
    try:
        # With less than a header the process died before anything could be charged.
        if path.exists() and not _torn(path.read_bytes()):
            begun_with = read_ledger(path).header.fingerprint
            return Ledger.open(path, replace(header, fingerprint=begun_with))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        return Ledger.create(path, replace(header, fingerprint=secrets.token_hex(32)))
    except OSError as error:
        raise InputError(f"ledger: cannot write {path} ({error.strerror})") from None


def _torn(content: bytes) -> bool:
    return b"\n" not in content and content.startswith(_BEGINNING[: len(content)])


def require_small(delta: float, population: int, of_whom: str) -> None:
    """Check δ against how many are protected.

    Raises:
        InputError: it is so large that publishing one of them at random could meet it.
    """
    if delta >= 1 / population:
        raise InputError(
            f"delta must be below 1/{of_whom} ({1 / population:.3g} for {population}), got "
            f"{delta:g}"
        )
