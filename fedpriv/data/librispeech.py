"""LibriSpeech as it is released: 2,338 readers of English audio books as users."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from fedpriv.data.audio import AudioFile, BadRow
from fedpriv.data.files import is_clean, text_lines, unreachable, visible
from fedpriv.data.parts import require_folder, require_path
from fedpriv.data.speakers import BySpeaker, Corpus, PartsOptions, federate_speakers, read_parts
from fedpriv.data.speech import FederatedSpeech
from fedpriv.errors import InputError

LIBRISPEECH_HOME = "LibriSpeech ASR corpus: openslr.org/12"
HELD_OUT = {"test": "test-clean", "development": "dev-clean"}


def build_librispeech(options: PartsOptions, seed: int) -> FederatedSpeech:
    """Make the readers of LibriSpeech's training subsets users.

    `data.path` is the folder of the subsets: `train-clean-100`, `test-clean` and so on.
    `data.speech.train_subsets`, `held_out_subsets` and `public_subsets` name what is used;
    left empty they mean every subset named `train-`, `test-clean` (with `evaluation:
    development` `dev-clean`) and none. Who is held out or public is no user, and every eighth
    public speaker is kept to measure the seed model. Transcripts are read at once, sound when
    it is needed. Raises InputError for a missing or empty subset and for settings that the
    speakers cannot satisfy.
    """
    folder, speech = require_path(options, LIBRISPEECH_HOME), options.speech
    training = speech.train_subsets or _training_subsets(folder)

    def read(subset: str) -> BySpeaker:
        return read_subset(folder / subset)

    corpus = Corpus(
        title=f"librispeech ({', '.join(training)})",
        training=read_parts(training, read),
        held_out=read_parts(speech.held_out_subsets or [HELD_OUT[options.evaluation]], read),
        public=read_parts(speech.public_subsets, read),
    )
    return federate_speakers(corpus, options, seed)


def read_subset(folder: Path) -> BySpeaker:
    """List a subset's recordings by speaker, in the order of their names; no sound is read.

    The folder holds `{speaker}/{chapter}/{speaker}-{chapter}-{utterance}.flac` and, beside
    them, `{speaker}-{chapter}.trans.txt`; hidden files, and those of other names, are left alone.
    A sound without a transcript, a transcript without a sound, and a line that names no
    utterance of its chapter, are listed too: they are bad recordings. Raises InputError for no
    recordings, and EnvironmentFault for what cannot be read.
    """
    what = f"a folder of subsets ({LIBRISPEECH_HOME}), and in data.speech some that it has"
    require_folder(folder, what)
    speakers: dict[str, list[AudioFile]] = {}
    for speaker in filter(os.DirEntry.is_dir, visible(folder)):
        for chapter in filter(os.DirEntry.is_dir, visible(Path(speaker.path))):
            if found := _read_chapter(Path(chapter.path), f"{speaker.name}-{chapter.name}"):
                speakers.setdefault(speaker.name, []).extend(found)
    if not speakers:
        raise InputError(
            f"data.path: {folder} holds no recordings named "
            "{speaker}/{chapter}/{speaker}-{chapter}-{utterance}.flac; publicly distributed as "
            f"{LIBRISPEECH_HOME}"
        )
    return speakers


def _read_chapter(folder: Path, name: str) -> list[AudioFile]:
    """List the recordings of a chapter, and after them what its transcripts have of bad lines."""
    texts, bad = _read_transcripts(folder / f"{name}.trans.txt", f"{name}-")
    files = {Path(entry.name) for entry in visible(folder)}
    sounds = {file.stem for file in files if file.suffix == ".flac"}
    names = {sound for sound in sounds if sound.startswith(f"{name}-")} | texts.keys()
    return [AudioFile(f"{folder / one}.flac", texts.get(one)) for one in sorted(names)] + bad


def _training_subsets(folder: Path) -> Sequence[str]:
    subsets = [
        entry.name
        for entry in visible(folder)
        if entry.name.startswith("train-") and entry.is_dir()
    ]
    if not subsets:
        raise InputError(
            f"data.path: {folder} holds no training subset such as train-clean-100; publicly "
            f"distributed as {LIBRISPEECH_HOME}"
        )
    return subsets


def _read_transcripts(path: Path, prefix: str) -> tuple[dict[str, str | None], list[AudioFile]]:
    """Return the transcripts by utterance, and the bad lines.

    A line is a name, which begins with `prefix`, a space and the words. An utterance with two
    different transcripts has none.
    """
    texts: dict[str, str | None] = {}
    bad: list[AudioFile] = []
    try:
        for number, line in text_lines(path):
            name, _, text = line.strip().partition(" ")
            if not name.startswith(prefix) or not name.isprintable() or "/" in name:
                if line.strip():
                    bad.append(BadRow(f"{path}: line {number} names no recording of its chapter"))
            else:
                texts[name] = text if texts.get(name, text) == text and is_clean(text) else None
    except FileNotFoundError:
        return {}, []
    except OSError as error:
        raise unreachable(path, error) from None
    return texts, bad
