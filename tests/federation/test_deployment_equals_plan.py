"""A deployment does what its plan says, and what a simulation does that draws the same numbers."""

import pytest
from deployed import COUNTS, Deployed, deployed_config, three_nodes, trained
from in_process import InProcessGrid, Silent, drive_on
from writers import write_writers

from fedpriv import experiment
from fedpriv.federation import client_app
from fedpriv.privacy import Ledger, Randomness, RdpAccountant

ROUNDS = 4
#: A node has places in a row and a simulation deals users out in turn: where there are several
#: nodes, who is drawn can be compared if everybody is.
ONE_NODE = {"privacy__sampling": {"kind": "poisson", "expected_cohort": 5}}
THREE_NODES = {"privacy__sampling": {"kind": "all"}}
KINDS = {
    "one node, noise by the server": (1, ONE_NODE),
    "one node, bounds that adapt": (
        1,
        {**ONE_NODE, "privacy__clipping": {"kind": "adaptive", "bound": 0.1}},
    ),
    "three nodes, noise by the server": (3, THREE_NODES),
    "three nodes, noise by nodes": (3, {**THREE_NODES, "privacy__noise_by": "nodes"}),
    "three nodes, noise by users": (3, {**THREE_NODES, "privacy__noise_by": "users"}),
}


@pytest.fixture
def one_source(monkeypatch):
    """What draws in a deployment and in a simulation: the same numbers."""
    source = Randomness(7, reproducible=False)
    monkeypatch.setattr(Randomness, "operating_system", lambda: source)
    monkeypatch.setattr(Randomness, "simulation", lambda seed, run="": source)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_those_of_a_simulation_to_the_bit_and_costs_those_of_the_plan(
    tmp_path, one_source, kind
):
    nodes, changes = KINDS[kind]
    whole = write_writers(tmp_path / "all", COUNTS)
    folders = [whole] if nodes == 1 else three_nodes(tmp_path)
    changes = {"rounds": ROUNDS, "local": {"epochs": 2, "batch_size": 2, "lr": 0.5}, **changes}

    def config(deployment):
        runtime = {"workers": nodes, "deployment": deployment, "device": "cpu"}
        runtime["engine"] = "sequential"  # as a deployment's always is
        made = deployed_config(whole, data={"users": 12}, runtime=runtime, **changes)
        return made.model_copy(update={"run_dir": tmp_path / str(deployment)})

    trained(config(True), Deployed(folders), Silent())
    client_app._TRAINERS.__init__()
    prepared = experiment.prepare(config(False))
    grid = InProcessGrid(nodes)
    experiment.train(prepared, experiment.create(prepared), Silent(), drive_on(grid))

    (_, deployed), (_, simulated) = map(experiment.reopen, (tmp_path / "True", tmp_path / "False"))
    assert deployed.server.parameters().equal(simulated.server.parameters())
    start = experiment.prepare(config(True)).server.parameters()
    assert not deployed.server.parameters().equal(start)
    assert deployed.bounds == simulated.bounds
    ledgers = [Ledger.open(tmp_path / kind / "ledger.jsonl") for kind in ("True", "False")]
    charged = [[(r.round, r.attempt, r.event(), r.users) for r in ledger] for ledger in ledgers]
    assert charged[0] == charged[1]

    plan = deployed.plan
    assert len(ledgers[0]) == ROUNDS
    accountant = RdpAccountant(plan.adjacency)
    for release in ledgers[0]:
        accountant.compose(release.event())
    assert accountant.epsilon(plan.delta) == pytest.approx(plan.planned_cost().epsilon, rel=1e-9)
