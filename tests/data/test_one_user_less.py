"""Nothing about one user, or one example of it, changes what another user has."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
from schema import data_options
from writers import by_writers, write_writers

from fedpriv.data import build_dataset
from fedpriv.data.audio import AudioFile
from fedpriv.data.partition import PartitionConfig
from fedpriv.data.speakers import Corpus, federate_speakers
from fedpriv.data.speech import SpokenOptions

COUNTS = {100 + number: 9 + number % 4 for number in range(30)}
NATURAL = PartitionConfig(kind="natural")


def held_by_writers(folder, counts, **data):
    """The examples of each writer, by id."""
    config = data_options(**by_writers(write_writers(folder, counts), **data)["data"])
    dataset = build_dataset(config, seed=3)
    users = {user_id: dataset.user(place) for place, user_id in enumerate(dataset.user_ids)}
    return {user_id: (user.inputs.numpy(), user.targets.numpy()) for user_id, user in users.items()}


def recordings(counts):
    return {
        name: [AudioFile(f"{name}/{number}.wav", "a") for number in range(count)]
        for name, count in counts.items()
    }


def held_by_speakers(counts, **data):
    config = SpokenOptions(name="tales", partition=NATURAL, **data)
    held_out = recordings({"zed": 2})
    corpus = Corpus("tales", training=recordings(counts), held_out=held_out, public={})
    dataset = federate_speakers(corpus, config, seed=3)
    return dict(zip(dataset.user_ids, dataset.users, strict=True))


@pytest.fixture
def fsdd(tmp_path):
    for speaker in ("ann", "bob", "cyd"):
        for digit in range(10):
            for index in range(5, 8):
                wave = np.random.default_rng([digit, index]).normal(size=80) * 0.1
                soundfile.write(tmp_path / f"{digit}_{speaker}_{index}.wav", wave, 8000)
            soundfile.write(tmp_path / f"{digit}_{speaker}_0.wav", wave, 8000)
    return tmp_path


def held_by_fsdd(folder):
    config = data_options(name="fsdd", path=folder, partition=NATURAL, examples_per_user=20)
    dataset = build_dataset(config, seed=3)
    return dict(zip(dataset.user_ids, dataset.users, strict=True))


def others_agree(before, after, changed):
    """Whether all that are in both, but for the one that changed, have the same."""
    assert set(before) ^ set(after) <= {changed}
    for user_id in (set(before) & set(after)) - {changed}:
        if isinstance(before[user_id], tuple) and isinstance(before[user_id][0], np.ndarray):
            for one, other in zip(before[user_id], after[user_id], strict=True):
                np.testing.assert_array_equal(one, other)
        else:
            assert before[user_id] == after[user_id]
    return True


@pytest.mark.parametrize("evaluation", ["test", "development"])
@pytest.mark.parametrize("left", [0, 1, 12], ids=["gone", "one image", "more images"])
def test_writers(tmp_path, evaluation, left):
    settings = {"examples_per_user": 5, "evaluation": evaluation}
    before = held_by_writers(tmp_path / "before", COUNTS, **settings)
    counts = {**COUNTS, 100: left} if left else {w: n for w, n in COUNTS.items() if w != 100}
    after = held_by_writers(tmp_path / "after", counts, **settings)
    assert others_agree(before, after, "writer-100")
    assert len(after) > 20


@pytest.mark.parametrize("left", [0, 1, 12])
def test_speakers(left):
    counts = {f"{number:02}": 6 + number % 4 for number in range(20)}
    before = held_by_speakers(counts, examples_per_user=4)
    fewer = {**counts, "00": left} if left else {n: c for n, c in counts.items() if n != "00"}
    assert others_agree(before, held_by_speakers(fewer, examples_per_user=4), "speaker-00")


def test_of_the_speakers_that_were_chosen_one_less_brings_one_other():
    counts = {f"{number:02}": 3 for number in range(40)}
    before = held_by_speakers(counts, users=20)
    for gone in counts:
        after = held_by_speakers({n: c for n, c in counts.items() if n != gone}, users=20)
        here = f"speaker-{gone}" in before
        assert len(set(before) - set(after)) == len(set(after) - set(before)) == here


def test_joined_recordings(fsdd):
    before = held_by_fsdd(fsdd)
    Path(fsdd, "3_ann_7.wav").unlink()
    assert others_agree(before, held_by_fsdd(fsdd), "speaker-ann")


def test_caps_keep_what_the_seed_says_of_a_user_and_not_always_the_same():
    counts = {"ann": 9, "bob": 9}
    drawn = set()
    for seed in range(30):
        config = SpokenOptions(name="tales", partition=NATURAL, examples_per_user=4)
        corpus = Corpus("tales", recordings(counts), recordings({"zed": 1}), {})
        ann, bob = federate_speakers(corpus, config, seed).users
        drawn |= {recording.path for recording in ann}
    assert len(drawn) == 9
    assert {one.path[3:] for one in ann} != {one.path[3:] for one in bob}
