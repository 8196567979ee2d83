import pytest
from held_out import held_out
from schema import data_options
from sounds import write_tone

from fedpriv.data.partition import PartitionConfig
from fedpriv.data.speech_commands import build_speech_commands
from fedpriv.errors import InputError

NATURAL = PartitionConfig(kind="natural")
FILES = [
    "yes/0a7c2a8d_nohash_0.wav",
    "yes/0a7c2a8d_nohash_1.wav",
    "no/0a7c2a8d_nohash_0.wav",
    "no/1ecfb537_nohash_0.wav",
    "yes/2aa787cf_nohash_0.wav",
    "no/2aa787cf_nohash_0.wav",
    "yes/3bc21161_nohash_0.wav",
]


@pytest.fixture
def folder(tmp_path):
    for name in FILES:
        write_tone(tmp_path / name, rate=16_000)
    write_tone(tmp_path / "_background_noise_" / "running_tap.wav")
    write_tone(tmp_path / "_background_noise_" / "9f9f9f9f_nohash_0.wav")
    (tmp_path / "testing_list.txt").write_text("".join(f"{name}\n" for name in FILES[4:6]))
    (tmp_path / "validation_list.txt").write_text(FILES[6])
    return tmp_path


def build(folder, seed=1, **changes):
    settings = {"name": "speech_commands", "path": folder, "partition": NATURAL, **changes}
    return build_speech_commands(data_options(**settings), seed)


def names(recordings):
    return ["/".join(recording.path.split("/")[-2:]) for recording in recordings]


def test_speakers_are_users(folder):
    dataset = build(folder)
    assert dataset.user_ids == ("speaker-0a7c2a8d", "speaker-1ecfb537")
    assert names(dataset.users[0]) == sorted(FILES[:3])
    assert names(dataset.users[1]) == ["no/1ecfb537_nohash_0.wav"]
    assert names(dataset.held_out) == FILES[4:6]
    assert dataset.description == (
        "speech_commands (Google Speech Commands): 2 speakers as users; "
        "2 recordings by 1 speaker for test"
    )
    assert dataset.sizes == "2 users with 1 to 3 recordings each, 4 in all"
    assert (dataset.facts.users, dataset.facts.held_out) == ("person", "others")


def test_the_transcript_is_the_word(folder):
    dataset = build(folder, speech={"on_bad": "stop"})
    user = dataset.user(0)
    texts = [dataset.alphabet.decode(target.tolist()) for target in user.targets]
    assert texts == ["no", "yes", "yes"]
    assert user.lengths.tolist() == [1_600] * 3


def test_development_measures_on_the_validation_list_with_the_same_users(folder):
    dataset = build(folder, evaluation="development")
    assert names(dataset.held_out) == FILES[6:]
    assert dataset.user_ids == build(folder).user_ids


def test_a_listed_recording_that_is_missing_is_a_bad_one(folder):
    (folder / FILES[4]).unlink()
    assert held_out(build(folder)).skipped == 1


def test_a_word_whose_folder_was_removed_is_not_measured(folder):
    write_tone(folder / "up" / "2aa787cf_nohash_0.wav")
    with (folder / "testing_list.txt").open("a") as lines:
        lines.write("up/2aa787cf_nohash_0.wav\n")
    assert len(held_out(build(folder))) == 3
    (folder / "up" / "2aa787cf_nohash_0.wav").unlink()
    (folder / "up").rmdir()
    assert (len(held_out(build(folder))), held_out(build(folder)).skipped) == (2, 0)


def test_hidden_files_and_folders_are_no_data(folder):
    for name in ("yes/._0a7c2a8d_nohash_0.wav", ".yes/9f9f9f9f_nohash_0.wav", "yes/.DS_Store"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"\0\x05\x16\x07")
    (folder / "._testing_list.txt").write_bytes(b"\0")
    dataset = build(folder)
    assert dataset.user_ids == ("speaker-0a7c2a8d", "speaker-1ecfb537")
    assert [len(user) for user in dataset.users] == [3, 1]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("ending", [b"\n", b"\r\n", b"\n\n"])
def test_a_list_is_read_with_its_marks_and_each_name_once(folder, mark, ending):
    lines = [*FILES[4:6], FILES[4], ""]
    (folder / "testing_list.txt").write_bytes(mark + ending.join(map(str.encode, lines)))
    assert names(build(folder).held_out) == FILES[4:6]


@pytest.mark.parametrize("name", ["testing_list.txt", "validation_list.txt"])
def test_both_lists_are_needed(folder, name):
    (folder / name).unlink()
    with pytest.raises(InputError, match=rf"data\.path: cannot read .*{name}.*Speech Commands"):
        build(folder)


@pytest.mark.parametrize("content", ["", "yes/0a7c2a8d_nohash_0.wav\nyes.wav\n"])
def test_a_list_of_something_else(folder, content):
    (folder / "testing_list.txt").write_text(content)
    found = "'yes.wav'" if content else "''"
    with pytest.raises(
        InputError, match=rf"testing_list\.txt: line \d: expected .* found {found}$"
    ):
        build(folder)


def test_a_folder_without_recordings(folder):
    for name in FILES:
        (folder / name).unlink()
    with pytest.raises(InputError, match=r"holds no recordings named \{word\}/.*Speech Commands"):
        build(folder)
    with pytest.raises(InputError, match=r"data\.path must name the folder of speech_commands"):
        build(None)
