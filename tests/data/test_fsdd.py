import os
from pathlib import Path

import pytest
from held_out import held_out
from schema import data_options
from sounds import write_tone

from fedpriv.data.fsdd import WORDS, build_fsdd
from fedpriv.data.partition import PartitionConfig
from fedpriv.errors import InputError

NATURAL = PartitionConfig(kind="natural")
SPEAKERS = ("anna", "ben", "cleo")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three speakers, who say three digits 14 times each; no two recordings are equally long."""
    folder = tmp_path_factory.mktemp("fsdd")
    for speaker in range(3):
        for digit in range(3):
            for index in range(14):
                name = f"{digit}_{SPEAKERS[speaker]}_{index}.wav"
                seconds = 0.01 + 0.001 * (100 * speaker + 20 * digit + index)
                write_tone(folder / "recordings" / name, seconds)
    (folder / "recordings" / "notes.wav").write_text("of another name, left alone")
    return folder


def config(path, **changes):
    return data_options(name="fsdd", path=path, **{"users": 12, **changes})


def files(strings):
    return [path.name for string in strings for path in string.paths]


def speakers(strings):
    return {name.split("_")[1] for name in files(strings)}


def indices(strings):
    return {int(name.removesuffix(".wav").split("_")[2]) for name in files(strings)}


def test_hidden_files_are_no_data(tmp_path):
    for index in range(12):
        write_tone(tmp_path / "recordings" / f"0_anna_{index}.wav")
        (tmp_path / "recordings" / f"._0_anna_{index}.wav").write_bytes(b"\0\x05\x16\x07")
        (tmp_path / "recordings" / f".0_ben_{index}.wav").write_bytes(b"\0")
    dataset = build_fsdd(config(tmp_path, users=None, partition=NATURAL), seed=1)
    assert dataset.user_ids == ("speaker-anna",)
    assert dataset.user(0).skipped == 0


def test_every_speaker_is_a_user(folder):
    dataset = build_fsdd(config(folder, users=None, partition=NATURAL), seed=1)
    assert list(dataset.user_ids) == ["speaker-anna", "speaker-ben", "speaker-cleo"]
    assert [speakers(user) for user in dataset.users] == [{"anna"}, {"ben"}, {"cleo"}]
    assert [len(user) for user in dataset.users] == [10, 10, 10]
    assert indices(s for user in dataset.users for s in user) == set(range(5, 14))
    assert dataset.public == dataset.public_held_out == ()
    assert dataset.description == (
        "fsdd (Free Spoken Digit Dataset): 3 users (one for each voice), 10 digit strings each; "
        f"{len(dataset.held_out)} test strings by anna, ben, cleo"
    )


@pytest.mark.parametrize("partition", [NATURAL, PartitionConfig(kind="iid")])
@pytest.mark.parametrize("strangers", [(), ("ben",)])
@pytest.mark.parametrize("evaluation", ["test", "development"])
def test_what_is_said_of_it_is_true(folder, partition, strangers, evaluation):
    dataset = build_fsdd(
        config(
            folder,
            users=None if partition is NATURAL else 6,
            partition=partition,
            evaluation=evaluation,
            speech={"held_out_speakers": strangers},
        ),
        seed=1,
    )
    theirs = speakers(string for user in dataset.users for string in user)
    shared = theirs & speakers(dataset.held_out)
    assert dataset.facts.held_out == ("same" if shared else "others")
    voices = [next(iter(speakers(user))) for user in dataset.users]
    assert dataset.facts.users == ("person" if len(set(voices)) == len(voices) else "share")
    often = [name for user in dataset.users for name in files(user)]
    assert dataset.facts.example == "joined"
    assert len(often) > len(set(often))  # a recording in two examples


def test_the_folder_may_be_the_one_of_the_recordings(folder):
    inner = build_fsdd(config(folder / "recordings"), seed=1)
    assert inner.users == build_fsdd(config(folder), seed=1).users


def test_fewer_natural_users_are_drawn_by_the_seed(folder):
    dataset = build_fsdd(config(folder, users=2, partition=NATURAL), 0)
    assert "there are 3 people here" in dataset.notes[0]
    drawn = {
        build_fsdd(config(folder, users=2, partition=NATURAL), seed).user_ids for seed in range(20)
    }
    assert drawn == {
        ("speaker-anna", "speaker-ben"),
        ("speaker-anna", "speaker-cleo"),
        ("speaker-ben", "speaker-cleo"),
    }


def test_a_string_is_heard_and_transcribed(folder):
    dataset = build_fsdd(config(folder, speech={"on_bad": "stop"}), seed=1)
    user = dataset.user(0)
    for row, string in enumerate(dataset.users[0]):
        digits = [int(path.name[0]) for path in string.paths]
        assert string.text == " ".join(WORDS[digit] for digit in digits)
        assert 1 <= len(digits) <= 6
        assert 0.05 <= string.pause_seconds <= 0.2
        target = user.targets[row, : user.target_lengths[row]]
        assert dataset.alphabet.decode(target.tolist()) == string.text
        heard = sum(
            0.01 + 0.001 * (100 * SPEAKERS.index(speaker) + 20 * int(digit) + int(index))
            for digit, speaker, index in (path.stem.split("_") for path in string.paths)
        )
        expected = 16_000 * (heard + string.pause_seconds * (len(digits) - 1))
        assert user.lengths[row].item() == pytest.approx(expected, abs=10)


def test_users_who_share_a_voice_share_no_recording(folder):
    dataset = build_fsdd(config(folder, users=8, examples_per_user=30), seed=1)
    assert dataset.population == 8
    assert len(set(dataset.user_ids)) == 8
    assert all(len(speakers(user)) == 1 for user in dataset.users)
    assert {f"speaker-{next(iter(speakers(user)))}-" for user in dataset.users} == {
        user_id.rstrip("0123456789") for user_id in dataset.user_ids
    }
    held = [set(files(user)) for user in dataset.users]
    assert sum(map(len, held)) == len(set().union(*held)) == 3 * 3 * 9
    assert "sharing 3 voices" in dataset.description


def test_all_recordings_come_before_one_comes_again(folder):
    user = build_fsdd(config(folder, users=3, examples_per_user=27), seed=1).users[0]
    names = files(user)
    assert len(set(names[:27])) == 27
    assert len(names) > 27


def test_held_out_recordings_are_each_in_one_string_of_one_speaker(folder):
    dataset = build_fsdd(config(folder), seed=1)
    assert sorted(files(dataset.held_out)) == sorted(
        f"{digit}_{name}_{index}.wav"
        for digit in range(3)
        for name in SPEAKERS
        for index in range(5)
    )
    assert all(len(speakers([string])) == 1 for string in dataset.held_out)
    assert not set(files(dataset.held_out)) & set(files(s for user in dataset.users for s in user))


def test_development_recordings_belong_to_nobody(folder):
    dataset = build_fsdd(config(folder, evaluation="development"), seed=1)
    assert indices(dataset.held_out) == set(range(5, 10))
    assert indices(s for user in dataset.users for s in user) == set(range(10, 14))


def test_a_held_out_speaker_is_in_no_user(folder):
    speech = {"held_out_speakers": ("ben",)}
    dataset = build_fsdd(config(folder, speech=speech), seed=1)
    assert speakers(dataset.held_out) == {"ben"}
    assert len(files(dataset.held_out)) == 3 * 14
    assert speakers(s for user in dataset.users for s in user) == {"anna", "cleo"}
    assert indices(s for user in dataset.users for s in user) == set(range(5, 14))


def test_development_does_not_hear_a_held_out_speaker(folder):
    speech = {"held_out_speakers": ("ben",)}
    dataset = build_fsdd(config(folder, speech=speech, evaluation="development"), seed=1)
    assert speakers(dataset.held_out) == {"anna", "cleo"}
    assert indices(dataset.held_out) == set(range(5, 10))


def test_the_seed_moves_the_users_and_not_the_held_out_strings(folder):
    one, again, two = (build_fsdd(config(folder), seed) for seed in (1, 1, 2))
    assert one.users == again.users
    assert one.users != two.users
    assert one.held_out == again.held_out == two.held_out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"users": None}, r"data\.users must be at most 81 for .*kind=iid .*got None"),
        ({"users": 82}, r"data\.users must be at most 81 .*got 82"),
        (
            {"partition": PartitionConfig(kind="shards")},
            r"data\.partition\.kind must be natural or iid for fsdd, got shards",
        ),
        (
            {"speech": {"held_out_speakers": ("ben", "zoe")}},
            r"held_out_speakers: nobody is called zoe; the speakers are anna, ben, cleo",
        ),
        (
            {"speech": {"held_out_speakers": SPEAKERS}},
            r"no training recordings are left .*held_out_speakers=\['anna', 'ben', 'cleo'\]",
        ),
    ],
)
def test_settings_that_cannot_be(folder, changes, message):
    with pytest.raises(InputError, match=message) as refused:
        build_fsdd(config(folder, **changes), seed=1)
    assert "\n" not in str(refused.value)


def test_as_many_users_as_recordings(folder):
    dataset = build_fsdd(config(folder, users=81, examples_per_user=2), seed=1)
    assert {len(set(files(user))) for user in dataset.users} == {1}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist; name the folder of fsdd"),
        (Path.mkdir, r"holds no recordings named \{digit\}_\{speaker\}_\{index\}\.wav; publicly"),
    ],
)
def test_a_folder_without_recordings(tmp_path, make, message):
    make(tmp_path / "fsdd")
    with pytest.raises(InputError, match=f"{message}.*Free Spoken Digit Dataset"):
        build_fsdd(config(tmp_path / "fsdd"), seed=1)
    with pytest.raises(InputError, match=r"data\.path must name the folder of fsdd"):
        build_fsdd(config(None), seed=1)


@pytest.fixture
def real_folder():
    root = os.environ.get("FEDPRIV_DATA")
    if root is None or not (Path(root) / "fsdd").is_dir():
        pytest.skip("set FEDPRIV_DATA to a folder that holds fsdd/ to test on the real files")
    return Path(root) / "fsdd"


def test_real_recordings(real_folder):
    speech = {"on_bad": "stop", "held_out_speakers": ("theo",)}
    dataset = build_fsdd(config(real_folder, users=90, examples_per_user=25, speech=speech), seed=1)
    held = [set(files(user)) for user in dataset.users]
    assert sum(map(len, held)) == len(set().union(*held)) == 5 * 10 * 45
    assert len(dataset.user(0)) == 25
    assert 0.5 < dataset.user(0).lengths.float().mean() / 16_000 < 4
    evaluation = held_out(dataset)
    assert evaluation.skipped == 0
    assert len(files(dataset.held_out)) == 500
    assert evaluation.inputs.abs().max() <= 1
