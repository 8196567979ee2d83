"""LibriSpeech as it is released: 2,338 readers of English audio books as users."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedpriv.data.audio import AudioFile
from fedpriv.data.config import DataConfig
from fedpriv.data.idx_images import require_path
from fedpriv.data.speakers import BySpeaker, Corpus, federate_speakers, read_parts
from fedpriv.data.speech import FederatedSpeech
from fedpriv.errors import InputError

LIBRISPEECH_HOME = "LibriSpeech ASR corpus: openslr.org/12"
HELD_OUT = {"test": "test-clean", "development": "dev-clean"}


def build_librispeech(config: DataConfig, seed: int) -> FederatedSpeech:
    """Make the readers of LibriSpeech's training subsets users.

    `data.path` is the folder of the subsets: `train-clean-100`, `test-clean` and so on.
    `data.speech.train_subsets`, `held_out_subsets` and `public_subsets` name what is used;
    left empty they mean every subset named `train-`, `test-clean` (with `evaluation:
    development` `dev-clean`) and none. Who is held out or public is no user, and every eighth
    public speaker is kept to measure the seed model. Transcripts are read at once, sound when
    it is needed. Raises InputError for a missing or empty subset and for settings that the
    speakers cannot satisfy.
    """
    folder, speech = require_path(config, LIBRISPEECH_HOME), config.speech
    training = speech.train_subsets or _training_subsets(folder)

    def read(subset: str) -> BySpeaker:
        return read_subset(folder / subset)

    corpus = Corpus(
        title=f"librispeech ({', '.join(training)})",
        training=read_parts(training, read),
        held_out=read_parts(speech.held_out_subsets or [HELD_OUT[config.evaluation]], read),
        public=read_parts(speech.public_subsets, read),
    )
    return federate_speakers(corpus, config, seed)


def read_subset(folder: Path) -> BySpeaker:
    """List a subset's recordings by speaker, in the order of their names; no sound is read.

    The folder holds `{speaker}/{chapter}/{speaker}-{chapter}-{utterance}.flac` and, beside
    them, `{speaker}-{chapter}.trans.txt`. A sound without a transcript, and a transcript without
    a sound, is listed too: it is a bad recording. Raises InputError for no recordings and for a
    transcript file that cannot be read.
    """
    speakers: dict[str, list[AudioFile]] = {}
    for chapter in sorted(folder.glob("*/*/")):
        speaker = chapter.parent.name
        texts = _read_transcripts(chapter / f"{speaker}-{chapter.name}.trans.txt")
        names = {path.stem for path in chapter.glob("*.flac")} | texts.keys()
        speakers.setdefault(speaker, []).extend(
            AudioFile(f"{chapter / name}.flac", texts.get(name)) for name in sorted(names)
        )
    if not any(speakers.values()):
        state = "holds no" if folder.is_dir() else "is not a folder; it should hold"
        raise InputError(
            f"data.path: {folder} {state} recordings named "
            "{speaker}/{chapter}/{speaker}-{chapter}-{utterance}.flac; publicly distributed as "
            f"{LIBRISPEECH_HOME}"
        )
    return speakers


def _training_subsets(folder: Path) -> Sequence[str]:
    subsets = sorted(path.name for path in folder.glob("train-*/"))
    if not subsets:
        raise InputError(
            f"data.path: {folder} holds no training subset such as train-clean-100; publicly "
            f"distributed as {LIBRISPEECH_HOME}"
        )
    return subsets


def _read_transcripts(path: Path) -> dict[str, str]:
    """Return the transcripts by utterance: lines of a name, a space and the words."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); replace it") from None
    pairs = (line.strip().partition(" ") for line in lines if line.strip())
    return {name: text for name, _, text in pairs}
