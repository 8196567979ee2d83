"""Two runs on different data share neither noise nor cohorts, and no ledger takes in both."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from deployed import deployed_config
from in_process import small_config, train_small
from schema import data_options
from tiny_speech import tiny_speech
from writers import by_writers, images_of, write_writers

from fedpriv import experiment
from fedpriv.data import build_dataset
from fedpriv.data.content import Content, Files
from fedpriv.data.federated import LabelledImages, PartitionedImages, PixelScale
from fedpriv.errors import InputError
from fedpriv.privacy import Header, Ledger, Purpose, read_ledger
from fedpriv.privacy.composition import Account, merge
from fedpriv.reporting.run_directory import RunDirectory

COUNTS = {100 + number: 5 for number in range(12)}


def plan_on(folder):
    return experiment.prepare(small_config(**by_writers(folder))).plan


def test_runs_on_different_data_share_neither_noise_nor_cohorts(tmp_path):
    before = plan_on(write_writers(tmp_path / "data", COUNTS))
    other = (int(images_of(105, 5)[1][0]) + 1) % 10
    write_writers(tmp_path / "data", COUNTS, labels={105: other})  # one label of one person
    after = plan_on(tmp_path / "data")
    assert before.config == after.config
    assert before.fingerprint != after.fingerprint
    for purpose in (Purpose.NOISE, Purpose.SAMPLING):
        drawn = [p.randomness.numpy(purpose, 1, 0).standard_normal(2000) for p in (before, after)]
        assert abs(float(np.corrcoef(drawn)[0, 1])) < 0.1


def test_a_copy_of_the_data_elsewhere_is_the_same_data(tmp_path):
    here = plan_on(write_writers(tmp_path / "data", COUNTS))
    shutil.copytree(tmp_path / "data", tmp_path / "elsewhere")
    assert plan_on(tmp_path / "elsewhere").fingerprint == here.fingerprint


def images(**changes):
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(0, 256, (6, 1, 4, 4), generator=generator).to(torch.uint8)
    fields = {
        "pool": LabelledImages(drawn, torch.arange(6) % 3),
        "parts": [torch.tensor([0, 1, 2]).numpy(), torch.tensor([3, 4, 5]).numpy()],
        "user_ids": ["ann", "bob"],
        "held_out": LabelledImages(drawn[:2], torch.arange(2)),
        "scale": PixelScale(255, 0, 1),
        "classes": 3,
        "description": "",
    }
    return PartitionedImages(**{**fields, **changes})


def test_the_digest_sees_ids_sizes_owners_pixels_and_labels_of_users_alone():
    whole = images()
    pixels, labels = whole.pool.images.clone(), whole.pool.labels.clone()
    pixels[4, 0, 1, 1] += 1
    labels[4] = 0
    swapped = [torch.tensor([0, 1, 3]).numpy(), torch.tensor([2, 4, 5]).numpy()]
    fewer = [whole.parts[0], whole.parts[1][:2]]
    digests = [
        whole.digest(),
        images(pool=LabelledImages(pixels, whole.pool.labels)).digest(),
        images(pool=LabelledImages(whole.pool.images, labels)).digest(),
        images(user_ids=["ann", "cyd"]).digest(),
        images(parts=whole.parts[::-1]).digest(),
        images(parts=swapped).digest(),
        images(parts=fewer).digest(),
    ]
    assert len(set(digests)) == len(digests)
    assert images(held_out=whole.pool, description="other").digest() == whole.digest()


def test_the_digest_of_speech_sees_transcripts_and_sound():
    whole = tiny_speech()
    louder = [list(user) for user in whole.users]
    louder[3][0] = replace(louder[3][0], voice=2.0)
    other = [list(user) for user in whole.users]
    other[3][0] = replace(other[3][0], text="ab")
    digests = {replace(whole, users=users).digest() for users in (whole.users, louder, other)}
    assert len(digests) == 3
    assert tiny_speech().digest() == whole.digest()


@pytest.mark.parametrize("number", [3, 10**6], ids=["few files", "many files"])
def test_files_are_told_apart_by_name_size_and_content(tmp_path, number):
    def told(name, content):
        (tmp_path / name).write_bytes(content)
        with Files(number) as files:
            (digest,) = files.digests([tmp_path / name])
        return digest

    sound = bytes(range(256)) * 400  # 100 KiB
    first, middle, last = (bytearray(sound) for _ in range(3))
    first[5] ^= 1
    middle[len(sound) // 2] ^= 1
    last[-1] ^= 1
    contents = [sound, bytes(first), bytes(middle), bytes(last), sound + b"a", b""]
    digests = [told("a.wav", content) for content in contents]
    assert len(set(digests)) == len(digests)
    assert told("a.wav", sound) == digests[0]
    assert told("b.wav", sound) != digests[0]
    missing = tmp_path / "missing.wav"
    with Files(number) as files:
        assert len(next(iter(files.digests([missing])))) == 32


@pytest.mark.parametrize(("number", "size"), [(1, 3 * 2**20), (1_000, 3 * 2**20), (50_000, 10**5)])
def test_a_file_that_differs_anywhere_is_another_unless_there_are_too_many(tmp_path, number, size):
    path, digests = tmp_path / "a.wav", set()
    for place in range(0, size, size // 7):
        content = bytearray(size)
        content[place] = 1
        path.write_bytes(content)
        with Files(number) as files:
            digests |= set(files.digests([path]))
    assert len(digests) == len(range(0, size, size // 7))


def test_parts_of_a_digest_cannot_run_into_one_another():
    one, other = Content("x"), Content("x")
    one.add(b"ab")
    one.add(b"c")
    other.add(b"a")
    other.add(b"bc")
    assert one.hexdigest() != other.hexdigest()


def test_populations_of_any_size_have_a_digest_at_once():
    config = {"name": "synthetic_images", "users": 10**9}
    digest = build_dataset(data_options(**config), seed=1).digest()
    assert build_dataset(data_options(**config), seed=2).digest() == digest
    assert build_dataset(data_options(**{**config, "users": 10}), seed=1).digest() != digest


def test_a_run_goes_on_with_its_own_data_alone(tmp_path):
    folder = write_writers(tmp_path / "data", COUNTS)
    directory, _ = train_small(tmp_path / "run", **by_writers(folder))
    (directory.checkpoints / "round-000004.safetensors").unlink()
    write_writers(folder, {**COUNTS, 105: 6})
    ledger = directory.ledger.read_bytes()
    with pytest.raises(InputError, match=r"other data than there are now") as refused:
        experiment.reopen(directory.path)
    assert "\n" not in str(refused.value)
    assert directory.ledger.read_bytes() == ledger
    write_writers(folder, COUNTS)
    _, prepared = experiment.reopen(directory.path)
    assert prepared.finished_rounds == 3


def test_a_run_that_is_continued_elsewhere_reads_the_same_files(tmp_path, monkeypatch):
    for place, first in (("one", 100), ("two", 300)):
        write_writers(tmp_path / place / "data", {first + number: 5 for number in range(12)})
    monkeypatch.chdir(tmp_path / "one")
    speech = {"alphabet": "letters", "cache": "cache"}
    config = small_config(**by_writers("data"), seed_model={"path": "seed"})
    spoken = small_config(data={"name": "synthetic_speech", "users": 60, "speech": speech})
    assert config.data.path == tmp_path / "one" / "data"
    assert spoken.data.speech.alphabet == tmp_path / "one" / "letters"
    assert spoken.data.speech.cache == tmp_path / "one" / "cache"
    assert config.seed_model.path == tmp_path / "one" / "seed"
    directory, _ = train_small(tmp_path / "run", **by_writers("data"))
    (directory.checkpoints / "round-000004.safetensors").unlink()
    monkeypatch.chdir(tmp_path / "two")
    _, prepared = experiment.reopen(directory.path)
    assert prepared.trainer.dataset.user_ids[0] == "writer-100"


def test_the_ledger_says_what_it_is_and_marks_what_is_private(tmp_path):
    directory, prepared = train_small(tmp_path / "run", rounds=1)
    first = json.loads(directory.ledger.read_text().splitlines()[0])
    assert first["mode"] == "simulation"
    assert first["simulation_only"] == {
        "fingerprint": prepared.plan.fingerprint,
        "data": prepared.trainer.dataset.digest(),
    }
    assert not {"fingerprint", "data"} & first.keys()
    assert Ledger.open(directory.ledger).header == prepared.header()


def test_a_deployment_takes_no_digest_of_data(tmp_path, monkeypatch):
    folder = write_writers(tmp_path / "data", COUNTS)
    monkeypatch.setattr(PartitionedImages, "digest", lambda self: pytest.fail("taken"))
    header = experiment.prepare(deployed_config(folder)).header()
    assert (header.mode, header.data) == ("deployment", "")
    assert "simulation_only" not in header.fields()


HEADER = Header("print", 60, 1e-3, "add_or_remove_one", mode="simulation", data="d")


@pytest.mark.parametrize(
    ("changes", "distinct"),
    [
        ({}, False),
        ({"mode": ""}, False),
        ({"data": "other", "fingerprint": "other"}, True),
        ({"mode": "deployment"}, True),
    ],
    ids=["same seed", "not recorded", "other data", "deployment"],
)
def test_ledgers_merge_unless_their_noise_is_from_one_seed(tmp_path, changes, distinct):
    directory, _ = train_small(tmp_path / "run")
    releases = read_ledger(directory.ledger).releases
    changed = tuple(replace(release, digest="other") for release in releases)
    accounts = [
        Account("one", HEADER, releases),
        Account("two", replace(HEADER, **changes), changed),
    ]
    if distinct:
        assert merge(accounts).total.first.epsilon > 0
    else:
        with pytest.raises(InputError, match="one and two have noise from one seed"):
            merge(accounts)


def test_runs_of_the_first_version_are_read_and_not_continued(tmp_path):
    path = tmp_path / "ledger.jsonl"
    Ledger.create(path, Header("print", 60, 1e-3, "add_or_remove_one", version=1))
    assert read_ledger(path).header.mode == ""
    with pytest.raises(InputError, match=r"another version of fedpriv.*reported on"):
        Ledger.open(path, HEADER)


def test_a_number_of_users_that_is_to_be_hidden_comes_from_the_config(tmp_path):
    folder = write_writers(tmp_path / "data", COUNTS)
    sampling = {"kind": "all"}
    hidden = {"privacy__adjacency": "add_or_remove_one", "privacy__sampling": sampling}
    with pytest.raises(InputError, match=r"add_or_remove_one hides how many .*zero_out") as refused:
        small_config(**by_writers(folder), **hidden)
    assert "\n" not in str(refused.value)
    implied = small_config(**by_writers(folder), privacy__sampling=sampling)
    assert experiment.prepare(implied).plan.adjacency.value == "zero_out"
    places = experiment.prepare(small_config(**by_writers(folder, users=20), **hidden)).plan
    assert (places.sampling.population, places.sampling.expected_cohort) == (20, 20)
    assert places.adjacency.value == "add_or_remove_one"


def test_with_a_public_number_of_users_nothing_public_changes_with_one_less(tmp_path):
    """Ledger, denominator and cohorts: all but the digest, from which a simulation's noise is."""
    settings = {"rounds": 2, "privacy__sampling": {"kind": "poisson", "expected_cohort": 6}}
    headers, releases = [], []
    for name, counts in (("all", COUNTS), ("less", dict(list(COUNTS.items())[1:]))):
        data = by_writers(write_writers(tmp_path / f"{name}-data", counts), users=14)
        directory, _ = train_small(tmp_path / name, **data, **settings)
        found = read_ledger(directory.ledger)
        headers.append(replace(found.header, data="", fingerprint=""))
        releases.append([replace(release, digest="") for release in found.releases])
    assert headers[0] == headers[1]
    assert releases[0] == releases[1]
    assert headers[0].population == 14


def test_empty_places_contribute_nothing(tmp_path):
    folder = write_writers(tmp_path / "data", COUNTS)
    settings = {"rounds": 1, "privacy__sampling": {"kind": "all"}}
    directory, _ = train_small(tmp_path / "run", **by_writers(folder, users=30), **settings)
    (row,) = directory.read_metrics()
    assert row["simulation_only"]["cohort"] == 12
    assert next(iter(Ledger.open(directory.ledger))).expected_cohort == 30


@pytest.mark.parametrize(
    "data",
    [
        {"name": "digits", "examples_per_user": 6},
        {"name": "fsdd", "speech": {"max_seconds_per_user": 4.5}},
    ],
    ids=str,
)
def test_caps_that_one_example_could_move_are_refused_where_examples_are_protected(data):
    silos = {
        "privacy__unit": "example",
        "privacy__example": {"sampling_rate": 0.5, "silo_size": 6},
        "local": {"steps": 2},
        "data": {"users": 6, **data},
    }
    with pytest.raises(InputError, match=r"does not go with privacy\.unit: example") as refused:
        small_config(**silos)
    assert "\n" not in str(refused.value)


def test_a_config_of_an_earlier_version_is_read_and_not_continued(tmp_path):
    """Its sections had the keys of all models, data sets and clipping rules."""
    folder = tmp_path / "run"
    folder.mkdir()
    document = json.loads(small_config().model_dump_json())
    document["model"] |= {"mels": 80, "positions": "sinusoidal"}
    document["data"] |= {"path": None, "speech": {"sample_rate": 16000}, "synthetic": {"side": 28}}
    document["privacy"]["clipping"] |= {"adapts": "global", "quantile": 0.5, "count_noise": None}
    (folder / "config.yaml").write_text(yaml.safe_dump(document))
    directory = RunDirectory.open(folder)
    assert directory.config() == small_config()
    Ledger.create(directory.ledger, Header("print", 60, 1e-3, "add_or_remove_one", version=2))
    with pytest.raises(InputError, match=r"another version of fedpriv.*reported on") as refused:
        experiment.reopen(folder)
    assert "\n" not in str(refused.value)
