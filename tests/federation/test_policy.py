"""What a hostile server, or whoever may submit to it, gets from a node with a policy: nothing.

Each attempt is a message to a node in this process, as Flower's runtime hands it over.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import dp_accounting
import numpy as np
import pytest
import torch
from deployed import asked, context_of, deployed_config, start_of
from dp_accounting.rdp import RdpAccountant
from flwr.app import Array, ArrayRecord, ConfigRecord
from replies import hosting_of, sum_of
from writers import write_writers

from fedpriv.errors import DamagedFile, InputError
from fedpriv.federation import client_app
from fedpriv.federation.gate import reason_in
from fedpriv.federation.grids.base import identify
from fedpriv.federation.messages import OwnNoise, flat_record, query_message, train_message
from fedpriv.federation.node_ledger import Limits, NodeLedger, Participation
from fedpriv.federation.policy import read_policy

COUNTS = {100 + number: 4 for number in range(6)}
POLICY = """
smallest_z: 1.0
largest_bound: 1.0
rounds: 3
data: mnist_writers
population: 100
"""
WITHHELD = "it could not do its part; the reason is in its own log"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_writers(tmp_path_factory.mktemp("users") / "private-name", COUNTS)


@pytest.fixture(scope="module")
def start(folder):
    return start_of(deployed_config(folder))


class Asker:
    """A server that can send whatever it likes to one node."""

    def __init__(self, tmp_path, folder, start, policy=POLICY):
        self.config = deployed_config(folder, local={"lr": 0.1})
        self.folder, self.start = folder, start
        self.policy = tmp_path / "policy.yaml"
        self.policy.write_text(policy)
        self.ledger = tmp_path / "policy.yaml.ledger"
        self.context = context_of(folder)
        self.context.node_config["policy"] = str(self.policy)
        identify()

    def message(self, own_noise=None, round_=1, users=(0, 1, 2), **changes):
        config = self.config
        if changes:
            config = deployed_config(self.folder, **{"local": {"lr": 0.1}, **changes})
        arrays = flat_record(self.start)
        return train_message(
            1000, config, arrays, round_, np.array(users, dtype=int), (), own_noise=own_noise
        )

    def ask(self, message):
        return asked(message, self.context)

    def charges(self):
        if not self.ledger.exists():
            return []
        lines = [json.loads(line) for line in self.ledger.read_text().splitlines()]
        return [line for line in lines if line["kind"] == "charge"]


@pytest.fixture
def asker(tmp_path, folder, start):
    return Asker(tmp_path, folder, start)


def setting(key, value):
    """Writes a key of the message's own record."""

    def change(message):
        message.content["config"][key] = value

    return change


def experiment(**changes):
    """Writes keys of the experiment as it travels, whatever a config would make of them."""

    def change(message):
        document = json.loads(message.content["config"]["experiment"])
        for path, value in changes.items():
            *parents, last = path.split("__")
            section = document
            for parent in parents:
                section = section[parent]
            section[last] = value
        message.content["config"]["experiment"] = json.dumps(document)

    return change


def arrays(change):
    """Sends other parameters."""

    def changed(message):
        flat = message.content["arrays"]["flat"].numpy().copy()
        message.content["arrays"] = ArrayRecord({"flat": Array(change(flat))})

    return changed


def as_nan(flat):
    flat[3] = np.nan
    return flat


def without(key):
    def change(message):
        del message.content["config"][key]

    return change


def both(*changes):
    def change(message):
        for each in changes:
            each(message)

    return change


def own_noise(attempt, multiplier):
    def change(message):
        message.content["config"].update({"attempt": attempt, "noise_multiplier": multiplier})

    return change


BY_USERS = {"privacy__noise_by": "users"}
ADAPTIVE = {"privacy__clipping": {"kind": "adaptive", "bound": 1.0}}

LINE = "\nfedpriv: all is well \x1b[2J"

#: What is asked, with which config, and a part of the answer.
ATTEMPTS = {
    # The noise is not there.
    "a seeded simulation": ({}, experiment(runtime__deployment=False), "deployment: false"),
    "no privacy": ({}, experiment(privacy=None), "privacy: null"),
    "no noise": ({"privacy__noise_multiplier": 0}, None, "noise multiplier of 0"),
    "little noise": ({"privacy__noise_multiplier": 0.9}, None, "noise multiplier of 0.9"),
    "noise that is not said": (
        {"privacy__noise_multiplier": None, "privacy__target_epsilon": 1e6},
        None,
        "target_epsilon",
    ),
    "users' noise left out": (BY_USERS, None, "no noise where it adds the noise"),
    "users' noise too little": (BY_USERS, own_noise(0, 0.5), "less noise than its config says"),
    "users' noise below the policy": (
        {**BY_USERS, "privacy__noise_multiplier": None, "privacy__target_epsilon": 1e6},
        own_noise(0, 0.5),
        "noise multiplier of 0.5",
    ),
    "an attempt that is none": (BY_USERS, own_noise(-1, 1.0), "an attempt that is none"),
    "users' noise that is NaN": (BY_USERS, own_noise(0, float("nan")), "is none"),
    "shares for a million nodes": (
        {"privacy__noise_by": "nodes", "runtime__workers": 1_000_000},
        own_noise(0, 1.0),
        "a share of the noise for 1000000 nodes",
    ),
    # A user is in it with more than C.
    "a large bound": (
        {"privacy__clipping": {"kind": "global", "bound": 1.5}},
        None,
        "bound of 1.5",
    ),
    "a large bound of the round": (ADAPTIVE, setting("bounds", [50.0]), "clip bound of 50"),
    "bounds where none adapt": ({}, setting("bounds", [50.0]), "clip bounds other than"),
    "a bound that users' noise does not follow": (
        BY_USERS,
        both(own_noise(0, 1.0), setting("bounds", [50.0])),
        "clip bounds other than",
    ),
    "a bound that is NaN": (ADAPTIVE, setting("bounds", [float("nan")]), "clip bounds other"),
    "a second payload": (
        {},
        experiment(algorithm={"name": "scaffold", "bounds": {"control": 1.0}}),
        "algorithm.name: scaffold",
    ),
    "a user twice": ({}, setting("users", [1, 2, 1]), "a user twice"),
    # Somebody who is not there, or a place that is counted from the end.
    "a negative user": ({}, setting("users", [-1]), "users that are no numbers"),
    "the last user by two names": ({}, setting("users", [5, -1]), "users that are no numbers"),
    "users that are fractions": ({}, setting("users", [0.5]), "users that are no numbers"),
    "users that are truth values": ({}, setting("users", [True]), "users that are no numbers"),
    "a user whom it does not host": ({}, setting("users", [6]), "users whom it does not host"),
    "another N": ({"data": {"users": 60}}, None, "data.users is 60"),
    "another data set": (
        {},
        experiment(data={"name": "digits", "users": 100, "partition": {"kind": "natural"}}),
        "data.name is digits",
    ),
    "users made up of others' images": (
        {},
        experiment(data__partition={"kind": "iid"}),
        "data.partition.kind: iid",
    ),
    "users who are shares of a speaker": (
        {},
        experiment(data={"name": "fsdd", "users": 100, "partition": {"kind": "iid"}}),
        "data.partition.kind: iid",
    ),
    "a silo's examples": (
        {},
        experiment(
            privacy__unit="example",
            privacy__example={"sampling_rate": 0.5, "silo_size": 4},
            local__steps=2,
        ),
        "privacy.unit",
    ),
    # Files of the node.
    "memories in a folder": ({}, setting("memories", "/etc"), "a message names files"),
    "memories with a journal": (
        {},
        lambda message: message.content["config"].update(
            {"memories": "/tmp", "journal": [1, 0, 0, 5]}
        ),
        "a message names files",
    ),
    "whether there is such a user": ({}, experiment(run_dir="~root/x"), "begins with ~"),
    "whether there is no such user": ({}, experiment(run_dir="~nobody-at-all/x"), "begins with ~"),
    # Whether its data are those that somebody has guessed.
    "a digest of data": ({}, setting("data", "0" * 64), "of a digest"),
    "a cluster's data": ({}, experiment(runtime__ray_address="auto"), "of a digest"),
    # Code.
    "a model from outside": ({}, experiment(model={"name": "os:system"}), "does not import"),
    # Work without end.
    "a million steps": ({"local": {"steps": 1_000_000}}, None, "local.steps is 1000000"),
    "a million epochs": ({"local": {"epochs": 1_000_000}}, None, "local.epochs is 1000000"),
    "batches of a million": ({"local": {"batch_size": 1_000_000}}, None, "batch_size is 1000000"),
    "a million threads": ({"runtime__threads_per_worker": 10**6}, None, "threads_per_worker is"),
    # Parameters that break something.
    "NaN": ({}, arrays(as_nan), "not finite"),
    "too few parameters": ({}, arrays(lambda flat: flat[:-1]), "another type or shape"),
    "parameters of two rows": ({}, arrays(lambda flat: np.stack([flat, flat])), "type or shape"),
    "parameters of float64": ({}, arrays(lambda flat: flat.astype(float)), "type or shape"),
    "parameters that are no numbers": ({}, arrays(lambda flat: np.array(["x"])), None),
    # No message of ours at all.
    "no experiment": ({}, without("experiment"), "holds no experiment"),
    "an experiment that is no JSON": ({}, setting("experiment", "{"), "is no config"),
    "an experiment that is a list": ({}, setting("experiment", "[1]"), "is no config"),
    "an experiment without end": ({}, setting("experiment", "[" * 10**5), "is no config"),
    "a key without end": (
        {},
        setting("experiment", '{"name": ' + "[" * 900 + "]" * 900 + "}"),
        "",
    ),
    "an unknown key": ({}, experiment(back_door=True), "back_door: unknown key"),
    "no record": ({}, lambda message: message.content.pop("config"), "holds no config"),
    "no users": ({}, without("users"), WITHHELD),
    "a round that is none": ({}, setting("round", 0), "a round that is none"),
    "a round beyond the last": ({}, setting("round", 99), "a round that is none"),
    "a round that is true": ({}, setting("round", True), "a round that is none"),
    # A line of its own in the node's log, or the cursor of whoever reads it.
    "a line in the log by a key": ({}, experiment(**{f"x{LINE}": 1}), "unknown key"),
    "a line in the log by a name": ({}, experiment(model={"name": f"a{LINE}:b"}), "not import a"),
    "a line in the log by an option": (
        {},
        experiment(model={"name": "vit", f"dim{LINE}": 3}),
        "unknown key",
    ),
    "a line in the log by a version": (
        {},
        setting("version of fedpriv", f"9{LINE}"),
        "at the server; install one",
    ),
    "a key that fills the log's disk": ({}, experiment(**{"x" * 10**6: 1}), "xxx"),
    # Numbers in which no comparison holds, as JSON has them here.
    "noise that is NaN": ({}, experiment(privacy__noise_multiplier=float("nan")), "finite"),
    "a bound that is infinite": (
        {},
        experiment(privacy__clipping={"kind": "global", "bound": float("inf")}),
        "finite",
    ),
    "a step that is infinite": ({}, experiment(local__lr=float("inf")), "finite"),
    "rates that undo a bound": (
        {},
        experiment(
            local__multipliers={"*": 1e-9},
            privacy__clipping={"kind": "global", "bound": 1.0, "undo": True},
        ),
        "local.multipliers",
    ),
    "a tracker from outside": ({}, experiment(tracker={"name": "os:system"}), "does not import"),
    "a depth without end": (
        {},
        experiment(model={"name": "vit", "depth": 65_536}),
        "model.depth",
    ),
    "no parameters": ({}, lambda message: message.content.pop("arrays"), WITHHELD),
    "another record for parameters": (
        {},
        lambda message: message.content.update({"arrays": ConfigRecord({"flat": 1})}),
        WITHHELD,
    ),
}


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_no_attempt_on_a_node_succeeds(asker, attempt, caplog):
    changes, change, expected = ATTEMPTS[attempt]
    message = asker.message(**changes)
    if change is not None:
        change(message)
    reply = asker.ask(message)
    reason = reason_in(reply)
    assert reason is not None
    assert expected is None or expected in reason
    assert set(reply.content) == {"failure"}
    assert reason.isprintable()
    assert len(reason) < 600
    assert "private-name" not in reason
    assert not asker.charges()
    told = [record.getMessage() for record in caplog.records]  # the node's own log
    assert any(line.startswith("fedpriv: ") for line in told)
    assert all(line.isprintable() and len(line) < 700 for line in told)


def test_what_the_policy_allows_is_done_and_charged(asker):
    assert hosting_of(asker.ask(query_message(1000, asker.config))).users == 6
    assert not asker.charges()
    _, summed = sum_of(asker.ask(asker.message()))
    assert summed.users == 3
    (charge,) = asker.charges()
    assert (charge["noise_multiplier"], charge["bound"], len(charge["users"])) == (1.0, 1.0, 3)
    assert asker.ledger.stat().st_mode & 0o777 == 0o600
    assert "writer-" not in asker.ledger.read_text()


@pytest.mark.parametrize("kind", ["query", "train"])
def test_a_question_is_held_against_the_policy_like_work(asker, kind):
    message = asker.message() if kind == "train" else query_message(1000, asker.config)
    experiment(privacy=None)(message)
    assert "privacy: null" in reason_in(asker.ask(message))


def test_nothing_is_used_of_what_is_refused(asker, monkeypatch):
    def used(*args):
        raise AssertionError("used")

    monkeypatch.setattr(client_app, "_trainer", used)
    reply = asker.ask(asker.message(privacy__noise_multiplier=0.5))
    assert "noise multiplier" in reason_in(reply)


def test_a_user_takes_part_in_as_many_rounds_as_allowed_whatever_the_runs(asker):
    for run, users in enumerate([(0, 1), (0, 1), (0,)]):
        asker.context.run_id = run
        client_app._TRAINERS.__init__()  # a node's process ends with its message
        assert reason_in(asker.ask(asker.message(users=users))) is None
    reply = asker.ask(asker.message(users=(0,), round_=4))
    assert reason_in(reply) == "refused: its users take part in no more, by their rounds or ε"
    # Who may not is left out alone: the others take part.
    assert sum_of(asker.ask(asker.message(users=(0, 1, 2))))[1].users == 2
    assert [len(charge["users"]) for charge in asker.charges()] == [2, 2, 1, 2]


def test_a_round_that_is_asked_twice_counts_twice(asker):
    for users in [(0, 1, 2), (0, 1), (0,)]:  # the differences of sums are single users
        assert reason_in(asker.ask(asker.message(users=users))) is None
    assert "take part in no more" in reason_in(asker.ask(asker.message(users=(0,))))


@pytest.mark.parametrize(("adjacency", "multiplier"), [("zero_out", 2.0), ("replace_one", 1.0)])
def test_epsilon_of_a_user_is_that_of_unsampled_gaussians(
    tmp_path, folder, start, adjacency, multiplier
):
    def by_dp_accounting(rounds):
        accountant = RdpAccountant()
        accountant.compose(dp_accounting.GaussianDpEvent(multiplier), rounds)
        return accountant.get_epsilon(1e-3)

    between = (by_dp_accounting(2) + by_dp_accounting(3)) / 2
    policy = POLICY.replace("rounds: 3", "rounds: 99") + (
        f"epsilon: {between}\ndelta: 1.0e-3\nadjacency: {adjacency}\n"
    )
    asker = Asker(tmp_path, folder, start, policy)
    answers = [
        reason_in(asker.ask(asker.message(privacy__noise_multiplier=2.0, round_=round_)))
        for round_ in (1, 2, 3)
    ]
    assert answers[:2] == [None, None]
    assert "by their rounds or ε" in answers[2]


def test_noise_of_several_strengths_adds_up():
    limits = Limits(rounds=100, epsilon=3.0, delta=1e-5)
    past = {Participation(2.0): 3, Participation(4.0): 2}
    accountant = RdpAccountant()
    for each, times in {**past, Participation(2.0): 4}.items():
        accountant.compose(dp_accounting.GaussianDpEvent(each.noise_multiplier), times)
    epsilon = float(accountant.get_epsilon(1e-5))
    for allowed, factor in ((True, 1.0001), (False, 0.9999)):
        held = replace(limits, epsilon=epsilon * factor)
        assert held.allow(past, Participation(2.0)) is allowed


def test_a_charge_is_on_the_disk_before_anybody_is_trained(asker, monkeypatch):
    def killed(*args, **kwargs):
        raise SystemExit("killed")

    monkeypatch.setattr(client_app, "train_cohort", killed)
    with pytest.raises(SystemExit):
        asker.ask(asker.message())
    assert len(asker.charges()) == 1


def test_what_cannot_be_charged_is_not_trained(asker, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedpriv.federation.node_ledger.os.fsync", full)
    monkeypatch.setattr(client_app, "train_cohort", lambda *args: pytest.fail("trained"))
    assert reason_in(asker.ask(asker.message())) == WITHHELD


def test_a_torn_line_charges_nobody_and_an_edited_one_stops_the_node(tmp_path):
    ledger, limits = NodeLedger(tmp_path / "ledger"), Limits(rounds=2)
    charge = Participation(1.0)
    assert ledger.charge(["a", "b"], charge, limits, round=1) == [0, 1]
    whole = ledger.path.read_bytes()
    ledger.path.write_bytes(whole + b'{"kind": "charge", "users"')
    assert ledger.charge(["b", "a"], charge, limits, round=2) == [0, 1]
    assert ledger.charge(["b", "c"], charge, limits, round=3) == [1]
    for edited in (
        ledger.path.read_text().replace('"round": 2', '"round": 9'),
        "".join(line for i, line in enumerate(ledger.path.open()) if i != 1),
        "{}\n",
    ):
        ledger.path.write_text(edited)
        with pytest.raises(DamagedFile):
            ledger.charge(["a"], charge, limits)
    ledger.path.write_bytes(whole)
    with pytest.raises(DamagedFile, match="charges each example"):
        NodeLedger(ledger.path, "example").charge(["a"], charge, limits)


def test_messages_that_are_answered_at_once_spend_no_more_than_is_allowed(tmp_path):
    ledger, limits = tmp_path / "ledger", Limits(rounds=5)

    def charged(number):
        return NodeLedger(ledger).charge(["a"], Participation(1.0), limits, round=number)

    with ThreadPoolExecutor(8) as threads:
        assert sum(map(len, threads.map(charged, range(16)))) == 5


def test_components_are_those_of_the_policy(tmp_path, folder, start):
    asker = Asker(tmp_path, folder, start, POLICY + "components: [mine:cnn]\n")
    asker.context.node_config["components"] = "os:system"
    message = asker.message()
    experiment(model={"name": "os:system"})(message)
    assert "does not import os:system" in reason_in(asker.ask(message))
    experiment(model={"name": "mine:cnn"})(message)
    assert "no module mine" in reason_in(asker.ask(message))


def test_the_folder_of_the_policy_is_the_one_that_is_read(tmp_path, folder, start):
    other = write_writers(tmp_path / "other", {500: 4, 501: 4})
    asker = Asker(tmp_path, folder, start, POLICY + f"data_path: {other}\n")
    assert hosting_of(asker.ask(query_message(1000, asker.config))).users == 2


def test_a_policy_may_demand_that_noise_is_there_when_a_sum_leaves(tmp_path, folder, start):
    asker = Asker(tmp_path, folder, start, POLICY + "noise_by: [users]\n")
    assert "noise by server" in reason_in(asker.ask(asker.message()))
    noisy = asker.message(**BY_USERS, own_noise=OwnNoise(0, 1.0))
    assert sum_of(asker.ask(noisy))[1].total.norm() > 10


def test_a_path_that_a_server_names_is_not_followed(tmp_path, folder, start):
    """A config's own paths are the server's, and stand in every honest message."""
    theirs = write_writers(tmp_path / "theirs", {500: 4, 501: 4})
    (theirs / "their_module.py").write_text("raise AssertionError('imported')")
    (theirs / "seed.safetensors").write_text("no seed model")
    asker = Asker(tmp_path, folder, start, POLICY + "components: [their_module:cnn]\n")
    honest = {
        "run_dir": str(theirs),
        "code": str(theirs),
        "seed_model": {"path": str(theirs / "seed.safetensors")},
        "data": {"path": str(theirs)},
    }
    before = sorted(theirs.iterdir())
    assert sum_of(asker.ask(asker.message(users=range(6), **honest)))[1].users == 6
    message = asker.message(**honest)
    experiment(model={"name": "their_module:cnn"})(message)
    assert "there is no module their_module" in reason_in(asker.ask(message))
    assert sorted(theirs.iterdir()) == before


def test_another_file_of_a_config_is_refused(asker):
    """Such as the alphabet of speech data, which a data set would read."""
    document = json.loads(asker.config.model_dump_json())
    document["data"] = {"name": "librispeech", "users": 100, "speech": {"alphabet": "/etc/passwd"}}
    message = query_message(1000, asker.config)
    message.content["config"]["experiment"] = json.dumps(
        document | {"model": {"name": "speech"}, "task": {"name": "recognition"}}
    )
    assert "data.speech.alphabet names a file" in reason_in(asker.ask(message))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (experiment(runtime__deployment=False), "deployment: false"),
        (setting("users", [1, 1]), "a user twice"),
        (setting("users", [-1]), "users that are no numbers"),
        (setting("bounds", [9.0]), "clip bounds other than"),
        (setting("data", "0" * 64), "of a digest"),
        (own_noise(0, 1.0), "noise that its config does not have"),
        (ATTEMPTS["memories with a journal"][1], "a message names files"),
        (arrays(as_nan), "not finite"),
    ],
)
def test_what_no_server_needs_is_refused_without_a_policy_too(asker, change, expected):
    del asker.context.node_config["policy"]
    assert reason_in(asker.ask(asker.message())) is None
    message = asker.message()
    change(message)
    assert expected in reason_in(asker.ask(message))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("smallest_z: 1\nrounds: 3\n", "largest_bound: Field required"),
        (POLICY + "epsilom: 3\n", "epsilom: unknown key; did you mean epsilon?"),
        (POLICY + "epsilon: 3\n", "epsilon and delta go together"),
        (POLICY + "unit: example\n", "unit: example and noise_by"),
        (POLICY + "limits: {step: 3}\n", "limits.step: unknown key; did you mean steps?"),
        (POLICY.replace("smallest_z: 1.0", "smallest_z: 0"), "smallest_z: Input should be"),
        ("[", "not valid YAML"),
        ("- 3", "a policy is a mapping of keys, such as 'smallest_z: 1.0'"),
        (None, "cannot read the policy (No such file or directory)"),
    ],
)
def test_what_is_wrong_with_a_policy_is_one_line_and_stops_the_node(asker, text, expected, caplog):
    if text is None:
        asker.policy.unlink()
    else:
        asker.policy.write_text(text)
    with pytest.raises(InputError) as wrong:
        read_policy(asker.policy)
    assert str(wrong.value).startswith(f"{asker.policy}: ")
    assert expected in str(wrong.value)
    assert "\n" not in str(wrong.value)
    assert reason_in(asker.ask(asker.message())) == WITHHELD
    assert expected in caplog.text


def test_the_policy_of_the_docs_is_one(tmp_path):
    page = Path(__file__).parents[2] / "docs" / "deployment.md"
    shown = page.read_text(encoding="utf-8").split("```yaml\n")[1].split("```")[0]
    (tmp_path / "policy.yaml").write_text(shown)
    policy = read_policy(tmp_path / "policy.yaml")
    assert (policy.noise_by, policy.rounds, policy.population) == (("users",), 200, 3000)


def test_the_environment_names_a_policy_too(asker, monkeypatch):
    del asker.context.node_config["policy"]
    monkeypatch.setenv("FEDPRIV_POLICY", str(asker.policy))
    reply = asker.ask(asker.message(privacy__noise_multiplier=0.5))
    assert "noise multiplier" in reason_in(reply)


def test_parameters_of_bfloat16_are_parameters(asker):
    message = asker.message()
    message.content["arrays"] = flat_record(asker.start, torch.bfloat16)
    assert reason_in(asker.ask(message)) is None
