"""Whole runs whose noise is added by nodes or by users, in this process."""

import dataclasses
import hashlib
import json
import math

import dp_accounting
import numpy as np
import pytest
import torch
from dp_accounting.rdp import RdpAccountant
from in_process import (
    SILOS,
    InProcessGrid,
    Silent,
    drive_on,
    resume_small,
    small_config,
    train_small,
)
from rich.console import Console
from scipy import stats

from fedpriv import audit, experiment
from fedpriv.errors import BudgetError, InputError, WorkerLost
from fedpriv.federation import client_app
from fedpriv.federation.builders import build_trainer
from fedpriv.federation.hosting import Hosting, NodeUsers
from fedpriv.federation.messages import flat_record, flat_tensor
from fedpriv.federation.strategy import PrivateFedAvg
from fedpriv.privacy import (
    MECHANISMS,
    Adjacency,
    GaussianMechanism,
    GlobalClipping,
    Ledger,
    UsersNoise,
)
from fedpriv.privacy.mechanisms import gaussian
from fedpriv.privacy.randomness import Purpose, Randomness, id_words, standard_normal
from fedpriv.reporting.ledgers import verify
from fedpriv.reporting.progress import ProgressLines
from fedpriv.reporting.reader import read_run
from fedpriv.reporting.report import render
from fedpriv.reporting.spent import spent
from fedpriv.training.cohort import train_cohort
from fedpriv.training.own_noise import with_noise as with_draws

NODES = {"privacy__noise_by": "nodes", "rounds": 1}
THREE = {**NODES, "runtime__workers": 3, "privacy__lost_nodes": 1}
USERS = {"privacy__noise_by": "users", "rounds": 3}
SIGMA = 1.0 * 0.1


def parameters(prepared):
    return prepared.server.parameters().double()


def digest(released):
    """That of releases of one piece: all models here are small."""
    return hashlib.sha256(hashlib.sha256(released.numpy().tobytes()).digest()).hexdigest()


def trained_messages(grid):
    return [m for m in grid.sent if m.metadata.message_type == "train"]


@pytest.fixture
def sums(monkeypatch):
    """What nodes' sums were before noise, by (partition, round, attempt)."""
    seen, noisy = {}, client_app._noisy

    def watched(config, work, summed, layout, partition):
        seen[partition, work.round, work.own_noise.attempt] = summed.total.clone()
        return noisy(config, work, summed, layout, partition)

    monkeypatch.setattr(client_app, "_noisy", watched)
    return seen


def share(prepared, partition, needed, attempt=0):
    """A node's share, by the formula alone."""
    generator = prepared.plan.randomness.numpy(Purpose.NOISE_SHARE, 1, attempt, partition)
    standard = generator.standard_normal(prepared.plan.layout.total)
    return torch.from_numpy(SIGMA * standard) / math.sqrt(needed)


def with_noise(prepared, total, users, attempt=0):
    """A node's sum with the noise of each of `users`, by the formula alone."""
    noisy = total.clone()
    for user in users:
        path = (1, attempt, *id_words(f"user-{user}"))
        generator = prepared.plan.randomness.numpy(Purpose.USER_NOISE, *path)
        noisy += torch.from_numpy(SIGMA * generator.standard_normal(len(total)))
    return noisy


def homes_of(users, nodes):
    """Which of `users` each simulated node trains."""
    hosting = Hosting.of([NodeUsers(1000 + p, p, nodes, None) for p in range(nodes)])
    return [own.tolist() for _, own in hosting.split(np.array(users))]


# ---------------------------------------------------------------- nodes


@pytest.mark.parametrize("dead", [[], [1]], ids=["all nodes", "one dead"])
def test_what_is_released_is_the_sum_of_the_nodes_sums_and_shares(tmp_path, sums, dead):
    grid = InProcessGrid(3, dead)
    directory, prepared = train_small(tmp_path / "run", grid, **THREE)
    answered = [partition for partition in range(3) if partition not in dead]
    released = torch.zeros(prepared.plan.layout.total, dtype=torch.float64)
    for partition in answered:
        released += sums[partition, 1, 0] + share(prepared, partition, needed=2)
    (charged,) = Ledger.open(directory.ledger)
    assert charged.digest == digest(released)
    assert (charged.shares, charged.stddev, charged.noise_multiplier) == (2, SIGMA, 1.0)
    row = directory.read_metrics()[0]
    assert (row["nodes_lost"], "noise_only" in row) == (len(dead), False)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        NODES,
        {**THREE, "dead": [0, 1]},
        USERS,
        SILOS,
        {"privacy__clipping__kind": "adaptive"},
        {"privacy__mechanism": {"kind": "correlated", "bands": 2}},
    ],
    ids=["server", "nodes", "noise alone", "users", "silos", "counts", "correlated"],
)
def test_all_noise_passes_one_place(tmp_path, monkeypatch, changes):
    """Where that place adds nothing, it does not matter how much noise is drawn."""
    changes = {**changes, "rounds": 1}
    dead, added, models = changes.pop("dead", []), [], []

    def skipped(total, noise):
        added.append(float(noise.norm()))
        return total.double()

    monkeypatch.setattr(GaussianMechanism, "add", staticmethod(skipped))
    for factor in (1, 1000):
        monkeypatch.setattr(
            gaussian,
            "standard_normal",
            lambda size, generator, factor=factor: factor * standard_normal(size, generator),
        )
        grid = InProcessGrid(changes.get("runtime__workers", 2), dead)
        _, prepared = train_small(tmp_path / str(factor), grid, **changes)
        models.append(parameters(prepared))
    assert torch.equal(*models)
    once = len(added) // 2
    assert added[once:] == pytest.approx([1000 * norm for norm in added[:once]])


class Unsound(InProcessGrid):
    """Node 1 answers with a sum that cannot be one."""

    def answer(self, message):
        reply = super().answer(message)
        if message.metadata.dst_node_id == 1001 and "sum" in reply.content:
            total = flat_tensor(reply.content["sum"])
            reply.content["sum"] = flat_record(total * math.nan)
        return reply


def test_too_few_answers_are_dropped_and_noise_alone_is_released(tmp_path):
    grid = InProcessGrid(dead=[1])
    prepared = experiment.prepare(small_config(run_dir=str(tmp_path / "run"), **NODES))
    directory, observer = experiment.create(prepared), Silent()
    experiment.train(prepared, directory, observer, drive_on(grid))
    generator = prepared.plan.randomness.numpy(Purpose.NOISE, 1, 0)
    noise = torch.from_numpy(SIGMA * generator.standard_normal(prepared.plan.layout.total))
    (charged,) = Ledger.open(directory.ledger)
    assert charged.digest == digest(noise)
    row = directory.read_metrics()[0]
    assert (row["noise_only"], row["nodes_lost"], row["simulation_only"]["cohort"]) == (True, 1, 0)
    assert "noise alone was released" in observer.sentences[-1]


def test_a_sum_of_a_deployment_that_does_not_count_leaves_too_few(tmp_path):
    runtime = {"workers": 2, "deployment": True, "device": "cpu"}
    directory, _ = train_small(tmp_path / "run", Unsound(), **{**NODES, "runtime": runtime})
    row = directory.read_metrics()[0]
    assert (row["noise_only"], row["nodes_lost"]) == (True, 1)


def test_nodes_without_users_are_asked_for_their_share(tmp_path):
    grid = InProcessGrid(2)
    sampling = {"kind": "poisson", "expected_cohort": 1e-6}
    directory, prepared = train_small(tmp_path / "run", grid, privacy__sampling=sampling, **NODES)
    asked = trained_messages(grid)
    assert [message.content["config"]["users"] for message in asked] == [[], []]
    released = sum(share(prepared, partition, needed=2) for partition in (0, 1))
    assert Ledger.open(directory.ledger).charges(1)[0].digest == digest(released)


def crash_in_round(patched, round_):
    """Raise when `round_` is paid for and not yet finished."""
    paid = PrivateFedAvg._paid_release

    def wrapped(self, *args):
        released = paid(self, *args)
        if self.next_round == round_:
            raise RuntimeError("crash")
        return released

    patched.setattr(PrivateFedAvg, "_paid_release", wrapped)


@pytest.mark.parametrize("changes", [THREE, USERS], ids=["nodes", "users"])
def test_a_repeated_round_draws_the_same_noise_and_is_paid_once(tmp_path, monkeypatch, changes):
    changes = {**changes, "rounds": 3, "runtime__workers": 3}
    directory, whole = train_small(tmp_path / "whole", InProcessGrid(3), **changes)
    with monkeypatch.context() as patched:
        crash_in_round(patched, 2)
        with pytest.raises(RuntimeError, match="crash"):
            train_small(tmp_path / "run", InProcessGrid(3), **changes)
    again, resumed = resume_small(tmp_path / "run", InProcessGrid(3))
    assert parameters(resumed).equal(parameters(whole))
    assert list(Ledger.open(again.ledger)) == list(Ledger.open(directory.ledger))


@pytest.mark.parametrize("changes", [THREE, USERS], ids=["nodes", "users"])
def test_a_repeated_round_with_another_sum_draws_everything_afresh(
    tmp_path, monkeypatch, sums, changes
):
    changes = {**changes, "rounds": 1, "runtime__workers": 3}
    with monkeypatch.context() as patched:
        crash_in_round(patched, 1)
        with pytest.raises(RuntimeError, match="crash"):
            train_small(tmp_path / "run", InProcessGrid(3), **changes)
    grid = InProcessGrid(3, dead=[1])
    directory, prepared = resume_small(tmp_path / "run", grid)
    first, second = Ledger.open(directory.ledger).charges(1)
    assert (first.attempt, second.attempt) == (0, 1)
    assert first.digest != second.digest
    drawn = [
        sorted(u for m in trained_messages(grid)[i : i + 3] for u in m.content["config"]["users"])
        for i in (0, 3)
    ]
    for attempt, cohort in enumerate(drawn):
        generator = prepared.plan.randomness.numpy(Purpose.SAMPLING, 1, attempt)
        assert cohort == prepared.plan.sampling.draw(generator).tolist()
    if changes["privacy__noise_by"] == "nodes":
        parts = [sums[p, 1, 1] + share(prepared, p, 2, attempt=1) for p in (0, 2)]
    else:
        homes = homes_of(drawn[1], 3)
        parts = [with_noise(prepared, sums[p, 1, 1], homes[p], attempt=1) for p in (0, 2)]
    assert second.digest == digest(sum(parts))


def test_runs_with_other_numbers_of_nodes_share_no_noise():
    two, three = (small_config(runtime__workers=n, **NODES) for n in (2, 3))
    assert two.fingerprint("") != three.fingerprint("")
    central = [small_config(runtime__workers=n).fingerprint("") for n in (2, 3)]
    assert central[0] == central[1] == small_config(privacy__noise_by="server").fingerprint("")


def test_metrics_ledger_and_report_of_shares_agree_and_name_the_trust_model(tmp_path):
    directory, prepared = train_small(tmp_path / "run", InProcessGrid(3), **{**THREE, "rounds": 2})
    run = read_run(directory.path)
    account = spent(run)
    assert account.disagreements == ()
    assert account.epsilons["rdp"] == pytest.approx(prepared.plan.planned_cost().epsilon)
    # z·√(1/2) against a node: two shares are surely there.
    left = dp_accounting.GaussianDpEvent(math.sqrt(1 / 2))
    against = RdpAccountant().compose(dp_accounting.PoissonSampledDpEvent(8 / 60, left), 2)
    assert account.adversaries["node"] == pytest.approx(against.get_epsilon(1e-3), rel=1e-6)
    assert (
        json.loads(render([directory.path], "json"))["runs"][0]["adversaries"]
        == account.adversaries
    )
    text = render([directory.path], "md")
    assert "a server that sees single messages is NOT covered" in text
    assert "if nobody saw more than the sum of the nodes' messages" in text
    assert "centrally" not in text
    assert verify(directory.path).compared


def test_where_one_share_may_be_all_the_noise_the_report_prints_no_figure(tmp_path):
    changes = {**NODES, "privacy__lost_nodes": 1}
    directory, _ = train_small(tmp_path / "run", **changes)
    assert "Against a node nothing is promised" in render([directory.path], "md")


# ---------------------------------------------------------------- users


def by_dp_accounting(rounds):
    accountant = RdpAccountant(neighboring_relation=Adjacency.REPLACE_ONE.relation)
    if rounds:
        accountant.compose(dp_accounting.GaussianDpEvent(1.0 / 2), rounds)
    return accountant.get_epsilon(1e-3) if rounds else 0.0


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return train_small(tmp_path_factory.mktemp("local") / "run", **USERS)


def test_metrics_ledger_and_report_say_what_the_worst_and_the_median_user_spent(local):
    directory, _ = local
    rows, releases = directory.read_metrics(), list(Ledger.open(directory.ledger))
    counts = np.zeros(60, dtype=int)
    for row, release in zip(rows, releases, strict=True):
        counts[list(release.users)] += 1
        assert row["epsilon"]["rdp"] == pytest.approx(by_dp_accounting(int(counts.max())))
        epsilons = [by_dp_accounting(int(count)) for count in counts]
        assert row["users"]["median"] == pytest.approx(np.median(epsilons))
    account = spent(read_run(directory.path))
    assert account.disagreements == ()
    assert account.epsilons["rdp"] == pytest.approx(max(epsilons))
    document = json.loads(render([directory.path], "json"))["runs"][0]
    assert (document["users"]["worst"], document["silos"]) == (pytest.approx(max(epsilons)), None)
    text = render([directory.path], "md")
    assert "Nobody is trusted" in text
    assert "private (simulation with a known seed) for that user, whoever received it" in text
    assert "silo" not in text
    assert "in rounds that were finished" in text  # a simulation pays when it has the sums
    assert verify(directory.path).compared


@pytest.mark.parametrize("engine", ["stacked", "sequential"])
def test_each_user_adds_noise_of_full_strength_and_the_server_none(tmp_path, sums, engine):
    changes = {**USERS, "rounds": 1, "runtime__engine": engine}
    directory, prepared = train_small(tmp_path / "run", **changes)
    (charged,) = Ledger.open(directory.ledger)
    homes = homes_of(charged.users, 2)
    assert sum(map(len, homes)) == len(charged.users) > 0
    parts = [with_noise(prepared, sums[p, 1, 0], homes[p]) for p in (0, 1)]
    assert charged.digest == digest(sum(parts))


def test_a_user_whose_update_is_not_finite_sends_noise_like_any_other():
    trainer = build_trainer(small_config(**USERS))
    size = sum(p.numel() for p in trainer.model.parameters())
    planted = torch.zeros(60, size)
    planted[7] = torch.nan
    trainer = dataclasses.replace(trainer, planted=planted)
    noise = UsersNoise(GaussianMechanism(1.0, GlobalClipping(0.1)))
    secret, messages = Randomness.simulation(3, "run"), []
    for user in (7, 8):
        summed = train_cohort(trainer, torch.zeros(size), [user], round_=1)
        draws = noise.draws([size], secret, (1, 0), 0, [f"user-{user}"])
        noisy = with_draws(summed, draws)
        assert noisy.non_finite == (user == 7)
        messages.append(noisy.total)
    low, high = stats.chi2.interval(1 - 1e-6, size)
    for message in messages:
        assert low < float((message / SIGMA).square().sum()) < high
    assert abs(float(torch.corrcoef(torch.stack(messages))[0, 1])) < 5 / math.sqrt(size)


def test_users_of_a_node_that_died_are_charged_all_the_same(tmp_path):
    changes = {**USERS, "rounds": 2}
    with pytest.raises(WorkerLost):
        train_small(tmp_path / "run", InProcessGrid(dead=[1]), **changes)
    (charged,) = Ledger.open(tmp_path / "run" / "ledger.jsonl")
    plan = experiment.prepare(small_config(**changes)).plan
    drawn = plan.sampling.draw(plan.randomness.numpy(Purpose.SAMPLING, 1, 0))
    assert list(charged.users) == drawn.tolist()


def test_the_budget_holds_for_each_user(tmp_path):
    budget = by_dp_accounting(1) * 1.001
    with pytest.raises(BudgetError):
        train_small(tmp_path / "run", **{**USERS, "rounds": 40}, privacy__budget__epsilon=budget)
    releases = list(Ledger.open(tmp_path / "run" / "ledger.jsonl"))
    charged = [user for release in releases for user in release.users]
    assert charged
    assert len(set(charged)) == len(charged)


def test_noise_is_calibrated_for_a_user_that_is_in_every_round():
    changes = {**USERS, "privacy__noise_multiplier": None, "privacy__target_epsilon": 2.0}
    plan = experiment.prepare(small_config(**changes)).plan
    accountant = RdpAccountant(neighboring_relation=Adjacency.REPLACE_ONE.relation)
    accountant.compose(
        dp_accounting.GaussianDpEvent(plan.mechanism.gaussian.noise_multiplier / 2), 3
    )
    assert accountant.get_epsilon(1e-3) == pytest.approx(2.0, abs=1e-4)


def test_any_sampling_will_do_since_nothing_is_claimed_for_it():
    sampling = {"kind": "fixed_size", "expected_cohort": 8}
    changes = {"privacy__sampling": sampling, "privacy__accountants": ["rdp", "pld"]}
    plan = experiment.prepare(small_config(**USERS, **changes)).plan
    assert plan.planned_cost().epsilon_rdp == pytest.approx(by_dp_accounting(3))


# ---------------------------------------------------------------- both


class Watching(InProcessGrid):
    """Notes how many lines the ledger has when nodes are asked to train, and what they answer."""

    def __init__(self, ledger):
        super().__init__(2)
        self.ledger, self.charged, self.seen, self.total = ledger, [], [], 0

    def answer(self, message):
        reply = super().answer(message)
        if message.metadata.message_type == "train":
            self.charged.append(len(Ledger.open(self.ledger)))
            self.seen.append(dict(reply.content["seen"]))
            self.total = self.total + flat_tensor(reply.content["sum"])
        return reply


@pytest.mark.parametrize("by", ["nodes", "users"])
def test_a_deployment_pays_before_it_asks_and_is_sent_nothing_but_noisy_sums(
    tmp_path, monkeypatch, by
):
    """The server has seen the noisy sums whether or not it lives to charge for them."""
    folder = tmp_path / "run"
    grid = Watching(folder / "ledger.jsonl")
    # A node none of whose users is drawn is not asked, and no seed says who is drawn here.
    everybody = {"privacy__sampling": {"kind": "all"}}
    changes = {"privacy__noise_by": by, "runtime__deployment": True, "rounds": 2, **everybody}
    with monkeypatch.context() as patched:
        crash_in_round(patched, 2)
        with pytest.raises(RuntimeError, match="crash"):
            train_small(folder, grid, **changes)
    assert grid.charged == [1, 1, 2, 2]
    for seen in grid.seen:
        assert not any(np.any(value) for key, value in seen.items() if key != "partition")
    directory, _ = resume_small(folder)
    charged = list(Ledger.open(directory.ledger))
    assert [(r.round, r.attempt, r.digest) for r in charged] == [(1, 0, ""), (2, 0, ""), (2, 1, "")]
    text = render([folder], "md")
    assert "before any node was asked" in text
    assert ("every message that a user ever sent" in text) == (by == "users")


@pytest.mark.parametrize("by", ["nodes", "users"])
def test_a_deployment_draws_its_noise_at_the_nodes_from_the_operating_system(tmp_path, sums, by):
    """Everybody takes part, so two runs of one seed differ by nothing but their noise."""
    noises = []
    for folder in ("one", "two"):
        grid = Watching(tmp_path / folder / "ledger.jsonl")
        sampling = {"kind": "all"}
        changes = {"runtime__deployment": True, "rounds": 1, "privacy__sampling": sampling}
        train_small(tmp_path / folder, grid, privacy__noise_by=by, **changes)
        noises.append(grid.total - sums[0, 1, 0] - sums[1, 1, 0])
    users = 60 if by == "users" else 1
    low, high = stats.chi2.interval(1 - 1e-6, len(noises[0]))
    for noise in (*noises, (noises[0] - noises[1]) / math.sqrt(2)):
        assert low < float((noise / SIGMA).square().sum()) / users < high


REFUSED = {
    "lost of none": ({"privacy__lost_nodes": 1}, "lost_nodes goes with noise_by: nodes"),
    "all lost": ({**NODES, "privacy__lost_nodes": 2}, "below runtime.workers"),
    "counts at nodes": (
        {**NODES, "privacy__clipping": {"kind": "adaptive", "bound": 0.1}},
        "noise on these counts is the server's",
    ),
    "counts at users": (
        {**USERS, "privacy__clipping": {"kind": "adaptive", "bound": 0.1}},
        "noise on these counts is the server's",
    ),
    "memory of users": ({**USERS, "privacy__error_feedback": "user"}, "error_feedback"),
    "adjacency of users": ({**USERS, "privacy__adjacency": "zero_out"}, "write replace_one"),
    "silos": (
        {
            **NODES,
            "local__steps": 2,
            "privacy__unit": "example",
            "privacy__example": {"sampling_rate": 0.5, "silo_size": 6},
        },
        "silos add noise of their own",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_proof_or_no_sense_is_refused_with_the_reason(case):
    changes, reason = REFUSED[case]
    with pytest.raises(InputError, match=reason):
        small_config(**changes)


@pytest.mark.parametrize("by", ["nodes", "users"])
def test_what_a_run_prints_at_its_start_names_the_trust_model(by):
    prepared, console = experiment.prepare(small_config(privacy__noise_by=by)), Console(record=True)
    ProgressLines(console).begin(prepared)
    printed = console.export_text()
    assert MECHANISMS[by].trust in printed
    assert ("a user that takes part in each" in printed) == (by == "users")


@pytest.mark.parametrize("by", ["nodes", "users"])
def test_an_audit_of_it_is_refused(by):
    config = small_config(privacy__noise_by=by)
    with pytest.raises(InputError, match="not built"):
        audit.check(config, audit.AuditSettings())


def test_memories_go_with_noise_by_nodes(tmp_path):
    changes = {**NODES, "privacy__error_feedback": "user", "rounds": 2}
    directory, _ = train_small(tmp_path / "run", **changes)
    assert directory.read_metrics()[-1]["simulation_only"]["memory_norm"] > 0
