"""What tells the data of one run from those of another: a digest that is cheap to take.

A run's noise derives from its seed and from this digest, so that runs on different data share
none: the difference of their releases would be free of noise. It is a function of private data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

# So many bytes are read of all files together, an equal part of each. A file that is larger than
# its part is known by its size, and by pieces of so many bytes at beginning, middle and end.
_WHOLE = 5 * 2**30
_PIECE = 4096
# Read at once.
_BLOCK = 2**20
# Files are mostly waited for.
_THREADS = 8


class Content:
    """The digest of a data set's users, fed user by user, in the order of their ids."""

    def __init__(self, settings: str) -> None:
        self._sha256 = hashlib.sha256()
        self.add(settings.encode())

    def add(self, part: bytes) -> None:
        """Add a part, with its length: parts cannot run into one another."""
        self._sha256.update(len(part).to_bytes(8, "big"))
        self._sha256.update(part)

    def add_user(self, user_id: str, examples: int) -> None:
        """Begin a user, who has so many examples."""
        self.add(user_id.encode("utf-8", "surrogatepass"))
        self.add(examples.to_bytes(8, "big"))

    def add_tensor(self, tensor: Tensor) -> None:
        """Add the shape, type and numbers of a tensor."""
        numbers = tensor.cpu().contiguous().numpy()
        self.add(f"{numbers.dtype} {numbers.shape}".encode())
        self.add(numbers.tobytes())

    def hexdigest(self) -> str:
        """Return the SHA-256 of all that was added."""
        return self._sha256.hexdigest()


class Files:
    """Reads of files what tells them apart: all of them, where that is not too much."""

    def __init__(self, number: int) -> None:
        self._whole = _WHOLE // max(1, number)
        self._pool = ThreadPoolExecutor(_THREADS)

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *failure: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def digests(self, paths: Sequence[str | Path]) -> Iterable[bytes]:
        """Return the SHA-256 of name, size and bytes of each file; its folder does not count."""
        return self._pool.map(self._digest, paths)

    def _digest(self, path: str | Path) -> bytes:
        told = hashlib.sha256(Path(path).name.encode("utf-8", "surrogateescape"))
        try:
            with Path(path).open("rb") as file:
                size = file.seek(0, 2)
                told.update(size.to_bytes(8, "big"))
                if size <= max(self._whole, 3 * _PIECE):
                    pieces = [(0, size)]
                else:
                    places = (0, (size - _PIECE) // 2, size - _PIECE)
                    pieces = [(place, _PIECE) for place in places]
                for place, length in pieces:
                    file.seek(place)
                    for read in range(0, length, _BLOCK):
                        told.update(file.read(min(_BLOCK, length - read)))
        except OSError:
            told.update(b"cannot be read")
        return told.digest()
