"""How a contender is led through its rounds: it stops between them until it is told to go on.

This side runs in the contender, which may be in an environment of its own: nothing but the
standard library is used.
"""

from __future__ import annotations

import os
import sys

IDLE = "@idle"
"""What a contender prints at the beginning of a line when all work so far is done."""


def pause(trained: int) -> None:
    """Say that all work so far is done, and wait for the word to go on.

    A contender pauses before each round and after the last one. `trained` is the number of users
    that were trained since it last paused: those whose worker died or raised do not count.
    """
    print(IDLE, trained, flush=True)
    if not sys.stdin.readline():
        # The benchmark has ended before us. Workers end with this process; threads would not.
        os._exit(1)
