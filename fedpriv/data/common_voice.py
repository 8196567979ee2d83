"""Common Voice as it is released, in any of its languages: its contributors as users."""

from __future__ import annotations

from pathlib import Path

from fedpriv.data.audio import AudioFile, BadRow
from fedpriv.data.files import is_clean, is_hidden, text_lines, unreachable
from fedpriv.data.parts import absent, require_path
from fedpriv.data.speakers import (
    NOBODY,
    BySpeaker,
    Corpus,
    PartsOptions,
    federate_speakers,
    read_parts,
)
from fedpriv.data.speech import FederatedSpeech
from fedpriv.errors import InputError

COMMON_VOICE_HOME = "Mozilla Common Voice: commonvoice.mozilla.org"
HELD_OUT = {"test": "test", "development": "dev"}
SPEAKER, CLIP, SENTENCE = "client_id", "path", "sentence"


def build_common_voice(options: PartsOptions, seed: int) -> FederatedSpeech:
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
    folder, speech = require_path(options, COMMON_VOICE_HOME), options.speech
    training = speech.train_subsets or ("train",)

    def read(subset: str) -> BySpeaker:
        return read_table(folder / f"{subset}.tsv", folder / "clips")

    corpus = Corpus(
        title=f"common_voice ({folder.resolve().name}: {', '.join(training)})",
        training=read_parts(training, read),
        held_out=read_parts(speech.held_out_subsets or [HELD_OUT[options.evaluation]], read),
        public=read_parts(speech.public_subsets, read),
    )
    return federate_speakers(corpus, options, seed)


def read_table(path: Path, clips: Path) -> BySpeaker:
    """List the recordings of a table by speaker, in the order of their names; no sound is read.

    A row is what stands between line feeds, and its fields what stands between tabs; nothing is
    quoted. A row that cannot be used is a bad recording of its speaker, where it says who that
    is; of nobody (`NOBODY`), where its fields are too many or too few, or strange, and the speaker
    that they seem to name is in no other row.
    Raises InputError, naming the file, for no such table, missing columns, and no rows.
    """
    speakers: dict[str, list[AudioFile]] = {}
    doubtful: list[tuple[str, AudioFile]] = []
    try:
        lines = text_lines(path)
        header = [name.strip() for name in next(lines, (1, ""))[1].split("\t")]
        _require_columns(path, header)
        for number, line in lines:
            if line.strip("\r "):
                speaker, recording, sure = _parsed(line.split("\t"), header, clips)
                if isinstance(recording, BadRow):
                    recording = BadRow(f"{path}: line {number} {recording}")
                if sure:
                    speakers.setdefault(speaker, []).append(recording)
                else:
                    doubtful.append((speaker, recording))
    except FileNotFoundError:
        what = f"a folder of tables ({COMMON_VOICE_HOME}), and in data.speech some that it has"
        raise absent(path, what) from None
    except OSError as error:
        raise unreachable(path, error) from None
    if not speakers:
        reason = f" that can be used; {doubtful[0][1]}" if doubtful else ""
        raise InputError(f"{path}: lists no recordings{reason}; replace it or name another part")
    for speaker, row in doubtful:
        speakers.setdefault(speaker if speaker in speakers else NOBODY, []).append(row)
    return {name: sorted(found, key=lambda one: one.path) for name, found in speakers.items()}


def _parsed(fields: list[str], header: list[str], clips: Path) -> tuple[str, AudioFile, bool]:
    """Return speaker and recording of a row, or what is wrong with it, and if the speaker is sure.

    Old releases list clips without `.mp3`.
    """
    row = dict(zip(header, fields, strict=False))
    speaker, clip = row.get(SPEAKER, "").strip(), row.get(CLIP, "").strip()
    sure = len(fields) == len(header) and fields != header and bool(speaker)
    if len(fields) != len(header):
        problem = f"has {len(fields)} fields and line 1 has {len(header)}"
    elif fields == header:
        problem = "names the columns again"
    elif not speaker or not clip:
        problem = f"has no {SPEAKER} or no {CLIP}"
    elif not speaker.isprintable():
        problem, sure = f"has a {SPEAKER} with characters that no name has", False
    elif not clip.isprintable() or "/" in clip or is_hidden(clip):
        problem = f"has a {CLIP} that names no clip"
    elif not is_clean(row[SENTENCE]):
        problem = "is not UTF-8"
    else:
        name = clip if Path(clip).suffix else f"{clip}.mp3"
        return speaker, AudioFile(str(clips / name), row[SENTENCE]), True
    return speaker, BadRow(problem), sure


def _require_columns(path: Path, header: list[str]) -> None:
    missing = {SPEAKER, CLIP, SENTENCE} - set(header)
    if missing:
        raise InputError(
            f"{path}: no column {', '.join(sorted(missing))} (tab-separated, named in line 1)"
        )
