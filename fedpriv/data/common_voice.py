"""Common Voice as it is released, in any of its languages: its contributors as users."""

from __future__ import annotations

import csv
from pathlib import Path

from fedpriv.data.audio import AudioFile
from fedpriv.data.config import DataConfig
from fedpriv.data.idx_images import require_path
from fedpriv.data.speakers import BySpeaker, Corpus, federate_speakers, read_parts
from fedpriv.data.speech import FederatedSpeech
from fedpriv.errors import InputError

COMMON_VOICE_HOME = "Mozilla Common Voice: commonvoice.mozilla.org"
HELD_OUT = {"test": "test", "development": "dev"}
SPEAKER, CLIP, SENTENCE = "client_id", "path", "sentence"


def build_common_voice(config: DataConfig, seed: int) -> FederatedSpeech:
    """Make the contributors of one language of Common Voice users.

    `data.path` is the folder of the language, with `train.tsv`, `test.tsv`, ... and `clips/`.
    `data.speech.train_subsets`, `held_out_subsets` and `public_subsets` name tables without
    `.tsv`; left empty they mean `train`, `test` (with `evaluation: development` `dev`) and
    none. Who is held out or public is no user, and every eighth public speaker is kept to
    measure the seed model. Without a public part the alphabet is the English one: name a file
    in `data.speech.alphabet` for other languages. Tables are read at once, sound when it is
    needed. Raises InputError for a missing or malformed table and for settings that the
    speakers cannot satisfy.
    """
    folder, speech = require_path(config, COMMON_VOICE_HOME), config.speech
    training = speech.train_subsets or ("train",)

    def read(subset: str) -> BySpeaker:
        return read_table(folder / f"{subset}.tsv", folder / "clips")

    corpus = Corpus(
        title=f"common_voice ({folder.resolve().name}: {', '.join(training)})",
        training=read_parts(training, read),
        held_out=read_parts(speech.held_out_subsets or [HELD_OUT[config.evaluation]], read),
        public=read_parts(speech.public_subsets, read),
    )
    return federate_speakers(corpus, config, seed)


def read_table(path: Path, clips: Path) -> BySpeaker:
    """List the recordings of a table by speaker, in the order of their names; no sound is read.

    Raises InputError, naming the file, for no such table, missing columns, a row without
    speaker or clip, and no rows.
    """
    speakers: dict[str, list[AudioFile]] = {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            _require_columns(path, rows)
            for row in rows:
                if not row[SPEAKER] or not row[CLIP]:
                    raise InputError(f"{path}: line {rows.line_num} has no {SPEAKER} or no {CLIP}")
                clip = AudioFile(str(clips / row[CLIP]), row[SENTENCE])
                speakers.setdefault(row[SPEAKER], []).append(clip)
    except FileNotFoundError:
        raise InputError(
            f"data.path: {path} is missing; publicly distributed as {COMMON_VOICE_HOME}"
        ) from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read ({error}); replace it") from None
    if not speakers:
        raise InputError(f"{path}: lists no recordings; replace it or name another part")
    return {name: sorted(found, key=lambda one: one.path) for name, found in speakers.items()}


def _require_columns(path: Path, rows: csv.DictReader[str]) -> None:
    missing = {SPEAKER, CLIP, SENTENCE} - set(rows.fieldnames or ())
    if missing:
        raise InputError(
            f"{path}: no column {', '.join(sorted(missing))} (tab-separated, named in line 1)"
        )
