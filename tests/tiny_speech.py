"""A federated speech data set of a few kilobytes: each character is a tone of its own."""

from dataclasses import dataclass

import numpy as np
from sounds import tone

from fedpriv.data.speech import FederatedSpeech, SpeechConfig, SpokenOptions
from fedpriv.data.text import Alphabet

RATE = 8_000
FREQUENCIES = {"a": 500.0, "b": 1_500.0, " ": 3_000.0}
TEXTS = ("a", "ba", "ab a", "b", "aab", "b ab", "ab", "a b a", "bb", "baba")


@dataclass(frozen=True)
class Tones:
    """A recording: a tenth of a second a character, in a voice that is higher or lower."""

    text: str
    voice: float = 1.0
    files = ()

    @property
    def trait(self) -> str:
        return str(self.voice)

    def read(self, sample_rate: int, max_seconds: float) -> np.ndarray:
        parts = [tone(0.1, sample_rate, self.voice * FREQUENCIES[c]) for c in self.text]
        return np.concatenate(parts).astype(np.float32)


def tones(user: int) -> list[Tones]:
    """The recordings of a user: 1 to 9 of them."""
    texts = [TEXTS[(3 * user + i) % len(TEXTS)] for i in range(1 + (4 * user) % 9)]
    return [Tones(text, voice=0.9 + 0.02 * (user % 10)) for text in texts]


def tiny_speech(users: int = 12, public: int = 4, **settings: object) -> FederatedSpeech:
    """Users who say tones; `public` of them outside the population are public."""
    others = [one for number in range(1, public + 1) for one in tones(100 + number)]
    return FederatedSpeech(
        users=[tones(number) for number in range(users)],
        user_ids=[f"user-{number}" for number in range(users)],
        held_out=tones(50) + tones(51),
        public=others,
        public_held_out=tones(60) if public else [],
        alphabet=Alphabet(" ab"),
        speech=SpeechConfig(sample_rate=RATE, **settings),
        description="tones",
    )


class TonesConfig(SpeechConfig):
    """How many speakers are public."""

    public_speakers: int = 48


class TonesOptions(SpokenOptions):
    """What a config says of tones."""

    speech: TonesConfig = TonesConfig()


def build_tones(options: TonesOptions, seed: int) -> FederatedSpeech:
    """Build the data set of a config, for the registry."""
    return tiny_speech(options.users or 12, options.speech.public_speakers)


#: What makes `small_config` train on tones; the registry must know them.
SPEECH_CHANGES = {
    "data__name": "tones",
    "data__users": 12,
    "data__examples_per_user": None,
    "data__speech__sample_rate": RATE,
    "data__speech__public_speakers": 4,
    "model": {
        "name": "speech",
        "dim": 8,
        "depth": 1,
        "heads": 2,
        "mlp_ratio": 1.0,
        "mels": 8,
    },
    "privacy__sampling__expected_cohort": 4,
    "runtime__workers": 1,
}
