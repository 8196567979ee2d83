"""What all speech data sets share: recordings that are read when they are needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from fedpriv.data.audio import BadRow
from fedpriv.data.content import Content, Files
from fedpriv.data.facts import UNCHECKED, DataFacts
from fedpriv.data.options import DealtOptions, FolderOptions
from fedpriv.data.text import ENGLISH, Alphabet, normalise
from fedpriv.data.utterances import Utterances
from fedpriv.errors import InputError
from fedpriv.sections import NO_BEARING, KeptPath, Section

# Held-out recordings that are read together, and padded to the longest among them.
_PART = 32


class SpeechConfig(Section):
    """What is read of recordings."""

    sample_rate: int = Field(
        default=16_000,
        ge=4_000,
        le=48_000,
        description="sample rate that the model hears (Hz); recordings are resampled to it",
    )
    max_seconds: float = Field(
        default=36.0,
        gt=0,
        le=3600,
        description="longest utterance that is used (seconds); a longer one is a bad recording",
    )
    max_seconds_per_user: float | None = Field(
        default=None,
        gt=0,
        description="a user's recordings are used up to this sum (seconds); null: all",
    )
    alphabet: Annotated[KeptPath | None, NO_BEARING] = Field(
        default=None,
        description="file with one character a line; null: the data set's own, which is public",
    )
    on_bad: Literal["skip", "stop"] = Field(
        default="skip",
        description="a recording that cannot be read, is silent or too long, or whose transcript "
        "is missing, empty or has unknown characters: skip and count it, or stop the run",
    )


class SpokenOptions(DealtOptions):
    """Whose users speak."""

    speech: SpeechConfig = Field(default=SpeechConfig(), description="what is read of recordings")

    def caps(self) -> Mapping[str, Any]:
        """Return, by key, what cuts off a user's examples, so that one more moves another out."""
        return {**super().caps(), "speech.max_seconds_per_user": self.speech.max_seconds_per_user}


class RecordedOptions(SpokenOptions, FolderOptions):
    """Whose users speak, on recordings in a folder."""


class Recording(Protocol):
    """One utterance: where its sound is, and what is said in it."""

    @property
    def text(self) -> str | None:
        """The transcript as the data set gives it; None where it gives none."""

    @property
    def files(self) -> tuple[str | Path, ...]:
        """The files that must be looked at to tell its sound from another's."""

    @property
    def trait(self) -> str:
        """What else tells its sound from another's."""

    def read(self, sample_rate: int, max_seconds: float) -> NDArray[np.float32]:
        """Return the waveform in [-1, 1], mono, at `sample_rate` (Hz): `[samples]`.

        Raises InputError, naming the file, for a sound that cannot be used or is longer than
        `max_seconds`, of which no more is decoded; EnvironmentFault where the machine is at fault.
        """


@dataclass(frozen=True, eq=False)
class FederatedSpeech:
    """Speakers as users; see `FederatedDataset`.

    Attributes:
        users: each user's recordings.
        user_ids: their stable public ids.
        held_out: recordings that no user holds, to measure on.
        public: recordings of volunteers, to pre-train a seed model on.
        public_held_out: recordings to measure that seed model on.
        alphabet: what the model writes with.
        speech: sample rate, duration caps, what to do with bad recordings.
        description: one line for reports; public.
        sizes: how many recordings users have, in words; private.
        facts: what is true of it, as far as that was checked.
        strays: rows of tables of which nobody knows whose they are.
        disputed: which recording two people are said to own; "" for none.
        undrawn: how many people are left out, in words; "" for none; private.
    """

    users: Sequence[Sequence[Recording]]
    user_ids: Sequence[str]
    held_out: Sequence[Recording]
    public: Sequence[Recording]
    public_held_out: Sequence[Recording]
    alphabet: Alphabet
    speech: SpeechConfig
    description: str
    sizes: str = ""
    facts: DataFacts = UNCHECKED
    strays: Sequence[BadRow] = ()
    disputed: str = ""
    undrawn: str = ""

    task: ClassVar[str] = "recognition"

    @property
    def population(self) -> int:
        """Number of users N."""
        return len(self.users)

    @property
    def notes(self) -> tuple[str, ...]:
        """What to know before training on these users; private."""
        return (self.undrawn,) if self.undrawn else ()

    @property
    def classes(self) -> int:
        """Characters, and the blank."""
        return self.alphabet.classes

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Samples of one second of sound."""
        return (self.speech.sample_rate,)

    def user(self, index: int) -> Utterances:
        """Read one user's recordings, up to the caps: see `FederatedDataset.user`.

        Those that cannot be used are left out and counted, or raise InputError with
        `data.speech.on_bad: stop`.
        """
        if not 0 <= index < self.population:
            raise IndexError(f"user index {index} is outside 0..{self.population - 1}")
        return self._read(self.users[index], self.speech.max_seconds_per_user)

    def why_skipped(self, index: int) -> str:
        """Return the reason of a user's first recording that cannot be used; private."""
        for recording in self.users[index]:
            try:
                self._one(recording)
            except InputError as error:
                return str(error)
        return ""

    def evaluation(self) -> Iterator[Utterances]:
        """Read the held-out recordings, some at a time: waveforms take much memory.

        Raises InputError, with the reason, where none can be used.
        """
        usable = 0
        for part in self._parts(self.held_out):
            usable += len(part)
            yield part
        if not usable:
            self._require_usable(self.held_out, "held-out")

    def digest(self) -> str:
        """Return the SHA-256 of the users' ids, transcripts and sound files.

        Of files of many gigabytes it sees names, sizes and some bytes: see `fedpriv.data.content`.
        """
        content = Content(f"speech {self.alphabet.characters!r}")
        number = sum(len(recording.files) for user in self.users for recording in user)
        with Files(number) as files:
            for user_id, recordings in zip(self.user_ids, self.users, strict=True):
                content.add_user(user_id, len(recordings))
                for recording in recordings:
                    text = repr((recording.text, recording.trait))
                    content.add(text.encode("utf-8", "surrogatepass"))
                for told in files.digests([path for one in recordings for path in one.files]):
                    content.add(told)
        return content.hexdigest()

    def pretraining(self, index: int) -> Utterances:
        """Read one public recording: none where it cannot be used, and must not stop the run."""
        return self._read(self.public[index : index + 1], None)

    def pretraining_evaluation(self) -> Iterator[Utterances]:
        """Read the public held-out recordings, some at a time."""
        yield from self._parts(self.public_held_out)

    def _parts(self, recordings: Sequence[Recording]) -> Iterator[Utterances]:
        for first in range(0, len(recordings), _PART):
            yield self._read(recordings[first : first + _PART], None)

    def _read(self, recordings: Sequence[Recording], max_seconds: float | None) -> Utterances:
        waves, targets, skipped = [], [], 0
        left = float("inf") if max_seconds is None else max_seconds * self.speech.sample_rate
        for recording in recordings:
            try:
                wave, target = self._one(recording)
            except InputError:
                if self.speech.on_bad == "stop":
                    raise
                skipped += 1
                continue
            if len(wave) > left:
                break
            left -= len(wave)
            waves.append(wave)
            targets.append(target)
        return Utterances.pack(waves, targets, skipped)

    def require_one_owner(self) -> None:
        """Raise InputError for a recording of two people.

        In a deployment nothing may depend on it: one person's rows would decide for all others.
        """
        if self.disputed:
            raise InputError(self.disputed)

    def require_usable(self) -> None:
        """Raise InputError, with the reason, where no recording of any user can be used.

        Every round would cost ε for noise alone. It looks at private data, so in a deployment
        nothing may depend on it.
        """
        self.require_one_owner()
        everybody = chain(self.strays, chain.from_iterable(self.users))
        self._require_usable(everybody, "users'")

    def _require_usable(self, recordings: Iterable[Recording], whose: str) -> None:
        reason = None
        for recording in recordings:
            try:
                self._one(recording)
            except InputError as error:
                if self.speech.on_bad == "stop":
                    raise
                reason = reason or error
            else:
                return
        raise InputError(
            f"data: none of the {whose} recordings can be used; unpack the data set, mount its "
            f"disk, or choose other parts; the first: {reason}"
        )

    def _one(self, recording: Recording) -> tuple[Tensor, Tensor]:
        if isinstance(recording, BadRow):
            raise InputError(str(recording))
        if recording.text is None:
            raise InputError(f"{recording}: no transcript")
        text = normalise(recording.text)
        if not text:
            raise InputError(f"{recording}: the transcript is empty")
        try:
            target = self.alphabet.encode(text)
        except InputError as error:
            raise InputError(f"{recording}: {error}") from None
        wave = recording.read(self.speech.sample_rate, self.speech.max_seconds)
        if len(wave) == 0 or not np.ptp(wave) > 0:
            raise InputError(f"{recording}: silent")
        return torch.from_numpy(wave), target


def choose_alphabet(speech: SpeechConfig, public: Sequence[Recording]) -> Alphabet:
    """Return the alphabet that the config names, or that of the public transcripts, or English.

    Never that of the users' transcripts: which letters they wrote is theirs. Raises InputError
    for a file that is no alphabet.
    """
    if speech.alphabet is not None:
        return Alphabet.read(speech.alphabet)
    texts = [text for one in public if (text := normalise(one.text or ""))]
    return Alphabet.of(texts) if texts else Alphabet(ENGLISH)
