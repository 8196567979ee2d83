"""Where what can be made again is kept between runs."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return fedpriv's folder in the user's cache; nothing is written.

    Raises:
        RuntimeError: the user has no home, and XDG_CACHE_HOME is not set.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "fedpriv").expanduser()
