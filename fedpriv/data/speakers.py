"""From named speakers to users: the part that the speech corpora have in common."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from pydantic import Field

from fedpriv import counting
from fedpriv.data import partition
from fedpriv.data.audio import AudioFile, BadRow, load_soundfile
from fedpriv.data.facts import DataFacts
from fedpriv.data.speech import (
    FederatedSpeech,
    RecordedOptions,
    SpeechConfig,
    SpokenOptions,
    choose_alphabet,
)
from fedpriv.errors import InputError

BySpeaker = Mapping[str, Sequence[AudioFile]]

NOBODY = ""
"""The speaker of rows that do not say whose they are."""

PUBLIC_HELD_OUT = slice(1, None, 8)
"""These public speakers measure the seed model instead of training it: of two already one."""


@dataclass(frozen=True, eq=False)
class Corpus:
    """Recordings by speaker, before speakers become users: what a corpus's own file provides.

    A speaker may be in several parts: see `federate_speakers`.
    """

    title: str
    training: BySpeaker
    held_out: BySpeaker
    public: BySpeaker


class PartsConfig(SpeechConfig):
    """What is read of recordings that come in named parts."""

    train_subsets: tuple[str, ...] = Field(
        default=(),
        description="parts whose speakers are the users; empty: all that are named train",
    )
    held_out_subsets: tuple[str, ...] = Field(
        default=(),
        description="parts to measure on; empty: test-clean or test, "
        "with data.evaluation: development dev-clean or dev",
    )
    public_subsets: tuple[str, ...] = Field(
        default=(),
        description="parts to pre-train the seed model on, whose "
        "speakers are taken out of the population; empty: none",
    )


class PartsOptions(RecordedOptions):
    """Whose recordings come in named parts."""

    speech: PartsConfig = Field(
        default=PartsConfig(), description="what is read of recordings, and of which parts"
    )


def federate_speakers(corpus: Corpus, options: SpokenOptions, seed: int) -> FederatedSpeech:
    """Make each training speaker a user, unless held out or public; no sound is read.

    A speaker of several parts is held out rather than public, and public rather than a user,
    with the recordings of that one part. `data.users` takes fewer users, drawn at random;
    `data.examples_per_user` keeps so many recordings of each, drawn at random. The held-out
    and the public recordings do not depend on `seed`.
    A recording of two of them is `disputed`, which a simulation refuses.
    Raises InputError for a partition that is not natural and for too few speakers.
    """
    load_soundfile()
    corpus, strays = _without_strays(corpus)
    if options.partition.kind != "natural":
        raise InputError(
            f"data.partition.kind must be natural for {options.name}, whose speakers are the "
            f"users, got {options.partition.kind}"
        )
    speakers = corpus.training.keys() - corpus.held_out.keys() - corpus.public.keys()
    names = choose_speakers(speakers, options, seed)
    user_ids = tuple(f"speaker-{name}" for name in names)
    volunteers = sorted(corpus.public.keys() - corpus.held_out.keys())
    measuring = volunteers[PUBLIC_HELD_OUT]
    spoken = [corpus.training[name] for name in names]
    users = _cap(spoken, user_ids, options.examples_per_user, seed)
    public = _recordings(corpus.public, set(volunteers) - set(measuring))
    return FederatedSpeech(
        users=users,
        user_ids=user_ids,
        held_out=_recordings(corpus.held_out, corpus.held_out),
        public=public,
        public_held_out=_recordings(corpus.public, measuring),
        alphabet=choose_alphabet(options.speech, public),
        speech=options.speech,
        description=_describe(corpus, options, options.users or len(users), volunteers),
        sizes=counting.in_words(list(map(len, users)), "recording")
        + (f"; {counting.numbered(len(strays), 'row')} of nobody, left out" if strays else ""),
        facts=DataFacts(
            users="person",
            example="recording",
            held_out="others",
            public="others" if volunteers else "none",
        ),
        strays=strays,
        undrawn=partition.undrawn(len(speakers), options.users),
        disputed=_disputed(corpus),
    )


def _without_strays(corpus: Corpus) -> tuple[Corpus, tuple[BadRow, ...]]:
    """Return the corpus of those who have a name, and the rows of nobody."""
    parts = [corpus.training, corpus.held_out, corpus.public]
    training, held_out, public = (
        {name: found for name, found in part.items() if name != NOBODY} for part in parts
    )
    rows = chain.from_iterable(part.get(NOBODY, ()) for part in parts)
    named = Corpus(corpus.title, training, held_out, public)
    return named, tuple(row for row in rows if isinstance(row, BadRow))


def choose_speakers(speakers: Iterable[str], options: SpokenOptions, seed: int) -> list[str]:
    """Return `data.users` of the speakers, or all where there are no more, sorted.

    Raises InputError when there is none.
    """
    names = sorted(speakers)
    if not names:
        raise InputError(
            f"data.path: {options.name} has no training speaker here who is not also held out or "
            "public; choose other parts in data.speech"
        )
    return names if options.users is None else partition.choose(names, options.users, seed)


def read_parts(names: Iterable[str], read: Callable[[str], BySpeaker]) -> BySpeaker:
    """Read parts of a corpus; a recording that is in several parts counts once.

    The files' names tell a speaker's recordings apart, for parts may lie in folders of their own.
    One that has different transcripts there cannot be used.
    """
    speakers: dict[str, dict[str, AudioFile]] = {}
    for part in map(read, names):
        for speaker, recordings in part.items():
            known = speakers.setdefault(speaker, {})
            for one in recordings:
                if known.setdefault(name := _file_name(one), one).text != one.text:
                    known[name] = BadRow(f"{one}: has different transcripts")
    return {speaker: tuple(known.values()) for speaker, known in speakers.items()}


def _file_name(recording: AudioFile) -> str:
    """Return what a recording is called in all parts of its corpus, whose folders may differ."""
    return recording.path if isinstance(recording, BadRow) else os.path.basename(recording.path)


def _disputed(corpus: Corpus) -> str:
    """Say which recording two people are said to own, in one part or in two; "" for none.

    Whoever is protected would still be in the other's contribution, or in what is measured.
    """
    owners: dict[str, tuple[str, str]] = {}
    parts = {"training": corpus.training, "held out": corpus.held_out, "public": corpus.public}
    for part, speakers in parts.items():
        for speaker, recordings in speakers.items():
            for one in recordings:
                owner, where = owners.setdefault(one.path, (speaker, part))
                if owner != speaker and not isinstance(one, BadRow):
                    return (
                        f"data.path: {one} is listed for two speakers, {owner} ({where}) and "
                        f"{speaker} ({part}); a recording is of one: leave it to that one"
                    )
    return ""


def _recordings(part: BySpeaker, speakers: Iterable[str]) -> tuple[AudioFile, ...]:
    return tuple(chain.from_iterable(part[name] for name in sorted(speakers)))


def _cap(
    users: Sequence[Sequence[AudioFile]], user_ids: Sequence[str], limit: int | None, seed: int
) -> list[Sequence[AudioFile]]:
    places = [np.arange(len(recordings)) for recordings in users]
    kept = partition.cap(places, user_ids, limit, seed)
    return [
        tuple(recordings[index] for index in indices)
        for recordings, indices in zip(users, kept, strict=True)
    ]


def _describe(corpus: Corpus, options: SpokenOptions, users: int, volunteers: Sequence[str]) -> str:
    line = (
        f"{corpus.title}: {users} speakers as users; {_count(corpus.held_out, corpus.held_out)} "
        f"for {options.evaluation}"
    )
    return f"{line}; {_count(corpus.public, volunteers)} public" if volunteers else line


def _count(part: BySpeaker, speakers: Iterable[str]) -> str:
    sizes = [len(part[name]) for name in speakers]
    recordings = counting.numbered(sum(sizes), "recording")
    return f"{recordings} by {counting.numbered(len(sizes), 'speaker')}"
