"""What survives a crash: contents that are on the disk, and not on their way there."""

import os
from pathlib import Path


def fsync(path: Path) -> None:
    """Return when a file's contents, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
