"""Google's Speech Commands, version 2: single words by 2,618 speakers, who are the users."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from fedpriv.data.audio import AudioFile
from fedpriv.data.config import DataConfig
from fedpriv.data.idx_images import require_path
from fedpriv.data.speakers import BySpeaker, Corpus, federate_speakers
from fedpriv.data.speech import FederatedSpeech
from fedpriv.errors import InputError

SPEECH_COMMANDS_HOME = "Speech Commands data set v0.02, TensorFlow"
FILE_NAME = re.compile(r"([^/_][^/]*)/([^/]+)_nohash_\d+\.wav")
LISTS = {"test": "testing_list.txt", "development": "validation_list.txt"}


def build_speech_commands(config: DataConfig, seed: int) -> FederatedSpeech:
    """Make the speakers of Speech Commands users; the transcript of a recording is its word.

    `data.path` is the folder with a folder for each word, whose files are
    `{speaker}_nohash_{number}.wav`; folders whose names begin with `_` are noise and left out.
    The speakers of `testing_list.txt` (evaluation: test) and of `validation_list.txt`
    (evaluation: development) never are users. Raises InputError for a missing folder or list
    and for settings that the speakers cannot satisfy.
    """
    folder = require_path(config, SPEECH_COMMANDS_HOME)
    listed = {name: _by_speaker(folder, _read_list(folder / name)) for name in LISTS.values()}
    nobody = set().union(*listed.values())
    recordings = _by_speaker(folder, _find(folder))
    corpus = Corpus(
        title="speech_commands (Google Speech Commands)",
        training={name: found for name, found in recordings.items() if name not in nobody},
        held_out=listed[LISTS[config.evaluation]],
        public={},
    )
    return federate_speakers(corpus, config, seed)


def _find(folder: Path) -> list[re.Match[str]]:
    """List the recordings, by word and name; raise InputError when there is none."""
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/*.wav"))
    found = [match for path in paths if (match := FILE_NAME.fullmatch(path))]
    if not found:
        raise InputError(
            f"data.path: {folder} holds no recordings named {{word}}/{{speaker}}_nohash_"
            f"{{number}}.wav; publicly distributed as {SPEECH_COMMANDS_HOME}"
        )
    return found


def _read_list(path: Path) -> list[re.Match[str]]:
    """Read the recordings that a list names, one a line; raise InputError when it is no list."""
    try:
        lines = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"data.path: cannot read {path} ({error}); publicly distributed as "
            f"{SPEECH_COMMANDS_HOME}"
        ) from None
    matches = [FILE_NAME.fullmatch(line) for line in lines]
    found = [match for match in matches if match]
    if not found or len(found) < len(lines):
        wrong = next((line for line, match in zip(lines, matches, strict=True) if not match), "")
        raise InputError(
            f"{path}: expected a recording such as yes/0a7c2a8d_nohash_0.wav on each line, "
            f"found {wrong!r}"
        )
    return found


def _by_speaker(folder: Path, found: Iterable[re.Match[str]]) -> BySpeaker:
    speakers: dict[str, list[AudioFile]] = {}
    for match in found:
        recording = AudioFile(str(folder / match[0]), text=match[1])
        speakers.setdefault(match[2], []).append(recording)
    return speakers
