"""How many frames an mp3 file has: counted, for its header may say nothing, or something else.

A decoder that is not told estimates the number from the first frame's bit rate. Where the rate
varies that is far off, and what lies beyond the estimate is never heard.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

_MPEG_1 = 3
_KBITS = {
    True: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 0),
    False: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160, 0),
}
"""Of layer III, in MPEG-1 and in the versions with lower sample rates."""
_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}
_COUNTED = 1
"""The flag of a Xing header that has a number of frames."""

ReadAt = Callable[[int, int], bytes]


@dataclass(frozen=True)
class Mp3:
    """The frames of an mp3 file.

    Attributes:
        first: position of the first frame with sound.
        frames: how many frames with sound there are, or more, where the file is damaged.
        promised: how many its header promises; None for none.
        promised_at: position of that number, 4 bytes, big-endian.
        header: the 4 bytes that the first frame with sound begins with.
    """

    first: int
    frames: int
    promised: int | None
    promised_at: int
    header: bytes

    def counted_frame(self) -> bytes:
        """Return a frame without sound that tells a decoder how many frames follow."""
        # Bit rate 128 kbit/s has room for it at every sample rate; without padding and checksum.
        index = _KBITS[_version(self.header) == _MPEG_1].index(128)
        header = bytes(
            [0xFF, self.header[1] | 1, self.header[2] & 0x0C | index << 4, self.header[3]]
        )
        tag = b"Xing" + _COUNTED.to_bytes(4, "big") + self.frames.to_bytes(4, "big")
        frame = header.ljust(_tag_at(header), b"\0") + tag
        return frame.ljust(_length(header), b"\0")


def find_mp3(read_at: ReadAt, start: int) -> Mp3 | None:
    """Return the frames of layer III that begin at `start`; None for another file.

    `read_at(position, count)` returns bytes of the file, fewer at its end.
    """
    header = read_at(start, 4)
    length = _length(header)
    if not length or not _alike(header, read_at(start + length, 4)):
        return None
    promised, promised_at, first = None, 0, start
    tag_at = start + _tag_at(header)
    tag = read_at(tag_at, 12)
    if tag[:4] in (b"Xing", b"Info"):
        first = start + length
        if tag[7] & _COUNTED:
            promised, promised_at = int.from_bytes(tag[8:], "big"), tag_at + 8
    elif read_at(start + 36, 4) == b"VBRI":
        first = start + length
    frames, position = 0, first
    while _alike(header, one := read_at(position, 4)):
        frames, position = frames + 1, position + _length(one)
    return Mp3(first, frames, promised, promised_at, read_at(first, 4))


def _version(header: bytes) -> int:
    return header[1] >> 3 & 3


def _alike(first: bytes, header: bytes) -> bool:
    """Say whether both begin frames of one stream."""
    same = len(header) == 4 and (header[1] ^ first[1]) & 0xFE == 0
    return same and header[2] & 0x0C == first[2] & 0x0C and _length(header) > 0


def _length(header: bytes) -> int:
    """Return how many bytes the frame has; 0 where no frame of layer III begins."""
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE6 != 0xE2:
        return 0
    version, rate = _version(header), header[2] >> 2 & 3
    if version not in _RATES or rate == 3:
        return 0
    bits = _KBITS[version == _MPEG_1][header[2] >> 4] * 1_000
    slots = 144 if version == _MPEG_1 else 72
    return slots * bits // _RATES[version][rate] + (header[2] >> 1 & 1) if bits else 0


def _tag_at(header: bytes) -> int:
    """Return where in its frame a Xing header stands: after what the decoder needs of the sound."""
    mono = header[3] >> 6 == 3
    if _version(header) == _MPEG_1:
        return 4 + (17 if mono else 32)
    return 4 + (9 if mono else 17)
