"""Read idx files, the format of MNIST and its relatives.

An idx file is: two zero bytes, a type code, the number of dimensions, one big-endian uint32 for
each dimension, then the values in row-major order.
"""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedpriv.data.files import unreachable
from fedpriv.errors import InputError

IDX_TYPES: dict[int, np.dtype[np.integer]] = {0x08: np.dtype(np.uint8), 0x0C: np.dtype(">i4")}
GZIP_MAGIC = b"\x1f\x8b"


def find_idx(path: Path) -> Path | None:
    """Find the file under its plain name or with `.gz` added or removed; None when absent."""
    other = path.with_suffix("") if path.suffix == ".gz" else path.with_name(path.name + ".gz")
    return next((candidate for candidate in (path, other) if candidate.is_file()), None)


def read_idx(path: Path) -> NDArray[np.integer]:
    """Read an idx file, compressed or not, found with or without its `.gz` suffix.

    Returns a writable array in native byte order: uint8 (type 0x08) or int32 (type 0x0c).
    Raises InputError, naming the file, when it is absent, unreadable, of another type, or does
    not hold exactly the bytes that its header announces.
    """
    found = find_idx(path)
    if found is None:
        raise InputError(f"{path}: no such file, with or without .gz")
    content = _read_bytes(found)
    dtype, shape = _parse_header(found, content)
    start = 4 + 4 * len(shape)
    expected = start + math.prod(shape) * dtype.itemsize
    if len(content) != expected:
        problem = "truncated idx file" if len(content) < expected else "trailing bytes after data"
        raise InputError(
            f"{found}: {problem}: expected {expected} bytes for shape {shape}, found {len(content)}"
        )
    return (
        np.frombuffer(content, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))
    )


def _read_bytes(path: Path) -> bytes:
    """Read the whole file, decompressed if its content (not its name) says gzip."""
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if raw.startswith(GZIP_MAGIC) else raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: corrupt gzip file: {error}") from error
    except OSError as error:
        raise unreachable(path, error) from None


def _parse_header(path: Path, content: bytes) -> tuple[np.dtype[np.integer], tuple[int, ...]]:
    if len(content) < 4:
        raise InputError(
            f"{path}: truncated idx file: expected at least 4 header bytes, found {len(content)}"
        )
    zeros, code, dimensions = struct.unpack(">HBB", content[:4])
    if zeros != 0 or code not in IDX_TYPES:
        raise InputError(
            f"{path}: wrong idx magic: expected 00 00 08 (uint8) or 00 00 0c (int32), "
            f"found {content[:3].hex(' ')}"
        )
    if len(content) < 4 + 4 * dimensions:
        raise InputError(
            f"{path}: truncated idx file: expected {4 + 4 * dimensions} header bytes, "
            f"found {len(content)}"
        )
    return IDX_TYPES[code], struct.unpack(f">{dimensions}I", content[4 : 4 + 4 * dimensions])
