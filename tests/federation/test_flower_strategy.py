"""An app of Flower's own under PrivateStrategy, against numbers worked out here by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting import rdp
from flower_apps import START, app_of, node_of, start_record, update_of
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping as FlowersWrapper
from flwr.serverapp.strategy import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedXgbBagging,
    FedYogi,
    Krum,
    QFedAvg,
    Strategy,
)

from fedpriv.errors import ClientFault, InputError, WorkerLost
from fedpriv.experiment import reopen
from fedpriv.federation.grids.base import FIRST_NODE
from fedpriv.federation.grids.local import LocalGrid
from fedpriv.flower import PrivateStrategy
from fedpriv.privacy.ledger import read_ledger
from fedpriv.privacy.randomness import Purpose, Randomness
from fedpriv.privacy.sampling import PoissonSampling

BOUND, COHORT, NODES = 0.5, 4.0, 10
#: As good as no noise, so that sums can be read.
SILENT = 1e-6
SEEDED = {"seed": 3, "data": "made up"}


@pytest.fixture(autouse=True)
def _without_reports(monkeypatch, request):
    """A report takes a second, and one test looks at it."""
    if "report" not in request.node.name:
        monkeypatch.setattr("fedpriv.flower.strategy.write_report", lambda paths: "not written")


def privacy(**changes: Any) -> dict[str, Any]:
    return {
        "delta": 1e-3,
        "noise_multiplier": 1.0,
        "sampling": {"kind": "poisson", "expected_cohort": COHORT},
        "clipping": {"kind": "global", "bound": BOUND},
        "accountants": ["rdp"],
        **changes,
    }


class Grid(LocalGrid):
    """Keeps what is sent and answered; passes for real nodes, whose replies `lie` may change."""

    def __init__(self, app: ClientApp, real: bool = True, nodes: int = NODES) -> None:
        super().__init__(nodes, node_of(app))
        self.simulated = not real
        self.sent: list[Message] = []
        self.answers: list[Message] = []
        self.lie: Callable[[Message, Message], Message] = lambda message, reply: reply

    def answer(self, message: Message) -> Message:
        self.sent.append(message)
        try:
            reply = super().answer(message)
        except ClientFault as error:
            if self.simulated:
                raise
            reply = Message(Error(code=2, reason=str(error)), reply_to=message)
        self.answers.append(self.lie(message, reply))
        return self.answers[-1]


def wrapped(folder: Path, strategy: Strategy | None = None, **changes: Any) -> PrivateStrategy:
    given = {"population": NODES, "privacy": privacy(), "run_dir": folder, "join_timeout": 0.1}
    return PrivateStrategy(strategy or FedAvg(), **{**given, **changes})


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def by_hand(nodes: Iterable[int]) -> dict[str, np.ndarray]:
    """START less the sum of clipped updates over the expected cohort, in plain NumPy."""
    total = {name: np.zeros(array.shape) for name, array in START.items()}
    for node in nodes:
        move = {name: array.astype(np.float64) for name, array in update_of(node).items()}
        norm = math.sqrt(sum(float((array**2).sum()) for array in move.values()))
        for name, array in move.items():
            total[name] += array * min(1.0, BOUND / norm)
    return {name: array + total[name] / COHORT for name, array in START.items()}


def assert_arrays(found: ArrayRecord, expected: dict[str, np.ndarray], atol: float = 1e-5) -> None:
    for name, array in expected.items():
        np.testing.assert_allclose(found[name].numpy(), array, atol=atol, rtol=0)


# -------------------------------------------------------------------- a round


def test_a_round_is_the_clipped_sum_of_who_was_drawn_over_the_public_cohort(tmp_path):
    trained: list[int] = []
    grid = Grid(app_of(trained))
    strategy = wrapped(tmp_path / "run", privacy=privacy(noise_multiplier=SILENT))
    result = strategy.start(grid, start_record(), num_rounds=1)
    assert sorted(trained) == sorted(m.metadata.dst_node_id - FIRST_NODE for m in grid.sent)
    assert_arrays(result.arrays, by_hand(trained))
    norms = [np.sqrt(sum((a**2).sum() for a in update_of(n).values())) for n in range(NODES)]
    assert min(norms) < BOUND < max(norms)


def test_who_is_asked_is_who_the_accounted_sampling_draws(tmp_path):
    """Node n has place n on a grid of ours; over 30 rounds, coins of probability q."""
    grid = Grid(app_of([]), real=False)
    wrapped(tmp_path / "run", **SEEDED).start(grid, start_record(), num_rounds=30)
    header = read_ledger(tmp_path / "run" / "ledger.jsonl").header
    source = Randomness.simulation(SEEDED["seed"], header.fingerprint)
    asked: dict[int, list[int]] = {round_: [] for round_ in range(1, 31)}
    for message in grid.sent:
        node = message.metadata.dst_node_id - FIRST_NODE
        asked[int(message.metadata.group_id)].append(node)
    for round_, nodes in asked.items():
        drawn = PoissonSampling(NODES, COHORT).draw(source.numpy(Purpose.SAMPLING, round_, 0))
        assert sorted(nodes) == drawn.tolist()
    q, tosses = COHORT / NODES, 30 * NODES
    assert abs(len(grid.sent) - q * tosses) < 5 * math.sqrt(tosses * q * (1 - q))


def test_each_block_has_its_own_bound_where_clipping_is_per_layer(tmp_path):
    grid = Grid(app_of([], change=lambda node: {k: 0 * v + 9 for k, v in START.items()}))
    clipping = {"kind": "per_layer", "bound": BOUND, "split": "uniform"}
    everybody = privacy(noise_multiplier=SILENT, clipping=clipping, sampling={"kind": "all"})
    result = wrapped(tmp_path / "run", privacy=everybody).start(grid, start_record(), num_rounds=1)
    each = BOUND / math.sqrt(2)
    moved = {name: START[name] + each / math.sqrt(START[name].size) for name in START}
    assert_arrays(result.arrays, moved)


def test_noise_has_the_size_that_is_charged_whoever_answers(tmp_path):
    """Nobody moves anything: what is left is noise of standard deviation zC / cohort."""
    big = {"w": np.zeros((200, 200), dtype=np.float32)}
    app = app_of([], change=lambda node: big)
    start = ArrayRecord({name: Array(array) for name, array in big.items()})
    grid = Grid(app)
    grid.lie = lambda message, reply: Message(Error(code=5, reason="gone"), reply_to=message)
    result = wrapped(tmp_path / "run").start(grid, start, num_rounds=1)
    noise = result.arrays["w"].numpy()
    assert noise.std() == pytest.approx(1.0 * BOUND / COHORT, rel=0.02)
    assert abs(noise.mean()) < 4 * BOUND / COHORT / 200
    event = read_ledger(tmp_path / "run" / "ledger.jsonl").releases[0].event()
    gaussian = dp_accounting.GaussianDpEvent(1.0)
    assert isinstance(event, dp_accounting.PoissonSampledDpEvent)
    assert event.sampling_probability == COHORT / NODES
    assert event.event.noise_multiplier == pytest.approx(gaussian.noise_multiplier, rel=1e-9)


def test_epsilon_is_that_of_dp_accounting_for_the_rounds_that_were_run(tmp_path):
    wrapped(tmp_path / "run").start(Grid(app_of([])), start_record(), num_rounds=3)
    reference = rdp.RdpAccountant()
    step = dp_accounting.PoissonSampledDpEvent(COHORT / NODES, dp_accounting.GaussianDpEvent(1.0))
    for row in rows_of(tmp_path / "run"):
        reference.compose(step)
        assert row["epsilon"]["rdp"] == pytest.approx(reference.get_epsilon(1e-3), rel=1e-6)


def test_nothing_leaves_a_node_but_its_clipped_update(tmp_path):
    grid = Grid(app_of([]))
    wrapped(tmp_path / "run").start(grid, start_record(), num_rounds=2)
    assert grid.answers
    for reply in grid.answers:
        assert {name: list(record) for name, record in reply.content.items()} == {
            "sum": ["flat"],
            "seen": ["partition"],
        }
        assert np.linalg.norm(reply.content["sum"]["flat"].numpy()) <= BOUND
    assert all(message.metadata.message_type == "train" for message in grid.sent)


def test_the_strategy_sees_one_reply_that_is_paid_for(tmp_path):
    """What it sees has no single client in it, and is charged on the disk by then."""
    ledger = tmp_path / "run" / "ledger.jsonl"
    seen = []

    class Spy(FedAvg):
        def configure_train(self, server_round, arrays, config, grid):
            seen.append(("asked", server_round, len(read_ledger(ledger).releases)))
            return super().configure_train(server_round, arrays, config, grid)

        def aggregate_train(self, server_round, replies):
            (reply,) = replies
            charged = read_ledger(ledger).releases
            seen.append(("mean", server_round, len(charged)))
            assert dict(reply.content["metrics"]) == {"num-examples": 1.0}
            return super().aggregate_train(server_round, [reply])

    strategy = wrapped(tmp_path / "run", Spy(), mean_only=True)
    strategy.start(Grid(app_of([])), start_record(), num_rounds=2)
    assert seen == [("asked", 1, 0), ("mean", 1, 1), ("asked", 2, 1), ("mean", 2, 2)]


@pytest.mark.parametrize(
    "make",
    [
        FedAvg,
        lambda: FedAvgM(server_learning_rate=0.5, server_momentum=0.9),
        lambda: FedProx(proximal_mu=0.1),
        lambda: FedAdam(eta=0.05, beta_1=0.9, beta_2=0.99),
        lambda: FedYogi(eta=0.05, beta_1=0.9, beta_2=0.99),
        lambda: FedAdagrad(eta=0.05),
    ],
    ids=["FedAvg", "FedAvgM", "FedProx", "FedAdam", "FedYogi", "FedAdagrad"],
)
def test_a_strategy_moves_the_model_as_it_would_by_a_client_that_sends_the_mean(tmp_path, make):
    trained: list[int] = []
    strategy = wrapped(tmp_path / "run", make(), privacy=privacy(noise_multiplier=SILENT))
    grid = Grid(app_of(trained))
    result = strategy.start(grid, start_record(), num_rounds=1)
    mean = ArrayRecord({k: Array(v.astype(np.float32)) for k, v in by_hand(trained).items()})
    alone = make()

    class Two(LocalGrid):
        def get_node_ids(self):
            return [1, 2]

    messages = list(alone.configure_train(1, start_record(), ConfigRecord(), Two(1)))
    content = RecordDict({"arrays": mean, "metrics": MetricRecord({"num-examples": 5})})
    expected, _ = alone.aggregate_train(1, [Message(content, reply_to=messages[0])])
    assert_arrays(result.arrays, {k: v.numpy() for k, v in expected.items()}, atol=2e-4)
    for message in grid.sent:  # of whom coins may draw nobody
        told = {k: v for k, v in message.content["config"].items() if k != "server-round"}
        assert told == ({"proximal-mu": 0.1} if isinstance(alone, FedProx) else {})


# -------------------------------------------------------------------- nodes that misbehave


def lying(reply: Message, numbers: np.ndarray, **seen: Any) -> Message:
    content = RecordDict({"sum": ArrayRecord({"flat": Array(numbers)})})
    content["seen"] = ConfigRecord({**dict(reply.content["seen"]), **seen})
    reply.content = content
    return reply


@pytest.mark.parametrize(
    ("lie", "why"),
    [
        (lambda m, r: lying(r, np.full(8, 1.0)), "at most 0.5 is possible"),
        (lambda m, r: lying(r, np.full(8, np.nan)), "not finite"),
        (lambda m, r: lying(r, np.zeros(7)), "another kind or length"),
        (lambda m, r: lying(r, np.zeros(8, dtype=np.float32)), "another kind or length"),
        (lambda m, r: lying(r, np.zeros(8), partition=99), "claims to be node 99"),
        (lambda m, r: Message(RecordDict(), reply_to=m), "ClientApp(mods=[fedpriv.flower"),
        (lambda m, r: Message(Error(code=2, reason="x"), reply_to=m), "its code raised"),
        (lambda m, r: Message(Error(code=5, reason="x"), reply_to=m), "nothing of it arrived"),
    ],
)
def test_a_node_whose_reply_does_not_count_is_left_out_and_the_round_goes_on(
    tmp_path, lie, why, caplog
):
    trained: list[int] = []
    liar = FIRST_NODE + NODES - 1
    grid = Grid(app_of(trained))
    grid.lie = lambda m, r: lie(m, r) if m.metadata.dst_node_id == liar else r
    everybody = privacy(noise_multiplier=SILENT, sampling={"kind": "all"})
    result = wrapped(tmp_path / "run", privacy=everybody).start(grid, start_record(), num_rounds=1)
    honest = by_hand(range(NODES - 1))
    expected = {k: START[k] + (honest[k] - START[k]) * COHORT / NODES for k in START}
    assert_arrays(result.arrays, expected)
    assert any(str(liar) in line and why in line for line in caplog.messages), caplog.messages
    assert rows_of(tmp_path / "run")[0]["nodes_lost"] == 1


def test_a_node_counts_once_however_often_it_answers(tmp_path):
    class Twice(Grid):
        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            return [reply for reply in super().pull_messages(message_ids) for _ in range(2)]

    everybody = privacy(noise_multiplier=SILENT, sampling={"kind": "all"})
    grid = Twice(app_of([]))
    result = wrapped(tmp_path / "run", privacy=everybody).start(grid, start_record(), num_rounds=1)
    once = by_hand(range(NODES))
    assert_arrays(result.arrays, {k: START[k] + (once[k] - START[k]) * 0.4 for k in START})


def test_a_client_without_the_mod_contributes_nothing(tmp_path, caplog):
    grid = Grid(app_of([], mods=[]))
    strategy = wrapped(tmp_path / "run", privacy=privacy(noise_multiplier=SILENT))
    result = strategy.start(grid, start_record(), num_rounds=1)
    assert_arrays(result.arrays, START)
    told = any("mods=[fedpriv.flower.clipping_mod]" in line for line in caplog.messages)
    assert told == bool(grid.sent)  # coins may draw nobody


def test_over_simulated_nodes_a_client_without_the_mod_ends_the_run_and_costs_nothing(tmp_path):
    strategy = wrapped(tmp_path / "run", privacy=privacy(sampling={"kind": "all"}))
    with pytest.raises(ClientFault, match="clipping_mod"):
        strategy.start(Grid(app_of([], mods=[]), real=False), start_record(), num_rounds=1)
    assert read_ledger(tmp_path / "run" / "ledger.jsonl").releases == ()


def test_the_mod_answers_nobody_but_a_private_strategy():
    app = app_of([])
    grid = LocalGrid(1, node_of(app))
    content = RecordDict({"arrays": start_record(), "config": ConfigRecord()})
    message = Message(content, FIRST_NODE, "train")
    with pytest.raises(InputError, match="nothing would protect"):
        node_of(app)(0, 1)(message)
    assert grid.get_node_ids() == [FIRST_NODE]


def test_nodes_that_come_and_go_are_drawn_by_places_of_their_own(tmp_path):
    """Fewer nodes than places contribute less; more nodes than places are never drawn."""
    few, many = Grid(app_of([]), nodes=4), Grid(app_of([]), nodes=NODES + 3)
    everybody = privacy(noise_multiplier=SILENT, sampling={"kind": "all"})
    wrapped(tmp_path / "few", privacy=everybody).start(few, start_record(), num_rounds=2)
    assert len(few.sent) == 8
    wrapped(tmp_path / "many", privacy=everybody).start(many, start_record(), num_rounds=1)
    assert len(many.sent) == NODES


def test_too_few_nodes_release_nothing(tmp_path):
    strategy = wrapped(tmp_path / "run", FedAvg(min_available_nodes=5))
    with pytest.raises(WorkerLost, match="min_available_nodes is 5"):
        strategy.start(Grid(app_of([]), nodes=4), start_record(), num_rounds=1)
    assert read_ledger(tmp_path / "run" / "ledger.jsonl").releases == ()


# -------------------------------------------------------------------- budget, restarts, seeds


def test_the_round_that_would_exceed_the_budget_is_not_run(tmp_path):
    grid = Grid(app_of([]))
    wrapped(tmp_path / "free").start(grid, start_record(), num_rounds=5)
    costs = [row["epsilon"]["rdp"] for row in rows_of(tmp_path / "free")]
    budget = {"epsilon": (costs[2] + costs[3]) / 2}
    strategy = wrapped(tmp_path / "run", privacy=privacy(budget=budget))
    result = strategy.start(grid, start_record(), num_rounds=5)
    assert "round 4 is not run" in strategy.stopped
    assert len(read_ledger(tmp_path / "run" / "ledger.jsonl").releases) == 3
    assert not np.array_equal(result.arrays["w"].numpy(), START["w"])
    assert "not run" in wrapped_again(tmp_path / "run", budget).stopped


def wrapped_again(folder: Path, budget: dict[str, float]) -> PrivateStrategy:
    strategy = wrapped(folder, privacy=privacy(budget=budget))
    strategy.start(Grid(app_of([])), start_record(), num_rounds=5)
    assert len(read_ledger(folder / "ledger.jsonl").releases) == 3
    return strategy


@pytest.mark.parametrize(
    "make",
    [
        lambda: FedAvgM(server_learning_rate=0.5, server_momentum=0.9),
        lambda: FedAdam(eta=0.05, beta_1=0.9, beta_2=0.99),
    ],
    ids=["FedAvgM", "FedAdam"],
)
def test_an_app_that_is_started_again_goes_on_with_the_strategys_own_state(tmp_path, make):
    """A run of four rounds, and one that dies in its third after the charge and starts again."""
    grid = Grid(app_of([]), real=False)
    whole = wrapped(tmp_path / "whole", make(), **SEEDED).start(grid, start_record(), num_rounds=4)
    dying = make()
    aggregate = dying.aggregate_train

    def dies(server_round: int, replies: Iterable[Message]) -> Any:
        if server_round == 3:
            raise MemoryError("killed")
        return aggregate(server_round, replies)

    dying.aggregate_train = dies  # on this object alone
    with pytest.raises(MemoryError):
        wrapped(tmp_path / "torn", dying, **SEEDED).start(grid, start_record(), num_rounds=4)
    again = wrapped(tmp_path / "torn", make(), **SEEDED)
    resumed = again.start(grid, start_record(), num_rounds=4)
    for name in START:
        assert resumed.arrays[name].numpy().tobytes() == whole.arrays[name].numpy().tobytes()
    ledgers = [read_ledger(tmp_path / each / "ledger.jsonl").releases for each in ("whole", "torn")]
    assert ledgers[0] == ledgers[1]  # the same release, which is paid for


def test_noise_of_the_operating_system_is_never_used_twice(tmp_path):
    """A round that was charged and not kept is drawn afresh, and paid for again."""
    grid = Grid(app_of([], change=lambda node: {k: 0 * v for k, v in START.items()}))
    dying = FedAvg()
    aggregate, seen = dying.aggregate_train, []

    def dies(server_round: int, replies: Iterable[Message]) -> Any:
        (reply,) = replies
        seen.append(reply.content["arrays"]["w"].numpy())
        if len(seen) == 2:
            raise MemoryError("killed")
        return aggregate(server_round, [reply])

    dying.aggregate_train = dies
    with pytest.raises(MemoryError):
        wrapped(tmp_path / "run", dying).start(grid, start_record(), num_rounds=2)
    resumed = wrapped(tmp_path / "run").start(grid, start_record(), num_rounds=2)
    releases = read_ledger(tmp_path / "run" / "ledger.jsonl").releases
    assert [(r.round, r.attempt) for r in releases] == [(1, 0), (2, 0), (2, 1)]
    assert len({r.digest for r in releases}) == 3
    assert not np.allclose(resumed.arrays["w"].numpy(), seen[1], atol=1e-3)
    # Nor by another run of the same settings.
    wrapped(tmp_path / "other").start(grid, start_record(), num_rounds=1)
    others = read_ledger(tmp_path / "other" / "ledger.jsonl").releases
    assert others[0].digest not in {r.digest for r in releases}
    # Every charge is in the ε that is said.
    reference = rdp.RdpAccountant()
    step = dp_accounting.PoissonSampledDpEvent(COHORT / NODES, dp_accounting.GaussianDpEvent(1.0))
    reference.compose(step, 3)
    assert rows_of(tmp_path / "run")[-1]["epsilon"]["rdp"] == pytest.approx(
        reference.get_epsilon(1e-3), rel=1e-6
    )


def test_a_seed_draws_the_same_only_for_the_same_data_and_start(tmp_path):
    def run(name: str, start: ArrayRecord, **changes: Any) -> list[str]:
        grid = Grid(app_of([]), real=False)
        wrapped(tmp_path / name, **{**SEEDED, **changes}).start(grid, start, num_rounds=1)
        return [r.digest for r in read_ledger(tmp_path / name / "ledger.jsonl").releases]

    one = run("one", start_record())
    assert run("same", start_record()) == one
    other = ArrayRecord({name: Array(array + 1) for name, array in START.items()})
    assert run("start", other) != one
    assert run("data", start_record(), data="others") != one


def test_a_seed_is_for_simulated_nodes_and_names_the_data(tmp_path):
    with pytest.raises(InputError, match="seed and data go together"):
        wrapped(tmp_path / "run", seed=3)
    with pytest.raises(InputError, match="these nodes are real"):
        wrapped(tmp_path / "run", **SEEDED).start(Grid(app_of([])), start_record())
    assert not (tmp_path / "run").exists()


def test_its_run_goes_on_by_the_app_alone(tmp_path):
    wrapped(tmp_path / "run").start(Grid(app_of([])), start_record(), num_rounds=1)
    with pytest.raises(InputError, match="start that app again"):
        reopen(tmp_path / "run")


def test_a_run_directory_of_other_settings_is_refused(tmp_path):
    grid = Grid(app_of([]))
    wrapped(tmp_path / "run").start(grid, start_record(), num_rounds=1)
    for other in (
        wrapped(tmp_path / "run", FedAdam(eta=0.3)),
        wrapped(tmp_path / "run", privacy=privacy(noise_multiplier=2.0)),
        wrapped(tmp_path / "run", population=NODES + 1),
    ):
        with pytest.raises(InputError, match="other settings"):
            other.start(grid, start_record(), num_rounds=1)
    # The same once more is a run that is finished.
    again = wrapped(tmp_path / "run")
    assert again.start(grid, start_record(), num_rounds=1).train_metrics_clientapp == {}
    assert len(read_ledger(tmp_path / "run" / "ledger.jsonl").releases) == 1


# -------------------------------------------------------------------- what is refused


class OwnStart(FedAvg):
    def start(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError


class OwnMean(FedAvg):
    def aggregate_train(self, server_round, replies):
        return super().aggregate_train(server_round, replies)


class Halved(FedAvg):
    """Only says something else to clients: what it makes of replies is FedAvg's own."""

    def configure_train(self, server_round, arrays, config, grid):
        config["lr"] = 0.5**server_round
        return super().configure_train(server_round, arrays, config, grid)


def test_a_strategy_that_leaves_no_numbers_ends_the_run(tmp_path):
    class Undefined(FedAvg):
        def aggregate_train(self, server_round, replies):
            arrays, metrics = super().aggregate_train(server_round, replies)
            return ArrayRecord({k: Array(v.numpy() * np.nan) for k, v in arrays.items()}), metrics

    strategy = wrapped(tmp_path / "run", Undefined(), mean_only=True)
    with pytest.raises(InputError, match=r"Undefined left numbers .* not finite in round 1"):
        strategy.start(Grid(app_of([])), start_record(), num_rounds=3)
    assert len(read_ledger(tmp_path / "run" / "ledger.jsonl").releases) == 1


@pytest.mark.parametrize(
    ("strategy", "why"),
    [
        (Krum(), "single clients"),
        (FedMedian(), "single clients"),
        (QFedAvg(client_learning_rate=0.1), "no bound"),
        (FedXgbBagging(), "trees"),
        (FlowersWrapper(FedAvg(), 1.0, 0.5, 4), "hand over what it wraps"),
        (OwnMean(), "mean_only=True"),
        (OwnStart(), "start of its own"),
        (FedAvg(fraction_train=0.9), "fraction_train=0.9"),
        (FedAvg(min_train_nodes=3), "min_train_nodes=3"),
        (FedAvg(weighted_by_key="weight"), "every user counts alike"),
        (FedAvg(train_metrics_aggr_fn=lambda r, k: MetricRecord()), "private"),
        (FedAvg(evaluate_metrics_aggr_fn=lambda r, k: MetricRecord()), "private"),
    ],
)
def test_a_strategy_that_would_not_be_obeyed_is_refused_with_the_reason(tmp_path, strategy, why):
    with pytest.raises(InputError, match=why):
        wrapped(tmp_path / "run", strategy)
    assert not (tmp_path / "run").exists()


def test_what_is_as_it_is_drawn_is_no_contradiction(tmp_path):
    wrapped(tmp_path / "a", FedAvg(fraction_train=COHORT / NODES))
    wrapped(tmp_path / "b", OwnMean(), mean_only=True)
    grid = Grid(app_of([]))
    wrapped(tmp_path / "c", Halved()).start(grid, start_record(), num_rounds=2)
    assert {message.content["config"]["lr"] for message in grid.sent} <= {0.5, 0.25}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"sampling": {"kind": "fixed_size", "expected_cohort": 4}}, "sampling.kind: fixed_size"),
        ({"clipping": {"kind": "adaptive", "bound": 0.1}}, "clipping.kind: adaptive"),
        ({"noise_by": "nodes"}, "noise_by: nodes"),
        ({"error_feedback": {"kind": "user"}}, "error_feedback"),
        ({"delta": 0.5}, "below 1/population"),
        ({"sampling": {"kind": "poisson", "expected_cohort": 40}}, "at most the population"),
        ({"noise": 1}, "privacy.noise"),
    ],
)
def test_privacy_that_an_app_cannot_have_is_refused(tmp_path, changes, why):
    with pytest.raises(InputError, match=why):
        wrapped(tmp_path / "run", privacy=privacy(**changes)).start(
            Grid(app_of([])), start_record(), num_rounds=1
        )
    assert not (tmp_path / "run").exists()


def test_arguments_of_start_that_would_not_be_obeyed_are_refused(tmp_path):
    grid, strategy = Grid(app_of([])), wrapped(tmp_path / "run")
    with pytest.raises(InputError, match="evaluate_config"):
        strategy.start(grid, start_record(), evaluate_config=ConfigRecord({"x": 1}))
    counts = ArrayRecord({"n": Array(np.zeros(1, dtype=np.int64))})
    with pytest.raises(InputError, match="initial_arrays: n is int64"):
        strategy.start(grid, counts)


# -------------------------------------------------------------------- what is said


def test_the_report_says_what_is_known_of_an_app_and_no_more(tmp_path):
    def measure(round_: int, arrays: ArrayRecord) -> MetricRecord:
        return MetricRecord({"test_acc": 0.1 * round_, "loss": 1.0})

    strategy = wrapped(tmp_path / "run", FedAdam(), name="mine")
    result = strategy.start(Grid(app_of([])), start_record(), num_rounds=2, evaluate_fn=measure)
    assert sorted(result.evaluate_metrics_serverapp) == [0, 1, 2]
    rows = rows_of(tmp_path / "run")
    assert [row["held_out"]["test_acc"] for row in rows] == [0.1, 0.2]
    assert not any("simulation_only" in row for row in rows)
    from fedpriv.reporting.report import render

    told = render([tmp_path / "run"], "md")
    for sentence in (
        "Each user is a node of a Flower app",
        "server optimizer (FedAdam)",
        "The arrays that the app handed over",
        "what clients measure stays with them",
        "Each round every user is drawn independently with probability q = 4/10 = 0.4.",
        "256 bits from the operating system",
    ):
        assert sentence in told
    assert "Warning" not in told
    for untrue in ("digest of their ids", "lamb", "digits"):
        assert untrue not in told
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert "local:" not in config
    assert "strategy: FedAdam" in config
