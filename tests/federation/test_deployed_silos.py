"""Silos of a deployment: each has noise of its own, and its node's ledger pays before it sends."""

import json
from collections import Counter
from pathlib import Path

import dp_accounting
import pytest
import torch
from deployed import asked, context_of, deployed_config, start_of
from dp_accounting.rdp import RdpAccountant
from federation.test_deployed_users import COUNTS, Deployed, three_nodes, trained
from in_process import Silent
from replies import sum_of
from writers import write_writers

from fedpriv.data.federated import Examples
from fedpriv.federation import client_app
from fedpriv.federation.gate import reason_in
from fedpriv.federation.grids.base import identify
from fedpriv.federation.messages import OwnNoise, flat_record, train_message
from fedpriv.federation.policy import NodeTerms
from fedpriv.privacy import Ledger, Randomness
from fedpriv.reporting.reader import read_run
from fedpriv.reporting.spent import spent
from fedpriv.reporting.statement import privacy_statement

POLICY = """
unit: example
noise_by: [silos]
smallest_z: 1.0
largest_bound: 1.0
rounds: 20
"""
SILOS = {
    "local": {"steps": 2, "lr": 0.1, "batch_size": 2},
    "privacy__unit": "example",
    "privacy__example": {"sampling_rate": 0.5, "silo_size": 4},
    "privacy__sampling": {"kind": "poisson", "expected_cohort": 50},
}


def policy_in(folder: Path, more: str = "") -> Path:
    file = folder / "policy.yaml"
    file.write_text(POLICY + more)
    return file


@pytest.fixture
def folder(tmp_path):
    return write_writers(tmp_path / "silos", COUNTS)


def answer(config, context, silos=range(12), multiplier=1.0):
    identify()
    asks = train_message(
        1000,
        config,
        flat_record(start_of(config)),
        1,
        torch.tensor(list(silos)).numpy(),
        (),
        own_noise=OwnNoise(0, multiplier),
    )
    return asked(asks, context)


def node(folder, policy=None):
    context = context_of(folder)
    if policy is not None:
        context.node_config["policy"] = str(policy)
    return context


def charges(policy: Path):
    lines = map(json.loads, policy.with_name(policy.name + ".ledger").open())
    return [line for line in lines if line["kind"] == "charge"]


def test_a_node_without_a_ledger_trains_no_silo(folder):
    reply = answer(deployed_config(folder, **SILOS), node(folder))
    assert "privacy.unit: example needs a node with a policy" in reason_in(reply)


def test_what_leaves_has_noise_and_nothing_that_was_seen(folder, tmp_path):
    policy, config = policy_in(tmp_path), deployed_config(folder, **SILOS)
    sums = [sum_of(answer(config, node(folder, policy)))[1] for _ in range(2)]
    assert not sums[0].total.equal(sums[1].total)
    # Of each silo lr·z·C·√steps/(q·N) = 0.1·√2/2, if its examples move nothing.
    expected = 0.1 * 2**0.5 / 2 * 12**0.5
    difference = (sums[0].total - sums[1].total) / 2**0.5
    assert float(difference.std()) == pytest.approx(expected, rel=0.1)
    assert sums[0].users == 12
    assert (sums[0].loss, sums[0].norm, sums[0].examples, sums[0].skipped) == (0, 0, 0, 0)
    assert not any(sums[0].block_norms)
    assert [(each["sampling_rate"], each["steps"]) for each in charges(policy)] == [(0.5, 2)] * 2


def test_the_ledger_is_charged_before_a_step_and_stops_at_epsilon(folder, tmp_path, monkeypatch):
    def by_dp_accounting(rounds):
        accountant = RdpAccountant()
        step = dp_accounting.PoissonSampledDpEvent(0.5, dp_accounting.GaussianDpEvent(1.0))
        accountant.compose(step, 2 * rounds)
        return accountant.get_epsilon(1e-3)

    between = (by_dp_accounting(2) + by_dp_accounting(3)) / 2
    policy = policy_in(tmp_path, f"epsilon: {between}\ndelta: 1.0e-3\n")
    config = deployed_config(folder, **SILOS)
    charged = []

    def stopped(*args, **kwargs):
        charged.append(len(charges(policy)))
        raise RuntimeError("stopped")

    monkeypatch.setattr("fedpriv.training.example_level.train_silo", stopped)
    for _ in range(2):
        assert "reason is in its own log" in reason_in(answer(config, node(folder, policy)))
    assert "by their rounds or ε" in reason_in(answer(config, node(folder, policy)))
    assert charged == [1, 2]


def test_less_noise_in_a_step_is_refused(folder, tmp_path):
    policy = policy_in(tmp_path)
    config = deployed_config(folder, **{**SILOS, "privacy__noise_multiplier": 2.0})
    reply = answer(config, node(folder, policy), multiplier=1.5)
    assert "less noise than its config says" in reason_in(reply)


@pytest.mark.parametrize("gradients", ["instantiated", "ghost"])
def test_an_example_that_the_model_cannot_take_is_left_out_alone(
    folder, tmp_path, monkeypatch, gradients
):
    monkeypatch.setattr(Randomness, "operating_system", lambda: Randomness(7, reproducible=False))
    example = {**SILOS["privacy__example"], "gradients": gradients}
    config = deployed_config(folder, **{**SILOS, "privacy__example": example})
    context = node(folder, policy_in(tmp_path))
    dataset = type(client_app._trainer(config, context, NodeTerms.of(context), "").dataset)
    built, totals = dataset.user, []

    def wrong(examples):
        examples.targets[1] = 11  # of ten classes
        return examples

    def absent(examples):
        kept = torch.tensor([0, 2, 3])
        return Examples(examples.inputs[kept], examples.targets[kept], examples.skipped)

    for changed in (wrong, absent):

        def user(self, place, changed=changed):
            examples = built(self, place)
            return changed(examples) if self.user_ids[place] == "writer-100" else examples

        monkeypatch.setattr(dataset, "user", user)
        client_app._TRAINERS.__init__()
        totals.append(sum_of(answer(config, context, range(3)))[1].total)
    assert totals[0].equal(totals[1])


ADAPTIVE = {"kind": "adaptive", "bound": 0.5, "adapts": "per_layer", "adapt_lr": 0.1}


@pytest.mark.parametrize("clipping", [{"kind": "global", "bound": 1.0}, ADAPTIVE], ids=str)
def test_what_the_nodes_have_charged_is_what_the_server_has(tmp_path, clipping):
    folders = three_nodes(tmp_path)
    policies = [policy_in(folder) for folder in folders]
    config = deployed_config(
        folders[0],
        **{**SILOS, "privacy__sampling": {"kind": "fixed_size", "expected_cohort": 6}},
        privacy__clipping=clipping,
        data={"users": 12},
        rounds=3,
        runtime={"workers": 3, "deployment": True, "device": "cpu"},
    ).model_copy(update={"run_dir": tmp_path / "run"})

    class WithPolicies(Deployed):
        def context(self, number):
            context = super().context(number)
            context.node_config["policy"] = str(policies[number])
            return context

    observer = Silent()
    directory = trained(config, WithPolicies(folders), observer)
    assert len(observer.rows) == 3
    assert not any("takes no part" in sentence for sentence in observer.sentences)
    ledger = Ledger.open(directory.ledger)
    by_server = Counter(silo for release in ledger for silo in release.silos)
    by_nodes = [
        Counter(user for line in charges(policy) for user in line["users"]) for policy in policies
    ]
    assert sum(by_server.values()) == 18
    for number, counts in enumerate(by_nodes):
        first = ledger.places[number].first
        theirs = [by_server[silo] for silo in range(first, first + 4)]
        assert sorted(counts.values()) == sorted(count for count in theirs if count)
    run = read_run(directory.path)
    sections = {
        each.key: " ".join(each.sentences) for each in privacy_statement(run, spent(run)).sections
    }
    assert "everything that it ever sent" in sections["trust"]
    assert "charges a ledger of its own" in sections["trust"]
    assert "silo's node seeded its noise with 256 bits" in sections["randomness"]
