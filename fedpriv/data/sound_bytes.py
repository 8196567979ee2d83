"""A sound file's bytes on their way to the decoder, and what its header says of their number."""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from fedpriv.data.mpeg import find_mp3
from fedpriv.errors import InputError

PIPED = 0x7FFF0000
"""From this size on a wav header means "unknown": it was written into a pipe."""

_PAGE_HEADER = 27
_LARGEST_PAGE = _PAGE_HEADER + 255 + 255 * 255
_LAST_PAGE = 4
_STREAM = slice(14, 18)
"""Of ogg: what a page begins with, ending in the number of sizes that follow; the flag in it of
the last page; and the number of the stream that the page is of."""


class SoundBytes:
    """The bytes of a sound file, as a context manager and as a file object for soundfile.

    A FLAC header's number of samples is hidden, for libsndfile would stop there even if more
    follow; `promised` is that number, 0 for unknown. An mp3 file's number of frames is corrected
    where there are more, and added where it is missing. Where the disk fails, the decoder, which
    cannot be told, meets the end of the file, and the error is raised when the file is closed.
    """

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises OSError, ValueError for a name that no file can have, and InputError for no file, an
        empty one, or a wav file that has less or more sound than its header says.
        """
        # O_NONBLOCK: opening a pipe would wait for somebody to write into it.
        self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        self._error: OSError | None = None
        self.promised = self._position = self._size = 0
        self._hidden: dict[int, int] = {}
        self._prefix, self._skipped = b"", 0
        try:
            status = os.fstat(self._descriptor)
            if stat.S_ISDIR(status.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if not stat.S_ISREG(status.st_mode):
                raise InputError(f"{path}: not a file; replace it")
            self._size = status.st_size
            if self._size == 0:
                raise InputError(f"{path}: empty, 0 bytes; replace it")
            start = self._after_tag()
            self._require_whole_wav(path, start)
            self._require_whole_ogg(path, start)
            self._hide_flac_length(start)
            self._count_mp3_frames(start)
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the file; raise what the disk answered, whatever the decoder made of it."""
        os.close(self._descriptor)
        if self._error is not None:
            raise self._error

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move the position and return it."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: memoryview) -> int:
        """Fill `buffer` from the position on; return how many bytes there were."""
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def read(self, count: int) -> bytes:
        """Return the next `count` bytes, or as many as there are."""
        first, prefix = self._position, self._prefix[self._position :][:count]
        try:
            content = prefix or self._at(first - len(self._prefix) + self._skipped, count)
        except OSError as error:
            self._error = error
            return b""
        self._position += len(content)
        hidden = {at - first: byte for at, byte in self._hidden.items()}
        if any(0 <= at < len(content) for at in hidden):
            content = bytes(hidden.get(at, byte) for at, byte in enumerate(content))
        return content

    def _at(self, position: int, count: int) -> bytes:
        return os.pread(self._descriptor, count, position)

    def _after_tag(self) -> int:
        """Return where the sound's own format begins: after an ID3 tag, if there is one."""
        tag = self._at(0, 10)
        if not tag.startswith(b"ID3") or len(tag) < 10:
            return 0
        return 10 + sum(byte << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0), strict=True))

    def _count_mp3_frames(self, start: int) -> None:
        mp3 = find_mp3(self._at, start)
        if mp3 is None:
            return
        if mp3.promised is None:
            self._prefix, self._skipped = mp3.counted_frame(), mp3.first
            self._size += len(self._prefix) - self._skipped
        elif mp3.promised < mp3.frames:
            places = range(mp3.promised_at, mp3.promised_at + 4)
            self._hidden = dict(zip(places, mp3.frames.to_bytes(4, "big"), strict=True))

    def _hide_flac_length(self, start: int) -> None:
        """Note the number of samples that STREAMINFO has, and let the decoder see 0 for it."""
        header = self._at(start, 26)
        if len(header) < 26 or not header.startswith(b"fLaC"):
            return
        self.promised = (header[21] & 0x0F) << 32 | int.from_bytes(header[22:26], "big")
        self._hidden = {start + 21: header[21] & 0xF0} | dict.fromkeys(
            range(start + 22, start + 26), 0
        )

    def _require_whole_wav(self, path: Path, begin: int) -> None:
        """Raise InputError for a wav file whose header does not tell where its sound ends.

        libsndfile reads what is left of a cut file, or the part that a wrong header leaves; the
        transcript would no longer fit.
        """
        chunks = dict(self._wav_chunks(begin))
        if b"data" not in chunks:
            return
        start, promised = chunks[b"data"]
        there = self._size - start
        if promised == 0 and b"" in chunks:
            # Whoever wrote the file did not come to its end, where this would be filled in.
            self._hidden = dict.fromkeys(range(start - 4, start), 0xFF)
            return
        if there < promised < PIPED:
            raise InputError(f"{path}: truncated: {there} of {promised} bytes; replace it")
        if promised <= there and b"" in chunks:
            raise InputError(
                f"{path}: wrong header: {promised} bytes of sound, and what follows them is not a "
                "part of a wav file; replace it"
            )

    def _require_whole_ogg(self, path: Path, begin: int) -> None:
        """Raise InputError for an ogg file whose last page is cut off, or is not the last one.

        Where it is of another stream than the first page, libsndfile would stop before it.
        """
        first = self._at(begin, _PAGE_HEADER)
        if not first.startswith(b"OggS"):
            return
        end = self._at(max(0, self._size - _LARGEST_PAGE), _LARGEST_PAGE)
        page = end[end.rfind(b"OggS") :]
        sizes = page[_PAGE_HEADER:][: page[_PAGE_HEADER - 1]] if len(page) >= _PAGE_HEADER else b""
        whole = _PAGE_HEADER + len(sizes) + sum(sizes)
        if len(page) < max(whole, _PAGE_HEADER) or not page[5] & _LAST_PAGE:
            raise InputError(f"{path}: truncated: its last part is missing; replace it")
        if page[_STREAM] != first[_STREAM]:
            raise InputError(f"{path}: has several sounds, one after the other; split it")

    def _wav_chunks(self, begin: int) -> Iterator[tuple[bytes, tuple[int, int]]]:
        """Yield name, first byte and size of each part of a wav file, as its header gives them.

        What has no name of letters, or would not fit into the file, is no part: it comes last, and
        as b"", unless it is short or a tag that other formats use.
        """
        order = {b"RIFF": "<", b"RIFX": ">"}.get(self._at(begin, 4))
        position = begin + 12
        while order and len(header := self._at(position, 8)) == 8:
            name, size = header[:4], struct.unpack(f"{order}I", header[4:])[0]
            left = self._size - position
            fits = 8 + size <= left or name == b"data"
            if not fits or not all(0x20 <= byte < 0x7F for byte in name):
                if left > self._size // 20 and name[:3] not in (b"ID3", b"TAG"):
                    yield b"", (position, size)
                return
            yield name, (position + 8, size)
            position += 8 + size + size % 2
