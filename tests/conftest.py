"""Every test keeps Flower and Ray to itself: no telemetry, no cluster that happens to be there."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedpriv.reporting import terminal

# Ray's sockets lie below its folder and their paths may have 107 bytes, so it must be short.
_RAY_FOLDER = tempfile.mkdtemp(prefix="fp-", dir="/tmp")

os.environ |= {
    "RAY_ADDRESS": "local",
    "RAY_TMPDIR": _RAY_FOLDER,
    "RAY_USAGE_STATS_ENABLED": "0",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "OMP_NUM_THREADS": "1",
    "MPLBACKEND": "agg",
}


@pytest.fixture(autouse=True)
def _own_flower_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flwr"))


@pytest.fixture(autouse=True)
def _own_import_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """A config's folder of modules stays on the path: another test would find its own there."""
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture(autouse=True)
def _nothing_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine a command would say what it does, and an error would not be one line."""
    monkeypatch.setattr(terminal, "_SHORT", 3600.0)


_QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium, args=_QUIET)
        yield launched
        launched.close()
