"""Algorithms of all kinds: our own by name, and one of somebody's own with a second payload."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from in_process import small_config, train_small

from fedpriv import experiment
from fedpriv.algorithms.base import Trained
from fedpriv.algorithms.fedavg import FedAvg
from fedpriv.config_files import load_config
from fedpriv.errors import InputError
from fedpriv.federation.builders import build_algorithm
from fedpriv.privacy import Ledger
from fedpriv.reporting.report import render
from fedpriv.training.cohort import train_cohort

OUTSIDE = str(Path(__file__).parent.parent / "outside")
PLAIN = {"rounds": 2, "privacy": None, "server": {"optimizer": "sgd", "lr": 1.0}}
SQUARES = {
    "code": OUTSIDE,
    "algorithm": {"name": "second_payload:WithSquares", "bounds": {"squares": 0.01}, "decay": 0.25},
    "rounds": 2,
}


def parameters(prepared):
    return prepared.server.parameters()


def test_fedprox_is_the_recipe_with_its_proximal_term(tmp_path):
    named = {**PLAIN, "algorithm": {"name": "fedprox", "mu": 0.5}}
    _, one = train_small(tmp_path / "named", **named)
    _, other = train_small(tmp_path / "recipe", **PLAIN, local__proximal_mu=0.5)
    _, without = train_small(tmp_path / "without", **PLAIN)
    assert parameters(one).equal(parameters(other))
    assert not parameters(one).equal(parameters(without))


def test_an_algorithm_of_ones_own_sends_a_second_payload_that_is_charged_and_told(tmp_path):
    directory, prepared = train_small(tmp_path / "run", **SQUARES)
    moments, sizes = prepared.server.shared[0], prepared.plan.layout.total
    assert moments.shape == (sizes,)
    # What noise there is: σ_p/cohort, of the second round and a quarter of that of the first.
    expected = 2**0.5 * 0.01 / 8 * 0.75 * (1 + 0.25**2) ** 0.5 * sizes**0.5
    assert float(moments.norm()) == pytest.approx(expected, rel=0.2)
    for release in Ledger.open(directory.ledger):
        assert [name for name, _, _ in release.payloads] == ["model", "squares"]
        assert release.event().event.noise_multiplier == pytest.approx(1.0, rel=1e-10)
    text = render([directory.path], "md")
    assert "second_payload:WithSquares: each user sends more than an update (squares)" in text
    assert "whether its users keep something between rounds" in text


def test_without_privacy_the_second_payload_is_the_mean_of_squares(tmp_path):
    changes = {**SQUARES, **PLAIN, "rounds": 1}
    changes["algorithm"] = {"name": "second_payload:WithSquares", "decay": 0.0}
    _, prepared = train_small(tmp_path / "run", **changes)
    moved = parameters(experiment.prepare(small_config(**PLAIN))) - parameters(prepared)
    assert torch.all(prepared.server.shared[0] >= moved.square() - 1e-6)
    assert prepared.server.shared.norm() > 0


def test_an_algorithm_of_ones_own_is_refused_what_has_no_proof():
    with pytest.raises(InputError, match=r"no proof with privacy\.noise_by: users"):
        small_config(**SQUARES, privacy__noise_by="users")
    small_config(**SQUARES, privacy__sampling={"kind": "fixed_size", "expected_cohort": 8})


@pytest.mark.parametrize("bounds", [{}, {"squares": 1.0, "others": 1.0}, {"others": 1.0}], ids=str)
def test_every_payload_needs_a_bound(bounds):
    algorithm = {"name": "second_payload:WithSquares", "bounds": bounds}
    with pytest.raises(InputError, match=r"write a bound for each payload .*\(squares\)"):
        small_config(**{**SQUARES, "algorithm": algorithm})


def test_a_name_that_is_none_is_told(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("name: x\nrounds: 1\nprivacy: null\nalgorithm: scafold\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"did you mean scaffold\?"):
        load_config(path)


def test_users_of_a_stack_stay_apart_whatever_it_computes():
    named = {"name": "second_payload:OverAll", "bounds": {"direction": 1.0, "drift": 1.0}}
    algorithm = build_algorithm(small_config(code=OUTSIDE, algorithm=named))
    generator = torch.Generator().manual_seed(1)
    updates, kept = torch.randn(2, 4, 7, generator=generator)
    shared = torch.randn(1, 7, generator=generator)
    steps = torch.arange(1, 5)
    whole = Trained(updates, steps, shared, kept, lr=0.1)

    def alone(user):
        own = slice(user, user + 1)
        return Trained(updates[own], steps[own], shared, kept[own], lr=0.1)

    sent = algorithm.sent(whole)
    pull, after = algorithm.pull(shared, kept), algorithm.kept(whole, sent)
    for user in range(4):
        own = algorithm.sent(alone(user))
        assert [each[user].tolist() for each in sent] == [each[0].tolist() for each in own]
        assert pull[user].equal(algorithm.pull(shared, kept[user : user + 1])[0])
        assert after[user].equal(algorithm.kept(alone(user), own)[0])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Unsent", "sends 0 payloads beside the update, and says that it sends more"),
        ("Short", r"makes \[1\] of one user's vector; it must have .* one a parameter"),
        ("no_algorithm", "makes a int, and must make an Algorithm"),
    ],
)
def test_one_that_does_not_send_what_it_says_is_told(tmp_path, name, reason):
    algorithm = {"name": f"second_payload:{name}", "bounds": {"more": 1.0}}
    with pytest.raises(InputError, match=reason):
        train_small(tmp_path / "run", **{**SQUARES, "algorithm": algorithm})


class Steered(FedAvg):
    """One from outside: users start at half the model, and the server keeps the round and rate."""

    shared = ("round", "rate")
    now = (0, 0.0)

    def of_round(self, round_, lr):
        made = Steered()
        object.__setattr__(made, "now", (round_, lr))
        return made

    def start(self, model, shared, slot):
        return model / 2

    def server(self, averages, shared, fraction):
        return torch.tensor(self.now)[:, None].expand_as(shared).clone()


def test_what_an_algorithm_from_outside_says_of_start_and_round_is_done(tmp_path):
    changes = {**PLAIN, "algorithm": {"name": Steered}}
    changes["server"] = {**PLAIN["server"], "schedule": {"kind": "exponential", "factor": 0.5}}
    _, prepared = train_small(tmp_path / "run", **changes)
    assert prepared.server.shared[:, 0].tolist() == [2, 0.5]
    trainer, model = prepared.trainer, parameters(prepared)
    halved = train_cohort(trainer, torch.cat([model, 0 * model, 0 * model]), range(4), 1)
    plain = train_cohort(replace(trainer, algorithm=FedAvg()), model / 2, range(4), 1)
    assert halved.total.equal(plain.total)
