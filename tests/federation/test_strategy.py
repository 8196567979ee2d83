"""The invariants of a private round, each by a test that fails when it is broken."""

import copy
import hashlib
import json
import math
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, Message
from flwr.app.error import Error
from in_process import (
    InProcessGrid,
    Silent,
    drive_on,
    resume_small,
    small_config,
    train_small,
)

from fedpriv import experiment
from fedpriv.data.federated import PartitionedImages
from fedpriv.data.registry import build_dataset
from fedpriv.errors import BudgetError, ClientFault, InputError, Interrupted, WorkerLost
from fedpriv.federation import client_app
from fedpriv.federation.messages import flat_record, flat_tensor
from fedpriv.federation.payment import digest_of
from fedpriv.federation.strategy import PrivateFedAvg
from fedpriv.models.parameters import Layout, parameters_of
from fedpriv.models.registry import build_model
from fedpriv.privacy import Adjacency, GaussianMechanism, Ledger, Purpose, Randomness, RdpAccountant
from fedpriv.privacy.clipping import bounds_of
from fedpriv.privacy.randomness import id_words
from fedpriv.recorder import Recorder
from fedpriv.reporting.report import write_report
from fedpriv.training.local import batches

#: What a line of the metrics may say without a mechanism of its own: functions of releases, of
#: held-out examples, of the config, and of the clock.
PUBLIC = {
    "by_class",
    "round",
    "epsilon",
    "delta",
    "lr",
    "aggregate_norm",
    "released_block_norms",
    "noise_block_norms",
    "clip_bound",
    "seconds",
    "nodes_lost",
    "nodes_absent",
    "tries",
    "held_out",
    "quality",
}


def parameters(prepared) -> torch.Tensor:
    return prepared.server.parameters()


def test_one_noise_free_round_equals_a_plain_loop(tmp_path):
    """Every user alone in plain PyTorch, then the plain average, then one SGD step of rate 1."""
    changes = {
        "rounds": 1,
        "local": {"epochs": 2, "batch_size": 4, "lr": 0.2},
        "server": {"optimizer": "sgd", "lr": 1.0},
        "privacy": None,
    }
    _, prepared = train_small(tmp_path / "run", **changes)

    config = small_config(**changes)
    dataset = build_dataset(config.data, config.seed)
    start = build_model(config.model, dataset.input_shape, dataset.classes, config.seed)
    ends = []
    for user in range(dataset.population):
        model = copy.deepcopy(start)
        examples = dataset.user(user)
        source = Randomness.simulation(config.seed)
        own = source.torch(Purpose.LOCAL_TRAINING, 1, 0, *id_words(f"user-{user}"))
        shared = source.torch(Purpose.STEP_ORDER, 1)
        for index in batches(examples.sizes, prepared.trainer.recipe, own, shared):
            loss = F.cross_entropy(model(examples.inputs[index]), examples.targets[index])
            model.zero_grad()
            loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.2 * parameter.grad
        ends.append(Layout.of(model).join(parameters_of(model)))
    torch.testing.assert_close(
        parameters(prepared), torch.stack(ends).mean(0), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("dead", [[], [1]], ids=["all nodes", "one dead"])
def test_noise_is_drawn_once_at_full_strength_over_the_public_denominator(
    tmp_path, monkeypatch, dead
):
    """Take the noise away and the model differs by σ·noise/(q·N), whoever answered."""
    changes = {"rounds": 1, "server": {"optimizer": "sgd", "lr": 1.0}}
    directory, noisy = train_small(tmp_path / "noisy", InProcessGrid(dead=dead), **changes)
    assert len(Ledger.open(directory.ledger)) == 1
    assert directory.read_metrics()[0]["nodes_lost"] == len(dead)
    monkeypatch.setattr(
        GaussianMechanism,
        "noise",
        lambda self, sizes, generator: torch.zeros(sum(sizes), dtype=torch.float64),
    )
    _, silent = train_small(tmp_path / "silent", InProcessGrid(dead=dead), **changes)
    moved = parameters(silent) - parameters(noisy)
    sigma = 1.0 * 0.1
    standard = noisy.plan.randomness.numpy(Purpose.NOISE, 1, 0).standard_normal(len(moved))
    torch.testing.assert_close(
        moved, torch.from_numpy(sigma * standard / 8.0).float(), rtol=1e-4, atol=1e-6
    )


def test_a_round_in_which_every_node_died_is_paid_and_noisy(tmp_path):
    before = parameters(experiment.prepare(small_config()))
    directory, prepared = train_small(tmp_path / "run", InProcessGrid(dead=[0, 1]), rounds=1)
    assert len(Ledger.open(directory.ledger)) == 1
    assert not parameters(prepared).equal(before)


def test_the_run_goes_on_after_a_loss(tmp_path):
    with pytest.raises(WorkerLost):
        train_small(tmp_path / "run", InProcessGrid(dead=[1]))
    directory, prepared = resume_small(tmp_path / "run")
    assert [row["round"] for row in directory.read_metrics()] == [1, 2, 3, 4]
    assert [release.round for release in Ledger.open(directory.ledger)] == [1, 2, 3, 4]
    assert torch.isfinite(parameters(prepared)).all()


def test_who_answers_first_does_not_matter(tmp_path):
    _, one = train_small(tmp_path / "one", InProcessGrid(nodes=3), runtime__workers=3)
    _, two = train_small(tmp_path / "two", InProcessGrid(3, reverse=True), runtime__workers=3)
    assert parameters(one).equal(parameters(two))


def test_the_ledger_is_charged_before_the_model_moves(tmp_path, monkeypatch):
    order = []
    prepared = experiment.prepare(small_config(run_dir=str(tmp_path / "run"), rounds=2))
    directory = experiment.create(prepared)
    append, step = Ledger.append, prepared.server.step
    monkeypatch.setattr(
        Ledger, "append", lambda self, release: (append(self, release), order.append("charge"))
    )
    monkeypatch.setattr(
        prepared.server, "step", lambda *a, **k: (step(*a, **k), order.append("step"))
    )
    experiment.train(prepared, directory, Silent(), drive_on(None))
    assert order == ["charge", "step", "charge", "step"]


def test_a_failing_ledger_stops_the_round_before_the_model_moves(tmp_path, monkeypatch):
    prepared = experiment.prepare(small_config(run_dir=str(tmp_path / "run")))
    directory = experiment.create(prepared)
    before = parameters(prepared)

    def full(self, release):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Ledger, "append", full)
    with pytest.raises(OSError, match="No space"):
        experiment.train(prepared, directory, Silent(), drive_on(None))
    assert parameters(prepared).equal(before)


def test_epsilon_by_round_is_that_of_the_ledger(tmp_path):
    directory, _prepared = train_small(
        tmp_path / "run", privacy__accountants=["rdp", "pld"], evaluation__every=1
    )
    ledger = Ledger.open(directory.ledger)
    assert len(ledger) == 4
    accountant = RdpAccountant(ledger.adjacency)
    for row, release in zip(directory.read_metrics(), ledger, strict=True):
        accountant.compose(release.event())
        assert row["epsilon"]["rdp"] == pytest.approx(accountant.epsilon(1e-3), rel=1e-12)
        assert 0 < row["epsilon"]["pld"] < row["epsilon"]["rdp"]


def test_the_cohort_that_trains_is_the_one_that_was_drawn(tmp_path):
    grid = InProcessGrid()
    _, prepared = train_small(tmp_path / "run", grid)
    by_round: dict[int, list[int]] = {}
    for message in grid.sent:
        if message.metadata.message_type == "train":
            work = message.content["config"]
            by_round.setdefault(work["round"], []).extend(work["users"])
    assert sorted(by_round) == [1, 2, 3, 4]
    for round_, users in by_round.items():
        generator = prepared.plan.randomness.numpy(Purpose.SAMPLING, round_, 0)
        assert sorted(users) == prepared.plan.sampling.draw(generator).tolist()


def test_one_message_a_node_and_round(tmp_path):
    grid = InProcessGrid()
    train_small(tmp_path / "run", grid)
    sent = [m.metadata.dst_node_id for m in grid.sent if m.metadata.message_type == "train"]
    assert len(sent) <= 2 * 4
    assert max(sent.count(node) for node in set(sent)) <= 4


def test_the_budget_stops_before_the_round_that_would_exceed_it(tmp_path):
    prepared = experiment.prepare(
        small_config(run_dir=str(tmp_path / "run"), rounds=50, privacy__budget={"epsilon": 4.0})
    )
    directory = experiment.create(prepared)
    allowed = prepared.plan.affordable_rounds()
    assert 0 < allowed < 50
    with pytest.raises(BudgetError, match=f"round {allowed + 1} is not run"):
        experiment.train(prepared, directory, Silent(), drive_on(None))
    rows = directory.read_metrics()
    assert len(rows) == len(Ledger.open(directory.ledger)) == allowed
    assert rows[-1]["epsilon"]["rdp"] <= 4.0
    with pytest.raises(BudgetError):
        resume_small(tmp_path / "run")
    assert len(Ledger.open(directory.ledger)) == allowed


def test_values_gathered_from_users_are_marked(tmp_path):
    directory, prepared = train_small(tmp_path / "run")
    rows = directory.read_metrics()
    assert len(rows) == 4
    for row in rows:
        assert set(row) <= PUBLIC | {"simulation_only"}
        generator = prepared.plan.randomness.numpy(Purpose.SAMPLING, row["round"], 0)
        drawn = prepared.plan.sampling.draw(generator)
        assert row["simulation_only"]["cohort"] == len(drawn)


def crash_after(monkeypatch, method):
    """Raise after `method` of the strategy's second round has done its work."""
    original = getattr(PrivateFedAvg, method)

    def wrapped(self, *args, **kwargs):
        value = original(self, *args, **kwargs)
        if self.next_round == 2:
            raise RuntimeError("crash")
        return value

    monkeypatch.setattr(PrivateFedAvg, method, wrapped)


def test_a_round_that_is_run_again_repeats_its_release_and_is_not_charged_twice(
    tmp_path, monkeypatch
):
    _, whole = train_small(tmp_path / "whole")
    with monkeypatch.context() as patched:
        crash_after(patched, "_paid_release")
        with pytest.raises(RuntimeError, match="crash"):
            train_small(tmp_path / "run")
    assert len(Ledger.open(tmp_path / "run" / "ledger.jsonl")) == 2
    directory, resumed = resume_small(tmp_path / "run")
    assert parameters(resumed).equal(parameters(whole))
    assert [r.attempt for r in Ledger.open(directory.ledger)] == [0, 0, 0, 0]


@pytest.mark.parametrize("numbers", [0, 1, 2**18, 2**18 + 1, 3 * 2**18 - 1])
def test_the_digest_of_a_release_is_that_of_all_its_pieces(numbers):
    released = torch.randn(numbers, dtype=torch.float64)
    content, pieces = released.numpy().tobytes(), max(1, math.ceil(numbers / 2**18))
    length = 2**18 * released.itemsize
    hashed = [hashlib.sha256(content[i * length : (i + 1) * length]) for i in range(pieces)]
    whole = hashlib.sha256(b"".join(one.digest() for one in hashed)).hexdigest()
    assert digest_of(released) == whole
    for changed in {0, numbers // 2, numbers - 1} & set(range(numbers)):
        other = released.clone()
        other[changed] += 1
        assert digest_of(other) != whole


def test_neither_noise_nor_cohort_is_used_again_with_another_sum(tmp_path, monkeypatch):
    """Where the sum of a charged round has changed, both are drawn afresh and charged."""
    with monkeypatch.context() as patched:
        crash_after(patched, "_paid_release")
        with pytest.raises(RuntimeError, match="crash"):
            train_small(tmp_path / "run")
    # One worker fewer: floating-point sums differ in their last bits, if nothing else.
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("workers: 2", "workers: 1"))
    with monkeypatch.context() as patched:
        patched.setattr(
            "fedpriv.federation.messages.flat_tensor",
            lambda record: torch.from_numpy(np.array(record["flat"].numpy())) * (1 + 1e-12),
        )
        grid = InProcessGrid(nodes=1)
        directory, resumed = resume_small(tmp_path / "run", grid)
    trained = [m.content["config"] for m in grid.sent if m.metadata.message_type == "train"]
    for attempt, work in enumerate([w for w in trained if w["round"] == 2]):
        generator = resumed.plan.randomness.numpy(Purpose.SAMPLING, 2, attempt)
        assert work["users"] == resumed.plan.sampling.draw(generator).tolist()
    releases = list(Ledger.open(directory.ledger))
    assert [(r.round, r.attempt) for r in releases][:3] == [(1, 0), (2, 0), (2, 1)]
    last = directory.read_metrics()[-1]
    accountant = RdpAccountant(Ledger.open(directory.ledger).adjacency)
    for release in releases:
        accountant.compose(release.event())
    assert last["epsilon"]["rdp"] == pytest.approx(accountant.epsilon(1e-3))


@pytest.mark.parametrize("adapts", ["global", "per_layer"])
def test_adaptive_bounds_follow_the_noisy_counts_and_cost_the_same(tmp_path, adapts):
    changes = {
        "rounds": 6,
        "privacy__sampling__expected_cohort": 30,
        "privacy__clipping": {
            "kind": "adaptive",
            "bound": 1e-3,
            "adapts": adapts,
            "adapt_lr": 1.0,
        },
    }
    directory, whole = train_small(tmp_path / "run", **changes)
    rows, releases = directory.read_metrics(), list(Ledger.open(directory.ledger))
    bounds = [row["clip_bound"] for row in rows]
    assert bounds == [release.bound for release in releases]
    assert bounds[0] == pytest.approx(1e-3)
    assert bounds[-1] > 2 * bounds[0]  # far below the norms at first, so it must grow
    for release in releases:
        assert release.counts == (1 if adapts == "global" else len(whole.plan.layout.names))
        joint = (release.bound / release.stddev) ** 2 + release.counts / (
            2 * release.count_stddev
        ) ** 2
        assert joint**-0.5 == pytest.approx(1.0)
    fixed, _ = train_small(tmp_path / "fixed", rounds=6, privacy__sampling__expected_cohort=30)
    assert rows[-1]["epsilon"]["rdp"] == pytest.approx(
        fixed.read_metrics()[-1]["epsilon"]["rdp"], rel=1e-9
    )


def test_adapted_bounds_survive_a_resume(tmp_path):
    changes = {"privacy__clipping": {"kind": "adaptive", "bound": 0.01, "adapts": "per_layer"}}
    _, whole = train_small(tmp_path / "whole", **changes)
    with pytest.raises(WorkerLost):
        train_small(tmp_path / "lost", InProcessGrid(dead=[0, 1]), **changes)
    _, reopened = experiment.reopen(tmp_path / "lost")
    assert len(reopened.bounds) == len(whole.plan.layout.names)
    assert reopened.bounds != bounds_of(whole.plan.mechanism.gaussian.clipping)
    resume_small(tmp_path / "lost")
    assert len(Ledger.open(tmp_path / "lost" / "ledger.jsonl")) == 4


def test_per_block_noise_trains_and_costs_the_same(tmp_path):
    directory, trained = train_small(tmp_path / "run", privacy__noise="per_block")
    other, plain = train_small(tmp_path / "other")
    shapes = [{r.noise_shape for r in Ledger.open(d.ledger)} for d in (directory, other)]
    assert shapes == [{"per_block"}, {"spherical"}]
    assert not parameters(trained).equal(parameters(plain))
    assert (
        directory.read_metrics()[-1]["epsilon"]["rdp"] == other.read_metrics()[-1]["epsilon"]["rdp"]
    )


def test_without_privacy_no_epsilon_is_ever_given(tmp_path):
    for name, changes in {
        "null": {"privacy": None, "cohort": 8},
        "no-noise": {"privacy__noise_multiplier": 0.0, "privacy__accountants": ["rdp", "pld"]},
    }.items():
        directory, _ = train_small(tmp_path / name, **changes)
        rows = directory.read_metrics()
        assert len(rows) == len(Ledger.open(directory.ledger)) == 4
        for row in rows:
            assert set(row["epsilon"].values()) == {None}
        assert all(math.isinf(_epsilon(release)) for release in Ledger.open(directory.ledger))


def _epsilon(release) -> float:
    accountant = RdpAccountant(Adjacency.ADD_OR_REMOVE_ONE)
    accountant.compose(release.event())
    return accountant.epsilon(1e-3)


def test_in_a_deployment_nodes_host_their_own_and_nothing_is_seeded(tmp_path):
    changes = {"runtime__deployment": True, "data__users": 60}
    grid = InProcessGrid(nodes=3)
    directory, one = train_small(tmp_path / "one", grid, runtime__workers=3, **changes)
    _, two = train_small(tmp_path / "two", InProcessGrid(3), runtime__workers=3, **changes)
    assert not parameters(one).equal(parameters(two))
    assert str(one.plan.randomness.root) not in directory.ledger.read_text()
    assert directory.environment()["seed"] is None
    for message in grid.sent:
        if message.metadata.message_type == "train":
            assert max(message.content["config"]["users"]) < 20


def test_a_deployment_repeats_no_noise_so_a_rerun_round_is_charged_again(tmp_path, monkeypatch):
    changes = {"runtime__deployment": True}
    with monkeypatch.context() as patched:
        crash_after(patched, "_paid_release")
        with pytest.raises(RuntimeError, match="crash"):
            train_small(tmp_path / "run", **changes)
    directory, _ = resume_small(tmp_path / "run")
    assert [(r.round, r.attempt) for r in Ledger.open(directory.ledger)] == [
        (1, 0), (2, 0), (2, 1), (3, 0), (4, 0),
    ]  # fmt: skip


def test_more_users_at_the_nodes_than_accounted_for_is_refused(tmp_path):
    observer, grid = Silent(), _Overfull()
    changes = {"runtime__deployment": True, "runtime__node_share": 0.0, "rounds": 1}
    prepared = experiment.prepare(small_config(run_dir=str(tmp_path / "run"), **changes))
    experiment.train(prepared, experiment.create(prepared), observer, drive_on(grid))
    assert any("only 10 places are left" in sentence for sentence in observer.sentences)
    trained = [m for m in grid.sent if m.metadata.message_type == "train"]
    assert {m.metadata.dst_node_id for m in trained} <= {1000}


class _Overfull(InProcessGrid):
    def answer(self, message):
        reply = super().answer(message)
        if "hosting" in reply.content:
            reply.content["hosting"]["users"] = 50
        return reply


class Crashing(InProcessGrid):
    """Its client code raises on every train message."""

    def answer(self, message):
        if message.metadata.message_type == "train":
            return Message(Error(code=2, reason="KeyError: 'x'"), reply_to=message)
        return super().answer(message)


def test_a_crash_of_the_client_code_is_not_taken_for_a_dropout(tmp_path):
    with pytest.raises(ClientFault, match="KeyError"):
        train_small(tmp_path / "run", Crashing())
    assert len(Ledger.open(tmp_path / "run" / "ledger.jsonl")) == 0


def test_a_request_to_stop_keeps_the_finished_round_and_resumes_to_the_same_end(tmp_path):
    _, whole = train_small(tmp_path / "whole")
    prepared = experiment.prepare(small_config(run_dir=str(tmp_path / "run")))
    directory = experiment.create(prepared)

    class StopsInRoundTwo(Silent):
        def finished(self, row):
            if row["round"] == 1:  # of which one hears while round 2 is trained
                stop.set()

    stop = threading.Event()
    ledger = directory.open_ledger(prepared.header())
    recorder = Recorder(prepared, directory, ledger, StopsInRoundTwo())
    strategy = PrivateFedAvg(prepared.plan, prepared.server, ledger, recorder.record, stop)
    with pytest.raises(Interrupted, match="after round 2"):
        strategy.start(InProcessGrid())
    directory, resumed = resume_small(tmp_path / "run")
    assert parameters(resumed).equal(parameters(whole))
    rows = [json.loads(line) for line in directory.metrics.read_text().splitlines()]
    assert [row["round"] for row in rows] == [1, 2, 3, 4]


class Diary(InProcessGrid):
    """Writes down what it is asked, and the observer what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def push_messages(self, messages):
        messages = list(messages)
        if messages[0].metadata.message_type == "train":
            self.lines.append(f"ask {messages[0].metadata.group_id}")
        return super().push_messages(messages)

    def pull_messages(self, message_ids):
        if self.lines[-1:] != ["listen"]:  # to one node after the other in a deployment
            self.lines.append("listen")
        return super().pull_messages(message_ids)


@pytest.mark.parametrize("kind", ["simulation", "deployment", "memories"])
def test_a_round_is_reported_while_the_next_is_trained_where_that_is_safe(tmp_path, kind):
    changes = {
        "simulation": {},
        # Of everybody: of a cohort in which nobody is, nothing is asked.
        "deployment": {"runtime__deployment": True, "privacy__sampling": {"kind": "all"}},
        "memories": {"privacy__error_feedback": "user"},
    }[kind]
    grid = Diary()

    class Told(Silent):
        def finished(self, row):
            grid.lines.append(f"report {row['round']}")

    prepared = experiment.prepare(small_config(**changes, rounds=2, run_dir=str(tmp_path / "run")))
    directory = experiment.create(prepared)
    experiment.train(prepared, directory, Told(), drive_on(grid))
    expected = ["ask 1", "listen", "ask 2", "report 1", "listen", "report 2"]
    if kind != "simulation":
        expected[2:4] = ["report 1", "ask 2"]
    assert grid.lines[1:] == expected  # the first answer is of who hosts whom


def test_runs_of_one_seed_and_different_settings_share_neither_noise_nor_cohorts(tmp_path):
    plans = [
        experiment.prepare(small_config(**changes)).plan
        for changes in ({}, {"local__lr": 0.2}, {"privacy__noise_multiplier": 1.5})
    ]
    for purpose in (Purpose.NOISE, Purpose.SAMPLING):
        drawn = {plan.randomness.numpy(purpose, 1, 0).standard_normal() for plan in plans}
        assert len(drawn) == 3
    same = experiment.prepare(small_config(runtime__workers=1)).plan
    assert same.randomness.root == plans[0].randomness.root


def test_a_ledger_that_lost_its_last_lines_is_refused(tmp_path):
    directory, _ = train_small(tmp_path / "run")
    lines = directory.ledger.read_bytes().splitlines(keepends=True)
    directory.ledger.write_bytes(b"".join(lines[:-1]))
    with pytest.raises(InputError, match="charges nothing for round 4"):
        resume_small(tmp_path / "run")


def test_a_run_that_died_while_its_ledger_was_made_starts_anew(tmp_path):
    directory = experiment.create(experiment.prepare(small_config(run_dir=str(tmp_path / "run"))))
    directory.ledger.write_bytes(b'{"kind": "hea')
    resume_small(tmp_path / "run")
    assert len(Ledger.open(directory.ledger)) == 4


def test_a_state_that_another_process_has_moved_on_is_refused(tmp_path):
    with pytest.raises(WorkerLost):
        train_small(tmp_path / "run", InProcessGrid(dead=[1]))
    directory, stale = experiment.reopen(tmp_path / "run")
    resume_small(tmp_path / "run")
    with pytest.raises(InputError, match="continued this run"):
        experiment.train(stale, directory, Silent(), drive_on(None))


@pytest.mark.parametrize("damage", ["nan", "short"])
def test_in_a_simulation_a_sum_that_cannot_be_one_ends_the_run(tmp_path, damage):
    class Broken(InProcessGrid):
        def answer(self, message):
            reply = super().answer(message)
            if "sum" in reply.content and message.metadata.dst_node_id == 1001:
                total = flat_tensor(reply.content["sum"])
                bad = total * math.nan if damage == "nan" else total[:-1]
                reply.content["sum"] = flat_record(bad)
            return reply

    with pytest.raises(ClientFault, match="no users can make"):
        train_small(tmp_path / "run", Broken())
    assert len(Ledger.open(tmp_path / "run" / "ledger.jsonl")) == 0


def test_a_deployment_writes_nothing_of_its_users_but_releases(tmp_path):
    directory, _ = train_small(tmp_path / "run", runtime__deployment=True)
    rows = directory.read_metrics()
    assert len(rows) == 4
    for row in rows:
        assert set(row) <= PUBLIC
    assert write_report([directory.path]).exists()


def test_a_user_without_data_stops_a_simulation_and_counts_as_zero_in_a_deployment(
    tmp_path, monkeypatch
):
    original = PartitionedImages.user

    def user(self, index):
        if index % 7 == 3:
            raise InputError(f"empty user: {index}")
        return original(self, index)

    monkeypatch.setattr(PartitionedImages, "user", user)
    monkeypatch.setattr(client_app, "_TRAINERS", client_app._Trainers())
    with pytest.raises(InputError, match="empty user"):
        train_small(tmp_path / "simulation")
    directory, _ = train_small(tmp_path / "deployment", runtime__deployment=True)
    assert len(Ledger.open(directory.ledger)) == 4


def test_a_deployment_in_which_all_clients_crash_stops_before_it_pays(tmp_path):
    everybody = {"privacy__sampling": {"kind": "all"}}  # a node that is not asked is not lost
    with pytest.raises(WorkerLost, match="0 of 2 nodes took part"):
        train_small(tmp_path / "run", Crashing(), runtime__deployment=True, **everybody)
    assert len(Ledger.open(tmp_path / "run" / "ledger.jsonl")) == 0


def test_a_deployment_is_not_simulated(tmp_path):
    prepared = experiment.prepare(
        small_config(run_dir=str(tmp_path / "run"), runtime__deployment=True)
    )
    with pytest.raises(InputError, match="use flwr run"):
        experiment.train(prepared, experiment.create(prepared), Silent())


def test_parameters_can_travel_as_bfloat16(tmp_path):
    """Users then start from rounded parameters, and the server keeps its own."""
    changes = {
        "rounds": 1,
        "local": {"epochs": 1, "batch_size": 6, "lr": 0.2},
        "privacy": None,
    }
    grid = InProcessGrid()
    server = {"optimizer": "sgd", "lr": 1.0, "broadcast": "bfloat16"}
    _, rounded = train_small(tmp_path / "bfloat16", grid, server=server, **changes)
    sent = grid.sent[-1].content["arrays"]["flat"]
    own = experiment.prepare(small_config(**changes)).server.parameters()
    assert len(sent.data) < 2 * len(own) + 200
    received = flat_tensor(grid.sent[-1].content["arrays"])
    assert received.equal(own.bfloat16().float())
    assert not received.equal(own)

    model = experiment.prepare(small_config(**changes)).trainer.model
    dataset, layout = rounded.trainer.dataset, Layout.of(model)
    updates = []
    for user in range(dataset.population):
        for name, parameter in model.named_parameters():
            parameter.data.copy_(layout.split(received)[name])
        examples = dataset.user(user)  # six at most: one step
        model.zero_grad()
        F.cross_entropy(model(examples.inputs), examples.targets).backward()
        updates.append(torch.cat([0.2 * p.grad.flatten() for p in model.parameters()]))
    expected = own - torch.stack(updates).mean(0)
    torch.testing.assert_close(parameters(rounded), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"num_rounds": 3}, "`rounds`"),
        ({"initial_arrays": ArrayRecord()}, "`seed_model.path`"),
        ({"timeout": 5.0}, "`runtime.round_timeout`"),
        ({"evaluate_fn": lambda round_, arrays: None}, "`evaluation`"),
    ],
)
def test_what_the_config_decides_is_not_taken_from_who_calls(tmp_path, given, key):
    prepared = experiment.prepare(small_config(run_dir=str(tmp_path / "run")))
    directory = experiment.create(prepared)
    grid = InProcessGrid()
    with pytest.raises(InputError, match=key):
        experiment.train(
            prepared, directory, Silent(), lambda strategy: strategy.start(grid, **given)
        )
    assert grid.sent == []
    assert len(directory.open_ledger(prepared.header())) == 0


def test_as_many_rounds_as_the_config_has_are_obeyed(tmp_path):
    prepared = experiment.prepare(small_config(run_dir=str(tmp_path / "run"), rounds=1))
    directory = experiment.create(prepared)
    grid = InProcessGrid()
    experiment.train(
        prepared, directory, Silent(), lambda strategy: strategy.start(grid, num_rounds=1)
    )
    assert len(directory.open_ledger(prepared.header())) == 1
