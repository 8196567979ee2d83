import errno
import os
import shutil

import pytest
import soundfile
from schema import data_options
from sounds import write_tone

from fedpriv.data.librispeech import build_librispeech, read_subset
from fedpriv.data.partition import PartitionConfig
from fedpriv.data.text import ENGLISH
from fedpriv.errors import EnvironmentFault, InputError

NATURAL = PartitionConfig(kind="natural")


def write_chapter(folder, speaker, chapter, utterances, text="IT'S A TALE"):
    """Write one chapter of a subset; return its folder."""
    place = folder / speaker / chapter
    names = [f"{speaker}-{chapter}-{number:04}" for number in range(utterances)]
    for name in names:
        write_tone(place / f"{name}.flac", rate=16_000)
    transcripts = "".join(f"{name} {text}\n" for name in names)
    (place / f"{speaker}-{chapter}.trans.txt").write_text(transcripts)
    return place


@pytest.fixture
def folder(tmp_path):
    write_chapter(tmp_path / "train-clean-100", "103", "1240", 3)
    write_chapter(tmp_path / "train-clean-100", "103", "999", 1)
    write_chapter(tmp_path / "train-clean-100", "26", "495", 2)
    write_chapter(tmp_path / "train-other-500", "20", "205", 2)
    write_chapter(tmp_path / "train-other-500", "26", "496", 1)
    write_chapter(tmp_path / "test-clean", "61", "70968", 2)
    write_chapter(tmp_path / "dev-clean", "84", "121123", 3)
    (tmp_path / "SPEAKERS.TXT").write_text("; of no use here")
    return tmp_path


def build(folder, seed=1, **changes):
    settings = {"name": "librispeech", "path": folder, "partition": NATURAL, **changes}
    return build_librispeech(data_options(**settings), seed)


def names(recordings):
    return [recording.path.rpartition("/")[2].removesuffix(".flac") for recording in recordings]


def test_readers_are_users(folder):
    dataset = build(folder)
    assert dataset.user_ids == ("speaker-103", "speaker-20", "speaker-26")
    assert [names(user) for user in dataset.users] == [
        ["103-1240-0000", "103-1240-0001", "103-1240-0002", "103-999-0000"],
        ["20-205-0000", "20-205-0001"],
        ["26-495-0000", "26-495-0001", "26-496-0000"],
    ]
    assert names(dataset.held_out) == ["61-70968-0000", "61-70968-0001"]
    assert dataset.public == dataset.public_held_out == ()
    assert dataset.alphabet.characters == ENGLISH
    assert dataset.description == (
        "librispeech (train-clean-100, train-other-500): 3 speakers as users; "
        "2 recordings by 1 speaker for test"
    )
    assert dataset.sizes == "3 users with 2 to 4 recordings each, 9 in all"
    assert dataset.facts.document() == {
        "users": "person",
        "example": "recording",
        "held_out": "others",
        "public": "none",
    }


def test_a_user_is_heard_and_transcribed(folder):
    dataset = build(folder, speech={"on_bad": "stop"})
    user = dataset.user(0)
    assert user.lengths.tolist() == [1_600] * 4
    assert dataset.alphabet.decode(user.targets[0].tolist()) == "it's a tale"


def test_nothing_is_decoded_before_it_is_needed(folder, monkeypatch):
    monkeypatch.setattr(soundfile, "SoundFile", lambda *_: pytest.fail("opened"))
    assert build(folder).population == 3


def test_development_measures_on_dev_clean(folder):
    dataset = build(folder, evaluation="development")
    assert names(dataset.held_out) == ["84-121123-0000", "84-121123-0001", "84-121123-0002"]
    assert dataset.population == 3


def test_subsets_are_chosen_by_name(folder):
    speech = {
        "train_subsets": ("train-other-500",),
        "held_out_subsets": ("test-clean", "dev-clean"),
    }
    dataset = build(folder, speech=speech)
    assert dataset.user_ids == ("speaker-20", "speaker-26")
    assert len(dataset.held_out) == 5


def test_public_speakers_are_no_users_not_even_with_other_recordings(folder):
    dataset = build(folder, speech={"public_subsets": ("train-clean-100",)})
    assert dataset.user_ids == ("speaker-20",)
    assert {name.split("-")[0] for name in names(dataset.public)} == {"103"}
    assert {name.split("-")[0] for name in names(dataset.public_held_out)} == {"26"}
    assert dataset.facts.public == "others"
    assert dataset.alphabet.characters == " 'aeilst"
    assert dataset.description.endswith("; 6 recordings by 2 speakers public")


def test_held_out_speakers_are_no_users_and_not_public(folder):
    speech = {"held_out_subsets": ("train-other-500",), "public_subsets": ("train-clean-100",)}
    write_chapter(folder / "train-clean-360", "14", "208", 1)
    dataset = build(folder, speech=speech)
    assert dataset.user_ids == ("speaker-14",)
    assert names(dataset.held_out) == ["20-205-0000", "20-205-0001", "26-496-0000"]
    assert {name.split("-")[0] for name in names(dataset.public)} == {"103"}


def test_what_lacks_its_transcript_or_its_sound_is_a_bad_recording(folder):
    place = write_chapter(folder / "train-other-500", "700", "1", 4)
    (place / "700-1-0001.flac").unlink()
    table = place / "700-1.trans.txt"
    table.write_text("700-1-0000 FINE\n700-1-0001 NO SOUND\n\n700-1-0003\n")
    dataset = build(folder)
    user = dataset.user(dataset.user_ids.index("speaker-700"))
    assert (len(user), user.skipped) == (1, 3)
    table.unlink()
    dataset = build(folder, speech={"on_bad": "stop"})
    with pytest.raises(InputError, match=r"700-1-0000\.flac: no transcript"):
        dataset.user(dataset.user_ids.index("speaker-700"))


def user_of(folder, table, content):
    """Return what is read of a reader whose transcripts are `content`."""
    place = write_chapter(folder / table, "700", "1", 3)
    (place / "700-1.trans.txt").write_bytes(content)
    dataset = build(folder)
    user = dataset.user(dataset.user_ids.index("speaker-700"))
    decode = dataset.alphabet.decode
    return [decode(target.tolist()) for target in user.targets], user.skipped, dataset


@pytest.mark.parametrize(
    ("content", "texts", "skipped"),
    [
        (b"700-1-0000 A\n700-1-0001 \xff\n700-1-0002 C\n", ["a", "c"], 1),
        (b"\xef\xbb\xbf700-1-0000 A\r\n700-1-0001 B\r\n700-1-0002 C\r\n", ["a", "b", "c"], 0),
        (b"700-1-0000 A\r700-1-0009 B\n700-1-0001 B\xc2\x85C\n700-1-0002 C\n", ["b c", "c"], 1),
        (b"700-1-0000 A\n700-1-0001 B\nAND MORE\n700-1-0002 C\n", ["a", "b", "c"], 1),
        (b"700-1-0000 A\n700-1-0001 B\n700-1-0001 D\n700-1-0002 C\n", ["a", "c"], 1),
        (b"700-1-0000 A\n700-1-0\x0001 B\n700-1-0002 C\n", ["a", "c"], 2),
        (b"700-1-0000 A\n26-495-0000 B\n700-1-0001 B\n700-1-0002 C\n", ["a", "b", "c"], 1),
    ],
)
def test_a_bad_line_costs_its_recording_alone(folder, content, texts, skipped):
    heard, left_out, dataset = user_of(folder, "train-other-500", content)
    assert [text.strip() for text in heard] == texts
    assert left_out == skipped
    assert dataset.user_ids == ("speaker-103", "speaker-20", "speaker-26", "speaker-700")
    assert [dataset.user(i).skipped for i in range(3)] == [0, 0, 0]


def test_hidden_files_and_folders_are_no_data(folder):
    before = [names(user) for user in build(folder).users]
    subset = folder / "train-clean-100"
    for place in (subset / "103" / "1240", subset / "26" / "495"):
        for path in list(place.iterdir()):
            (place / f"._{path.name}").write_bytes(b"\0\x05\x16\x07")
    for hidden in (subset / ".Trash", subset / "103" / "._1240", folder / ".train-clean-100"):
        write_chapter(hidden, "1", "2", 1)
    write_chapter(subset / "@eaDir", "103", "1240", 1)
    write_chapter(folder / "._train-clean-360", "14", "208", 1)
    (subset / "__MACOSX" / "103").mkdir(parents=True)
    for path in (subset / ".DS_Store", subset / "26" / ".DS_Store", subset / "26" / "README"):
        path.write_bytes(b"\0")
    assert [names(user) for user in build(folder).users] == before


def test_a_recording_that_is_in_two_subsets_counts_once(folder):
    write_chapter(folder / "train-clean-360", "26", "495", 3)
    dataset = build(folder)
    user = dataset.users[dataset.user_ids.index("speaker-26")]
    assert names(user) == ["26-495-0000", "26-495-0001", "26-495-0002", "26-496-0000"]


@pytest.mark.parametrize(
    "place", ["train-clean-100", "train-clean-100/26", "train-clean-100/26/495"]
)
@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE])
def test_a_folder_that_cannot_be_listed_is_not_passed_over(folder, monkeypatch, place, code):
    scandir = os.scandir

    def fail(path):
        if str(path) == str(folder / place):
            raise OSError(code, os.strerror(code))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fail)
    with pytest.raises(EnvironmentFault, match=rf"{place}: cannot be read .*{os.strerror(code)}"):
        build(folder)


def test_a_disk_that_is_gone_is_no_bad_recording(folder):
    dataset = build(folder)
    shutil.rmtree(folder)
    with pytest.raises(EnvironmentFault, match="this folder is missing or empty"):
        dataset.user(0)


@pytest.mark.parametrize(
    ("speech", "message"),
    [
        ({"train_subsets": ("train",)}, "train does not exist; name a folder of subsets"),
        ({"held_out_subsets": ("test-other",)}, "test-other does not exist"),
        ({"public_subsets": ("empty",)}, "empty holds no recordings named"),
    ],
)
def test_a_missing_subset(folder, speech, message):
    (folder / "empty").mkdir()
    with pytest.raises(InputError, match=f"data.path: .*{message}.*LibriSpeech ASR corpus"):
        build(folder, speech=speech)


def test_a_folder_of_something_else(tmp_path):
    with pytest.raises(InputError, match="holds no training subset such as train-clean-100"):
        build(tmp_path)
    with pytest.raises(InputError, match=r"data\.path must name the folder of librispeech"):
        build(None)


def test_speakers_are_named_by_their_folders(folder):
    assert list(read_subset(folder / "train-clean-100")) == ["103", "26"]
