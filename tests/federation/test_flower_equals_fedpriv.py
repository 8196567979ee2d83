"""An app under PrivateStrategy and `fedpriv run`, where both do the same, from one seed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flower_apps import node_of
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, FedAvgM, Result
from in_process import InProcessGrid, Silent, drive_on, small_config

from fedpriv import experiment
from fedpriv.config import ExperimentConfig
from fedpriv.federation.grids.local import LocalGrid
from fedpriv.flower import PrivateStrategy, clipping_mod
from fedpriv.privacy.ledger import read_ledger
from fedpriv.privacy.randomness import Purpose, Randomness, id_words
from fedpriv.training.local import batches

USERS, SEED = 20, 5
PRIVACY = {
    "delta": 1e-3,
    "noise_multiplier": 1.0,
    "sampling": {"kind": "poisson", "expected_cohort": 8},
    "clipping": {"kind": "per_layer", "bound": 0.1, "split": "dim"},
    "accountants": ["rdp"],
}


def config_of(folder: Path, server: dict[str, Any]) -> ExperimentConfig:
    return small_config(
        rounds=3,
        run_dir=str(folder),
        data__users=USERS,
        server={"optimizer": "sgd", **server},
        privacy=PRIVACY,
        runtime={"workers": USERS, "grid": "local", "engine": "sequential"},
        evaluation__every=3,
    )


def plain_app(prepared: experiment.Experiment) -> ClientApp:
    """Local SGD in plain PyTorch on the same users, who meet their examples in the same order."""
    trainer = prepared.trainer
    dataset, model, recipe = trainer.dataset, trainer.model, trainer.recipe
    app = ClientApp(mods=[clipping_mod])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        user = int(context.node_config["partition-id"])
        round_ = int(message.content["config"]["server-round"])
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        sgd = torch.optim.SGD(model.parameters(), lr=recipe.lr)
        examples = dataset.user(user)
        source = Randomness.simulation(SEED)
        own = source.torch(Purpose.LOCAL_TRAINING, round_, 0, *id_words(f"user-{user}"))
        shared = source.torch(Purpose.STEP_ORDER, round_)
        for index in batches(examples.sizes, recipe, own, shared):
            sgd.zero_grad()
            F.cross_entropy(model(examples.inputs[index]), examples.targets[index]).backward()
            sgd.step()
        content = RecordDict({"arrays": ArrayRecord(model.state_dict())})
        content["metrics"] = MetricRecord({"num-examples": len(examples)})
        return Message(content, reply_to=message)

    return app


@pytest.mark.parametrize(
    ("strategy", "server", "bits"),
    [
        (FedAvg(), {"lr": 1.0}, True),
        (
            FedAvgM(server_learning_rate=0.5, server_momentum=0.9),
            {"lr": 0.5, "options": {"momentum": 0.9}},
            False,
        ),
    ],
    ids=["FedAvg", "FedAvgM"],
)
def test_an_app_releases_what_fedpriv_run_does(tmp_path, strategy, server, bits):
    """The ledgers have one digest a round, of all that was released.

    FedAvgM takes its step from the difference of two models, which rounds where the mean did not:
    the second release is of another model, in the last bits.
    """
    prepared = experiment.prepare(config_of(tmp_path / "run", server))
    wrapped = PrivateStrategy(
        strategy,
        population=USERS,
        privacy=PRIVACY,
        run_dir=tmp_path / "app",
        seed=SEED,
        data="digits",
    )
    start = ArrayRecord(prepared.trainer.model.state_dict())
    grid = LocalGrid(USERS, node_of(plain_app(prepared)), threads=1)
    result: Result = wrapped.start(grid, start, num_rounds=3)

    there = read_ledger(tmp_path / "app" / "ledger.jsonl")
    source = Randomness.simulation(SEED, there.header.fingerprint)
    again = experiment.prepare(config_of(tmp_path / "run", server))
    again.plan = replace(again.plan, randomness=source)  # cohorts and noise of the app
    directory = experiment.create(again)
    experiment.train(again, directory, Silent(), drive_on(InProcessGrid(USERS)))
    here = read_ledger(directory.ledger)
    assert [r.event() for r in here.releases] == [r.event() for r in there.releases]
    same = [r.digest == s.digest for r, s in zip(here.releases, there.releases, strict=True)]
    assert same[0]
    assert all(same) or not bits
    end = again.trainer.model.state_dict()
    for name, array in result.arrays.items():
        found, most = torch.from_numpy(array.numpy().copy()), 0 if bits else 1e-6
        torch.testing.assert_close(found, end[name], rtol=0, atol=most)
