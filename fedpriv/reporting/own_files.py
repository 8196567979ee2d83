"""Files that fedpriv has written before and may write anew; whatever else is there stays."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from fedpriv.errors import InputError

MARKDOWN = "<!-- a report of fedpriv, which may write it anew -->"
"""The first line of a report in markdown, which nobody sees who reads it rendered."""

CSV_COLUMNS = ("run", "directory", "randomness", "contradictions")
"""What a report in CSV begins with."""

_PAGE = b'<meta name="generator" content="fedpriv">'
_PNG, _PNG_MARK = b"\x89PNG\r\n\x1a\n", b"tEXtSoftware\0fedpriv"
_SVG_MARK = b"<dc:title>fedpriv</dc:title>"
# Marks are near the start of a file.
_HEAD = 4096


def picture_mark(path: Path) -> dict[str, str]:
    """Return what matplotlib writes into a picture, beside it, so that it is known again."""
    return {"Creator": "fedpriv"} if path.suffix.lower() == ".svg" else {"Software": "fedpriv"}


def is_ours(path: Path) -> bool:
    """Say whether a file is a report or a picture that fedpriv wrote where it was asked to."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError:  # who may not read it cannot know
        return False
    return (
        (head.startswith(b"<!doctype html>") and _PAGE in head)
        or head.startswith((f"{MARKDOWN}\n".encode(), f"{','.join(CSV_COLUMNS)},".encode()))
        or (head.startswith(_PNG) and _PNG_MARK in head)
        or (head.startswith(b"<?xml") and _SVG_MARK in head)
        or (head.startswith(b"{") and _is_json_report(path))
    )


def require_replaceable(path: Path, option: str, ours: Callable[[Path], bool] = is_ours) -> None:
    """Check that nothing of somebody else's is lost where a file is written; `ours` are no loss.

    A device, a pipe and an empty file, as `mktemp` makes one, lose nothing.

    Raises:
        InputError: a file is there that is none of ours.
    """
    if path.is_file() and path.stat().st_size and not ours(path):
        raise InputError(
            f"{option}: {path} is there already, and fedpriv did not write it; name another file"
        )


def _is_json_report(path: Path) -> bool:
    try:
        runs = json.loads(path.read_bytes())["runs"]
        return bool(runs) and all({"ledger", "statement"} <= run.keys() for run in runs)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False
