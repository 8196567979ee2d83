"""Synthetic speech: any number of made-up speakers as users, whom espeak-ng lets say digits."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from fedpriv.caches import cache_folder
from fedpriv.counting import numbered
from fedpriv.data.espeak import Espeak, locate
from fedpriv.data.facts import DataFacts
from fedpriv.data.speech import FederatedSpeech, SpeechConfig, SpokenOptions
from fedpriv.data.speech_chunks import ChunkRecording, has_chunk, read_chunk, write_chunk
from fedpriv.data.synthetic_speakers import Split
from fedpriv.data.text import DIGITS, Alphabet
from fedpriv.errors import InputError
from fedpriv.sections import NO_BEARING, KeptPath

PUBLIC_ACCENT = "en-us"
PUBLIC = Split("public", stream=0, utterances=40, accents=(PUBLIC_ACCENT,))
PUBLIC_HELD_OUT = Split("public_held_out", stream=1, utterances=6, accents=(PUBLIC_ACCENT,))
PUBLIC_HELD_OUT_SPEAKERS = 32

HELD_OUT = {
    "development": Split("development", stream=2, utterances=6),
    "test": Split("test", stream=3, utterances=6),
}
HELD_OUT_SPEAKERS = 128

POPULATION_STREAM = 4
UTTERANCES_PER_USER = 10
"""Where `data.examples_per_user` is null."""

SPEAKERS_PER_CHUNK = 16
"""Chunks are always whole, so that populations of any sizes share them."""

CACHE_VERSION = 1
"""To be raised when recordings are to differ from those in the caches of before."""


class MadeSpeechConfig(SpeechConfig):
    """What is read of recordings, and how they are made."""

    public_speakers: int = Field(
        default=48,
        ge=0,
        description="speakers of one accent to pre-train the seed model on",
    )
    cache: Annotated[KeptPath | None, NO_BEARING] = Field(
        default=None,
        description="folder of generated recordings; null: fedpriv in the "
        "user's cache folder (XDG_CACHE_HOME)",
    )


class SyntheticSpeechOptions(SpokenOptions):
    """How many speakers are made up."""

    gives_examples: ClassVar[bool] = True
    speech: MadeSpeechConfig = Field(
        default=MadeSpeechConfig(), description="what is read of recordings, and how they are made"
    )


def build_synthetic_speech(options: SyntheticSpeechOptions, seed: int) -> FederatedSpeech:
    """Make up `data.users` speakers of 8 English accents, who say strings of digits.

    A speaker's voice, words and sound follow from the speaker's number alone. Like a collected
    data set they are the same for every run: `seed` is not used. Each speaker says
    `data.examples_per_user` strings (null: 10). Nobody of the population is among the speakers
    of `evaluation: test` or of `evaluation: development`, who are others again, or among the
    public speakers, who have one accent in common.

    Recordings are made when they are first needed and kept in `data.speech.cache`; from then on
    espeak-ng itself is not needed.

    Raises:
        InputError: settings that it cannot use, a cache that cannot be written, or recordings
            to be made without espeak-ng.
        FedprivError: a damaged file in the cache, or espeak-ng failed.
    """
    users, speech = _require_users(options), options.speech
    spoken = options.examples_per_user or UTTERANCES_PER_USER
    population = Split("population", POPULATION_STREAM, spoken)
    held_out = HELD_OUT[options.evaluation]
    wanted = {
        population: users,
        held_out: HELD_OUT_SPEAKERS,
        PUBLIC: speech.public_speakers,
        PUBLIC_HELD_OUT: PUBLIC_HELD_OUT_SPEAKERS,
    }
    cache = Cache(_cache_folder(speech), speech.sample_rate)
    cache.fill(wanted)
    recordings = {split: cache.read(split, speakers) for split, speakers in wanted.items()}
    joined = {split: tuple(chain.from_iterable(each)) for split, each in recordings.items()}
    return FederatedSpeech(
        users=recordings[population],
        user_ids=tuple(f"speaker-{number}" for number in range(users)),
        held_out=joined[held_out],
        public=joined[PUBLIC],
        public_held_out=joined[PUBLIC_HELD_OUT],
        alphabet=_alphabet(speech),
        speech=speech,
        description=f"synthetic speech (espeak-ng): {numbered(users, 'user')} of "
        f"{min(users, len(population.accents))} accents, {spoken} digit strings each; "
        f"{held_out.name}: {_amount(joined[held_out])} of "
        f"{HELD_OUT_SPEAKERS} others; public: {_amount(joined[PUBLIC])} of "
        f"{speech.public_speakers} others ({PUBLIC_ACCENT})",
        sizes=_amount(joined[population]),
        facts=DataFacts(
            users="made_up",
            example="recording",
            held_out="made_up",
            public="made_up" if speech.public_speakers else "none",
        ),
    )


@dataclass(frozen=True)
class Cache:
    """A folder of recordings at one sample rate (Hz), in chunks of speakers.

    Several processes may use it at the same time: where two make a chunk, it is the same one.
    """

    folder: Path
    sample_rate: int

    def fill(self, wanted: Mapping[Split, int]) -> None:
        """Make what is missing of so many speakers of each split; nothing is said if nothing is.

        Chunks that were finished when it is interrupted stay. Raises InputError when the folder
        cannot be written or espeak-ng is not installed.
        """
        missing = [
            (split, first)
            for split, speakers in wanted.items()
            for first in range(0, speakers, SPEAKERS_PER_CHUNK)
            if not has_chunk(self.path(split, first))
        ]
        if not missing:
            return
        locate()  # fails before anything is announced or written
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._make(missing)
        except OSError as error:
            raise InputError(
                f"data.speech.cache: cannot make recordings in {self.folder} ({error})"
            ) from None

    def read(self, split: Split, speakers: int) -> list[list[ChunkRecording]]:
        """Return the recordings of each of the first `speakers`; no sound is read.

        Raises FedprivError, naming the file, for a chunk that is not what was written.
        """
        found: list[list[ChunkRecording]] = []
        each = split.utterances
        for first in range(0, speakers, SPEAKERS_PER_CHUNK):
            path = self.path(split, first)
            chunk = read_chunk(path, self.sample_rate, SPEAKERS_PER_CHUNK * each)
            found += [
                [ChunkRecording(chunk, index) for index in range(start, start + each)]
                for start in range(0, SPEAKERS_PER_CHUNK * each, each)
            ]
        return found[:speakers]

    def path(self, split: Split, first: int) -> Path:
        """Return the file of the chunk that begins with speaker `first`."""
        return self.folder / f"{split.name}-{split.utterances}x-{first:06d}.npy"

    def _make(self, missing: Sequence[tuple[Split, int]]) -> None:
        """Make the chunks that begin with these speakers, with a process on each CPU core."""
        processes = min(os.cpu_count() or 1, len(missing))
        todo = iter(missing)  # each thread takes the next
        with (
            _progress(len(missing) * SPEAKERS_PER_CHUNK, self.folder) as advance,
            ThreadPoolExecutor(processes) as pool,
            ExitStack() as stack,  # left before the pool, whose threads end without their process
        ):
            speaking = [stack.enter_context(Espeak()) for _ in range(processes)]
            threads = [pool.submit(self._work, espeak, todo, advance) for espeak in speaking]
            for thread in as_completed(threads):
                thread.result()

    def _work(
        self, espeak: Espeak, todo: Iterator[tuple[Split, int]], advance: Callable[[], None]
    ) -> None:
        for split, first in todo:
            speakers = [split.speaker(first + number) for number in range(SPEAKERS_PER_CHUNK)]
            sounds = []
            for speaker in speakers:
                sounds += espeak.speak(speaker, self.sample_rate)
                advance()
            texts = [text for speaker in speakers for text in speaker.texts]
            write_chunk(self.path(split, first), sounds, texts)


def _require_users(options: SyntheticSpeechOptions) -> int:
    # The default kind is iid: who leaves it alone asks for no partition at all.
    if options.partition.kind not in ("iid", "natural"):
        raise InputError(
            "data.partition.kind must be natural for synthetic_speech, whose speakers are the "
            f"users, got {options.partition.kind}"
        )
    if options.users is None:
        raise InputError(
            "data.users must be set for synthetic_speech: how many speakers to make up"
        )
    return options.users


def _cache_folder(speech: MadeSpeechConfig) -> Path:
    folder = speech.cache.expanduser() if speech.cache else cache_folder()
    return folder / f"synthetic-speech-v{CACHE_VERSION}-{speech.sample_rate}"


def _alphabet(speech: SpeechConfig) -> Alphabet:
    if speech.alphabet is not None:
        return Alphabet.read(speech.alphabet)
    return Alphabet.of([" ".join(DIGITS)])


def _amount(recordings: Sequence[ChunkRecording]) -> str:
    return f"{len(recordings)} in all ({sum(one.seconds for one in recordings):.0f} s)"


@contextmanager
def _progress(speakers: int, folder: Path) -> Iterator[Callable[[], None]]:
    """Say what is done, with a bar if there is a terminal; yield what counts a speaker."""
    console = Console(stderr=True)
    console.print(
        f"synthetic speech: recording {speakers:,} speakers in {folder}, this once",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    with Progress(
        TextColumn("synthetic speech: {task.completed:,.0f}/{task.total:,.0f} speakers"),
        BarColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("", total=speakers)
        yield lambda: progress.advance(task)
