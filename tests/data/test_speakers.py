import sys

import pytest

from fedpriv.data.audio import AudioFile
from fedpriv.data.partition import PartitionConfig
from fedpriv.data.speakers import Corpus, federate_speakers, read_parts
from fedpriv.data.speech import SpeechConfig, SpokenOptions
from fedpriv.errors import FedprivError, InputError

NATURAL = PartitionConfig(kind="natural")


def part(*speakers, recordings=3, folder="sounds"):
    return {
        name: [AudioFile(f"{folder}/{name}{number}.wav", name) for number in range(recordings)]
        for name in speakers
    }


def federate(training, held_out=None, public=None, seed=1, **changes):
    corpus = Corpus("tales", training, held_out or part("zoe"), public or {})
    settings = {"name": "tales", "partition": NATURAL, **changes}
    return federate_speakers(corpus, SpokenOptions(**settings), seed)


def speakers(recordings):
    return sorted({recording.text for recording in recordings})


def test_nobody_is_in_two_parts():
    dataset = federate(
        training=part("ann", "bob", "cid", "dan", "eve"),
        held_out=part("bob", "cid", folder="more"),
        public=part("cid", "dan", "eli", folder="other"),
    )
    assert dataset.user_ids == ("speaker-ann", "speaker-eve")
    assert speakers(r for user in dataset.users for r in user) == ["ann", "eve"]
    assert speakers(dataset.held_out) == ["bob", "cid"]
    assert speakers(dataset.public) == ["dan"]
    assert speakers(dataset.public_held_out) == ["eli"]
    assert all(recording.path.startswith("other/") for recording in dataset.public)


def test_every_eighth_public_speaker_measures():
    public = part(*"abcdefghijklmnopq")
    dataset = federate(part("zed"), public=public)
    assert speakers(dataset.public_held_out) == ["b", "j"]
    assert speakers(dataset.public) == list("acdefghiklmnopq")
    assert "b" not in dataset.alphabet.characters
    assert dataset.description.endswith("51 recordings by 17 speakers public")


def test_fewer_users_are_drawn_by_the_seed_in_the_order_of_their_names():
    drawn = [federate(part(*"abcdef"), users=3, seed=seed).user_ids for seed in range(30)]
    assert federate(part(*"abcdef"), users=3, seed=0).user_ids == drawn[0]
    assert all(list(ids) == sorted(ids) and len(set(ids)) == 3 for ids in drawn)
    assert {name for ids in drawn for name in ids} == {f"speaker-{name}" for name in "abcdef"}


def test_there_may_be_places_for_more_users_than_there_are():
    assert federate(part("ann", "bob"), users=3).population == 2
    assert not federate(part("ann", "bob"), users=3).notes
    (note,) = federate(part(*"abcdef"), users=4).notes
    assert "there are 6 people here" in note
    assert "the other 2 are left out" in note


def test_recordings_of_a_user_are_capped_at_random_in_their_order():
    drawn = [
        federate(part("ann", recordings=9), examples_per_user=4, seed=seed).users[0]
        for seed in range(30)
    ]
    assert all(len(user) == 4 and sorted(user, key=str) == list(user) for user in drawn)
    assert len({recording for user in drawn for recording in user}) == 9
    assert [len(user) for user in federate(part("ann"), examples_per_user=4).users] == [3]


def test_users_never_shape_the_alphabet():
    dataset = federate(part("xyz"), public=part("abc"))
    assert dataset.alphabet.characters == "abc"


def test_an_alphabet_file_comes_first(tmp_path):
    (tmp_path / "letters").write_text("x\n")
    speech = SpeechConfig(alphabet=tmp_path / "letters")
    assert federate(part("ann"), public=part("bob"), speech=speech).alphabet.characters == "x"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"partition": PartitionConfig(kind="iid")}, r"kind must be natural for tales.*got iid"),
        ({"held_out": part("ann", "bob")}, "tales has no training speaker here who is not also"),
    ],
)
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(InputError, match=message) as refused:
        federate(part("ann", "bob"), **changes)
    assert "\n" not in str(refused.value)


def test_a_recording_of_two_parts_counts_once():
    parts = {"one": part("ann"), "two": part("ann", "bob", recordings=4)}
    whole = read_parts(["one", "two"], parts.__getitem__)
    assert {name: [r.path for r in found] for name, found in whole.items()} == {
        name: [f"sounds/{name}{number}.wav" for number in range(4)] for name in ("ann", "bob")
    }


def test_a_missing_soundfile_is_noticed_at_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(FedprivError, match="pip install soundfile"):
        federate(part("ann"))
