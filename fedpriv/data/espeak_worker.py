"""The process that speaks: a script that `fedpriv.data.espeak` runs; it is never imported.

It needs the standard library alone. Every speaker is a fork of it, which with NumPy or SciPy
loaded would cost more than speaking does.

The working directory holds espeak-ng's data, as `espeak-ng-data`, and the file `voice`, which
describes the speaker's voice. Standard input has a line of JSON for each speaker,
`{"seed": 5, "texts": ["one", "two"]}`. Standard output answers with a line of JSON, the sample
rate and the number of samples of each text, and then the samples of all: int16, in the machine's
byte order.
"""

import ctypes
import json
import os
import sys

DATA_HOME, VOICE_FILE = b".", b"voice"
"""Relative, because espeak-ng has little room for paths, and puts those of voices in lower case."""

SYNCHRONOUS, RETURN_ERRORS = 2, 0x8000
"""espeak-ng's output to a callback before the call returns, and its option not to exit."""

TEXT_IN_UTF8 = 1
VOLUME, QUIETER = 2, 40
"""espeak-ng's number for the volume, and a percentage at which no voice overflows int16."""

BYTES_PER_SAMPLE = 2


class Espeak:
    """The library, ready to speak. Its state is global: there can be one in a process."""

    def __init__(self, library: str) -> None:
        self._library = ctypes.CDLL(library)
        self.sample_rate = self._library.espeak_Initialize(SYNCHRONOUS, 0, DATA_HOME, RETURN_ERRORS)
        if self.sample_rate <= 0:
            sys.exit("espeak-ng cannot use its data")
        self._heard: list[bytes] = []
        # Kept as an attribute, because the library does not keep it alive.
        self._callback = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p
        )(self._hear)
        self._library.espeak_SetSynthCallback(self._callback)

    def _hear(self, sound: int | None, samples: int, _events: int) -> int:
        if sound is not None:
            self._heard.append(ctypes.string_at(sound, samples * BYTES_PER_SAMPLE))
        return 0  # go on

    def become(self, seed: int) -> None:
        """Take the voice in the file and seed its noise."""
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(seed))
        if self._library.espeak_SetVoiceByFile(VOICE_FILE) != 0:
            sys.exit("espeak-ng cannot use the voice that was made for it")
        self._library.espeak_SetParameter(VOLUME, QUIETER, 0)

    def speak(self, text: str) -> bytes:
        """Return the samples of `text`."""
        self._heard.clear()
        encoded = text.encode()
        self._library.espeak_Synth(encoded, len(encoded) + 1, 0, 1, 0, TEXT_IN_UTF8, None, None)
        return b"".join(self._heard)


def main(library: str) -> None:
    """Answer every line of standard input, until it ends.

    What espeak-ng says depends a little on all that it said before. Each speaker therefore is a
    fork of this process, which itself never speaks.
    """
    espeak = Espeak(library)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            answer(espeak, **json.loads(line))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status != 0:
            sys.exit(1)


def answer(espeak: Espeak, seed: int, texts: list[str]) -> None:
    """Say all texts of one speaker on standard output."""
    espeak.become(seed)
    sounds = [espeak.speak(text) for text in texts]
    samples = [len(sound) // BYTES_PER_SAMPLE for sound in sounds]
    header = json.dumps({"sample_rate": espeak.sample_rate, "samples": samples})
    sys.stdout.buffer.write(header.encode() + b"\n" + b"".join(sounds))
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(sys.argv[1])
