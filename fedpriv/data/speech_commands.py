"""Google's Speech Commands, version 2: single words by 2,618 speakers, who are the users."""

from __future__ import annotations

import os
import re
from collections.abc import Container, Iterable
from pathlib import Path

from fedpriv.data.audio import AudioFile
from fedpriv.data.files import text_lines, unreachable, visible
from fedpriv.data.parts import require_path
from fedpriv.data.speakers import BySpeaker, Corpus, federate_speakers
from fedpriv.data.speech import FederatedSpeech, RecordedOptions
from fedpriv.errors import InputError

SPEECH_COMMANDS_HOME = "Speech Commands data set v0.02, TensorFlow"
FILE_NAME = re.compile(r"([^/_.@][^/]*)/([^/.@][^/]*)_nohash_\d+\.wav")
LISTS = {"test": "testing_list.txt", "development": "validation_list.txt"}


def build_speech_commands(options: RecordedOptions, seed: int) -> FederatedSpeech:
    """Make the speakers of Speech Commands users; the transcript of a recording is its word.

    `data.path` is the folder with a folder for each word, whose files are
    `{speaker}_nohash_{number}.wav`; folders whose names begin with `_` are noise and left out.
    The speakers of `testing_list.txt` (evaluation: test) and of `validation_list.txt`
    (evaluation: development) never are users. Raises InputError for a missing folder or list
    and for settings that the speakers cannot satisfy.
    """
    folder = require_path(options, SPEECH_COMMANDS_HOME)
    listed = {name: _by_speaker(folder, _read_list(folder / name)) for name in LISTS.values()}
    nobody = set().union(*listed.values())
    found = _find(folder)
    recordings = _by_speaker(folder, found)
    corpus = Corpus(
        title="speech_commands (Google Speech Commands)",
        training={name: found for name, found in recordings.items() if name not in nobody},
        held_out=_of_words(listed[LISTS[options.evaluation]], {match[1] for match in found}),
        public={},
    )
    return federate_speakers(corpus, options, seed)


def _find(folder: Path) -> list[re.Match[str]]:
    """List the recordings, by word and name; raise InputError when there is none."""
    paths = (
        f"{word.name}/{file.name}"
        for word in filter(os.DirEntry.is_dir, visible(folder))
        for file in visible(Path(word.path))
    )
    found = [match for path in paths if (match := FILE_NAME.fullmatch(path))]
    if not found:
        raise InputError(
            f"data.path: {folder} holds no recordings named {{word}}/{{speaker}}_nohash_"
            f"{{number}}.wav; publicly distributed as {SPEECH_COMMANDS_HOME}"
        )
    return found


def _read_list(path: Path) -> list[re.Match[str]]:
    """Read the recordings that a list names, one a line, each once.

    Raises InputError when a line names none: whom it keeps out of the population is not known.
    """
    try:
        lines = [(number, line.strip()) for number, line in text_lines(path) if line.strip()]
    except FileNotFoundError as error:
        raise InputError(
            f"data.path: cannot read {path} ({error.strerror}); publicly distributed as "
            f"{SPEECH_COMMANDS_HOME}"
        ) from None
    except OSError as error:
        raise unreachable(path, error) from None
    found = {line: FILE_NAME.fullmatch(line) for _, line in lines}
    for number, line in lines or [(1, "")]:
        if found.get(line) is None or not line.isprintable():
            raise InputError(
                f"{path}: line {number}: expected a recording such as "
                f"yes/0a7c2a8d_nohash_0.wav, found {line!r}"
            )
    return [match for match in found.values() if match]


def _by_speaker(folder: Path, found: Iterable[re.Match[str]]) -> BySpeaker:
    speakers: dict[str, list[AudioFile]] = {}
    for match in found:
        recording = AudioFile(str(folder / match[0]), text=match[1])
        speakers.setdefault(match[2], []).append(recording)
    return speakers


def _of_words(speakers: BySpeaker, words: Container[str]) -> BySpeaker:
    """Leave out words that have no folder here: who removed one has no use for its recordings."""
    return {name: [one for one in found if one.text in words] for name, found in speakers.items()}
