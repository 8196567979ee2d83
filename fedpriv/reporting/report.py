"""The report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedpriv.reporting.reader import read_run


def write_report(directories: Sequence[Path], output: Path | None = None) -> Path:
    """Write the report."""
    for path in directories:
        read_run(path)
    target = output or directories[0] / "report.html"
    target.write_text("<!doctype html><title>fedpriv</title>", encoding="utf-8")
    return target
