"""The Free Spoken Digit Dataset: six speakers, whose recordings are joined to digit strings."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from pydantic import Field

from fedpriv.counting import numbered
from fedpriv.data import partition
from fedpriv.data.audio import JoinedFiles, load_soundfile
from fedpriv.data.facts import DataFacts
from fedpriv.data.files import visible
from fedpriv.data.parts import named_path, require_folder
from fedpriv.data.sources import PARTITION_STREAM
from fedpriv.data.speakers import choose_speakers
from fedpriv.data.speech import FederatedSpeech, RecordedOptions, SpeechConfig, choose_alphabet
from fedpriv.data.text import DIGITS as WORDS
from fedpriv.errors import InputError
from fedpriv.privacy.randomness import Purpose, Randomness, id_words

FSDD_HOME = "Free Spoken Digit Dataset: github.com/Jakobovski/free-spoken-digit-dataset"
FILE_NAME = re.compile(r"(\d)_([^_]+)_(\d+)\.wav")

TEST = range(0, 5)
"""Indices of the test recordings, by the data set's own convention."""

DEVELOPMENT = range(5, 10)
"""Indices of the training recordings that `evaluation: development` holds out."""

LONGEST_STRING = 6
"""A string has 1 to 6 digits, each number as often."""

PAUSES = (0.05, 0.2)
"""Shortest and longest silence between the digits of a string (seconds)."""

STRINGS_PER_USER = 10
"""Where `data.examples_per_user` is null."""

HELD_OUT_SEED = 0
"""Joins the held-out recordings, the same for every seed of a run."""


class FsddConfig(SpeechConfig):
    """What is read of recordings, and whose are held out."""

    held_out_speakers: tuple[str, ...] = Field(
        default=(),
        description="speakers to measure on, who are then nobody in the population; "
        "empty: held-out recordings of the same speakers",
    )


class FsddOptions(RecordedOptions):
    """How the six speakers' recordings become users."""

    gives_examples: ClassVar[bool] = True
    speech: FsddConfig = Field(
        default=FsddConfig(), description="what is read of recordings, and whose are held out"
    )


@dataclass(frozen=True)
class Digit:
    """One recording of one digit; `index` counts a speaker's recordings of that digit."""

    path: Path
    digit: int
    speaker: str
    index: int


Voices = Mapping[str, Sequence[Digit]]
"""Recordings by speaker, or by the user who holds a share of a speaker's."""


def build_fsdd(options: FsddOptions, seed: int) -> FederatedSpeech:
    """Make users of FSDD's speakers, who each hold strings of 1 to 6 of their spoken digits.

    Files are `{digit}_{speaker}_{index}.wav` in `data.path` or in `recordings` below it. A
    string joins recordings of one speaker with short silences; its transcript is in words. A
    user has `data.examples_per_user` strings (null: 10), which go through all recordings of
    that user before one comes again.

    `data.partition.kind: natural` makes each speaker a user; `data.users` takes fewer, drawn at
    random. `iid` makes `data.users` users, who each hold a share of the recordings of *one*
    speaker: several users have the same voice, so what protects a user protects those
    recordings, not the person.

    `evaluation: test` evaluates on recordings 0 to 4 of every digit of every speaker, or, given
    `data.speech.held_out_speakers`, on all recordings of those, who are then no users;
    `evaluation: development` on recordings 5 to 9 of the others, which then belong to nobody.
    Recordings 0 to 4 never belong to anybody. Raises InputError for a missing folder or file
    and for settings that the files cannot satisfy.
    """
    load_soundfile()
    digits = read_digits(named_path(options.path, f"the folder of fsdd ({FSDD_HOME})"))
    training, held_out = _split(digits, options)
    shares = _deal(training, options, seed)
    strings = options.examples_per_user or STRINGS_PER_USER
    fixed = np.random.default_rng(HELD_OUT_SEED)
    measured = [string for voice in held_out.values() for string in _join(voice, fixed)]
    return FederatedSpeech(
        users=[_draw(share, strings, _own(seed, name)) for name, share in shares.items()],
        user_ids=tuple(f"speaker-{name}" for name in shares),
        held_out=measured,
        public=(),
        public_held_out=(),
        alphabet=choose_alphabet(options.speech, ()),
        speech=options.speech,
        description=_describe(
            training, held_out, options, options.users or len(shares), strings, len(measured)
        ),
        facts=DataFacts(
            users="person" if options.partition.kind == "natural" else "share",
            example="joined",
            held_out="same" if held_out.keys() & training.keys() else "others",
            public="none",
        ),
        undrawn=partition.undrawn(len(training), options.users)
        if options.partition.kind == "natural"
        else "",
    )


def read_digits(folder: Path) -> list[Digit]:
    """List the recordings of a folder, or of `recordings` in it, by name; no sound is read.

    Files of other names are left alone. Raises InputError when there is no recording.
    """
    require_folder(folder, f"the folder of fsdd ({FSDD_HOME})")
    inner = folder / "recordings"
    matches = [
        (Path(entry.path), match)
        for entry in visible(inner if inner.is_dir() else folder)
        if (match := FILE_NAME.fullmatch(entry.name))
    ]
    if not matches:
        raise InputError(
            f"data.path: {folder} holds no recordings named {{digit}}_{{speaker}}_{{index}}.wav; "
            f"publicly distributed as {FSDD_HOME}"
        )
    return [Digit(path, int(m[1]), m[2], int(m[3])) for path, m in matches]


def _split(digits: Sequence[Digit], options: FsddOptions) -> tuple[Voices, Voices]:
    """Return what the users-to-be and what nobody holds, both by speaker."""
    strangers = set(options.speech.held_out_speakers)
    unknown = strangers - {one.speaker for one in digits}
    if unknown:
        known = ", ".join(sorted({one.speaker for one in digits}))
        raise InputError(
            f"data.speech.held_out_speakers: nobody is called {', '.join(sorted(unknown))}; "
            f"the speakers are {known}"
        )
    members = [one for one in digits if one.speaker not in strangers]
    if options.evaluation == "development":
        kept_out: Container[int] = (*TEST, *DEVELOPMENT)
        held_out = [one for one in members if one.index in DEVELOPMENT]
    else:
        kept_out = TEST
        held_out = [one for one in digits if one.speaker in strangers] or [
            one for one in members if one.index in TEST
        ]
    training = [one for one in members if one.index not in kept_out]
    if not training or not held_out:
        raise InputError(
            f"data.path: no {'held-out' if training else 'training'} recordings are left with "
            f"data.evaluation={options.evaluation} and data.speech.held_out_speakers="
            f"{list(options.speech.held_out_speakers)}; hold out fewer"
        )
    return _by_speaker(training), _by_speaker(held_out)


def _by_speaker(digits: Sequence[Digit]) -> Voices:
    speakers = sorted({one.speaker for one in digits})
    return {name: [one for one in digits if one.speaker == name] for name in speakers}


def _own(seed: int, name: str) -> np.random.Generator:
    """Return the stream of one user, whose strings must not depend on what others recorded."""
    return Randomness.simulation(seed).numpy(Purpose.JOINED_EXAMPLES, *id_words(name))


def _deal(training: Voices, options: FsddOptions, seed: int) -> Voices:
    """Return each user's own recordings, by the name that goes into the user's id."""
    kind = options.partition.kind
    if kind == "natural":
        return {name: training[name] for name in choose_speakers(training, options, seed)}
    if kind != "iid":
        raise InputError(f"data.partition.kind must be natural or iid for fsdd, got {kind}")
    most = len(training) * min(len(voice) for voice in training.values())
    if options.users is None or options.users > most:
        raise InputError(
            f"data.users must be at most {most} for data.partition.kind=iid (a recording for "
            f"every user of a voice), got {options.users}"
        )
    return _share(training, options.users, seed)


def _share(training: Voices, users: int, seed: int) -> Voices:
    """Give each user a share of one voice; as many users, but for one, have each voice."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, PARTITION_STREAM]))
    shares = {}
    for position, name in enumerate(rng.permutation(sorted(training))[:users]):
        voice = training[name]
        parts = len(range(position, users, len(training)))
        for number, part in enumerate(np.array_split(rng.permutation(len(voice)), parts)):
            shares[f"{name}-{number}"] = [voice[index] for index in part]
    return shares


def _draw(share: Sequence[Digit], strings: int, rng: np.random.Generator) -> list[JoinedFiles]:
    """Go through the recordings again and again until there are so many strings."""
    drawn: list[JoinedFiles] = []
    while len(drawn) < strings:
        drawn += _join(share, rng)
    return drawn[:strings]


def _join(voice: Sequence[Digit], rng: np.random.Generator) -> list[JoinedFiles]:
    """Join all recordings to strings, each recording in one, in random order."""
    order, strings = list(rng.permutation(len(voice))), []
    while order:
        length = int(rng.integers(1, LONGEST_STRING, endpoint=True))
        chosen = [voice[index] for index in order[:length]]
        order = order[length:]
        strings.append(
            JoinedFiles(
                paths=tuple(one.path for one in chosen),
                text=" ".join(WORDS[one.digit] for one in chosen),
                pause_seconds=float(rng.uniform(*PAUSES)),
            )
        )
    return strings


def _describe(
    training: Voices,
    held_out: Voices,
    options: FsddOptions,
    users: int,
    strings: int,
    measured: int,
) -> str:
    voices = f"sharing {len(training)} voices" if users > len(training) else "one for each voice"
    return (
        f"fsdd (Free Spoken Digit Dataset): {numbered(users, 'user')} ({voices}), {strings} "
        f"digit strings each; {measured} {options.evaluation} strings by {', '.join(held_out)}"
    )
