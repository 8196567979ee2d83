import json
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent

from fedpriv.errors import InputError
from fedpriv.privacy import (
    Adjacency,
    CentralMechanism,
    FixedSizeSampling,
    FullParticipation,
    GaussianMechanism,
    GlobalClipping,
    Header,
    Ledger,
    PoissonSampling,
    RdpAccountant,
    Release,
    Unclipped,
)

HEADER = Header("abc", 1000, 1e-5, "add_or_remove_one")


def release(round_: int, noise: float = 1.0, cohort: float = 50.0) -> Release:
    sampling = PoissonSampling(1000, cohort)
    return Release.of(
        round_,
        0,
        CentralMechanism(sampling, GaussianMechanism(noise, GlobalClipping(0.5))),
        "d" * 64,
    )


def filled(path: Path, rounds: int = 5) -> Ledger:
    ledger = Ledger.create(path, HEADER)
    for round_ in range(1, rounds + 1):
        ledger.append(release(round_))
    return ledger


def test_events_are_rebuilt_from_the_file_alone(tmp_path):
    filled(tmp_path / "ledger.jsonl", 5).append(release(6, noise=2.0, cohort=20.0))
    from_file, direct = (RdpAccountant(PoissonSampling(1000, 50.0).adjacency) for _ in range(2))
    Ledger.open(tmp_path / "ledger.jsonl").compose_into(from_file)
    direct.compose(release(1).event(), 5)
    direct.compose(release(6, 2.0, 20.0).event())
    assert from_file.epsilon(1e-5) == pytest.approx(direct.epsilon(1e-5), rel=1e-12)


def test_a_release_records_sensitivity_and_noise():
    fixed = Release.of(
        1,
        0,
        CentralMechanism(FixedSizeSampling(100, 10), GaussianMechanism(1.5, GlobalClipping(0.2))),
        "",
    )
    assert (fixed.sensitivity, fixed.stddev) == (pytest.approx(0.4), pytest.approx(0.3))
    unbounded = Release.of(
        1, 0, CentralMechanism(PoissonSampling(9, 3.0), GaussianMechanism(0.0, Unclipped())), ""
    )
    assert unbounded.bound is None
    assert unbounded.sensitivity is None


def test_append_returns_only_after_fsync(tmp_path, monkeypatch):
    synced = []
    ledger = filled(tmp_path / "ledger.jsonl", 1)

    def fsync(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr("fedpriv.privacy.ledger.os.fsync", fsync)
    ledger.append(release(2))
    assert synced == [(tmp_path / "ledger.jsonl").stat().st_size]


@pytest.mark.parametrize("seed", range(100))
def test_every_random_edit_is_found(tmp_path, seed):
    path = tmp_path / "ledger.jsonl"
    filled(path)
    before = path.read_bytes()
    path.write_bytes(edited(before, random.Random(seed)))
    with pytest.raises(InputError, match=r"line \d|not a fedpriv ledger|another version"):
        Ledger.open(path)


def edited(data: bytes, rng: random.Random) -> bytes:
    """A byte changed, a number changed with care, a line dropped, doubled or exchanged."""
    lines = data.splitlines(keepends=True)
    kind = rng.choice(["byte", "field", "drop", "double", "swap"])
    where = rng.randrange(len(lines) - 1)
    if kind == "byte":
        line = bytearray(lines[where])
        column = rng.randrange(len(line) - 1)
        line[column] ^= 1 << rng.randrange(7)
        lines[where] = bytes(line)
        if b"\n" in lines[where][:-1] or lines[where] in data.splitlines(keepends=True):
            return edited(data, rng)
    elif kind == "field":
        body = json.loads(lines[where + 1])
        key = rng.choice(["noise_multiplier", "bound", "population", "round", "expected_cohort"])
        body[key] = body[key] * 2
        lines[where + 1] = (json.dumps(body) + "\n").encode()
    elif kind == "drop":
        del lines[where]
    elif kind == "double":
        lines.insert(where, lines[where])
    else:
        lines[where], lines[where + 1] = lines[where + 1], lines[where]
    return b"".join(lines)


def test_a_torn_last_line_was_never_charged_and_is_dropped(tmp_path):
    path = tmp_path / "ledger.jsonl"
    filled(path, 3)
    whole = path.read_bytes()
    for cut in range(1, len(whole.splitlines(keepends=True)[-1])):
        path.write_bytes(whole[:-cut])
        ledger = Ledger.open(path)
        assert len(ledger) == 2
    ledger.append(release(3))
    assert len(Ledger.open(path)) == 3


def test_the_ledger_of_another_config_is_refused(tmp_path):
    filled(tmp_path / "ledger.jsonl")
    other = Header("xyz", 1000, 1e-5, "add_or_remove_one")
    with pytest.raises(InputError, match="another configuration"):
        Ledger.open(tmp_path / "ledger.jsonl", other)
    assert len(Ledger.open(tmp_path / "ledger.jsonl", HEADER)) == 5


def test_an_existing_ledger_is_never_overwritten(tmp_path):
    filled(tmp_path / "ledger.jsonl")
    before = (tmp_path / "ledger.jsonl").read_bytes()
    with pytest.raises(InputError, match="exists"):
        Ledger.create(tmp_path / "ledger.jsonl", HEADER)
    assert (tmp_path / "ledger.jsonl").read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"{}\n", b"hello\n", b'{"kind": "header"}\n', b"\xff\n"])
def test_other_files_are_not_ledgers(tmp_path, content):
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match="ledger"):
        Ledger.open(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("multiplier", [1.0000000000065, 2.928751436529421, 0.1, 1e-6, 123456.789])
def test_a_rebuilt_multiplier_is_never_above_the_recorded_one(multiplier):
    event = release(1, noise=multiplier).event()
    rebuilt = event.event.noise_multiplier
    assert rebuilt <= multiplier
    assert rebuilt == pytest.approx(multiplier, rel=1e-10)


@pytest.mark.parametrize("claimed", [1.0000001, 1.4, 10.0])
def test_a_record_cannot_claim_more_noise_than_it_shows(claimed):
    """σ/C is what protects; z beside it may be a mistake or a lie."""
    honest = release(1)
    event = replace(honest, noise_multiplier=claimed).event()
    assert event.event.noise_multiplier == pytest.approx(1.0, rel=1e-10)
    assert event.event.noise_multiplier <= 1.0
    larger = replace(honest, bound=2 * honest.bound).event()  # as much noise on twice as much
    assert larger.event.noise_multiplier == pytest.approx(0.5, rel=1e-10)


@pytest.mark.parametrize("adjacency", list(Adjacency))
def test_a_record_is_analysed_under_its_own_adjacency(adjacency):
    sampling = FullParticipation(1000, adjacency)
    recorded = Release.of(
        1, 0, CentralMechanism(sampling, GaussianMechanism(1.0, GlobalClipping(0.5))), ""
    )
    twice = 2 if adjacency is Adjacency.REPLACE_ONE else 1
    assert recorded.sensitivity == pytest.approx(0.5 * twice)
    assert recorded.event() == GaussianDpEvent(pytest.approx(1.0 / twice, rel=1e-10))


def test_a_round_that_was_charged_twice_costs_twice_also_when_it_is_read_again(tmp_path):
    ledger = filled(tmp_path / "ledger.jsonl", 2)
    ledger.append(replace(release(2), attempt=1))
    assert [charge.attempt for charge in ledger.charges(2)] == [0, 1]
    read = Ledger.open(tmp_path / "ledger.jsonl")
    assert read.charges(2) == ledger.charges(2)
    found, expected = (RdpAccountant(Adjacency.ADD_OR_REMOVE_ONE) for _ in range(2))
    read.compose_into(found)
    expected.compose(PoissonSampledDpEvent(0.05, GaussianDpEvent(1.0)), 3)
    assert found.epsilon(1e-5) == pytest.approx(expected.epsilon(1e-5), rel=1e-9)
