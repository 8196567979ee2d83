"""What `fedpriv deploy prepare` writes: each machine's part, and no more than that."""

import socket
import ssl
import threading
import time
from contextlib import contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from cryptography.x509.verification import PolicyBuilder, Store
from in_process import small_config
from scipy.stats import binom
from typer.testing import CliRunner

from fedpriv.cli import app
from fedpriv.config_files import load_config
from fedpriv.data.registry import build_dataset
from fedpriv.deploy import check
from fedpriv.deploy.check import NodeCheck
from fedpriv.deploy.keys import Authority
from fedpriv.deploy.prepare import Wanted, compose_file, largest_share, prepare_deployment
from fedpriv.errors import InputError
from fedpriv.federation.policy import NodePolicy, NotAllowed, read_policy
from fedpriv.held_out import read_held_out
from fedpriv.preparation import plan_for, ready_trainer
from fedpriv.reporting import terminal

ROOT = Path(__file__).parents[2]
NODES = 3


@pytest.fixture(scope="module")
def config():
    return small_config()


@pytest.fixture(scope="module")
def folder(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("deploy") / "out"
    prepare_deployment(config, Wanted(NODES, out, hosts=("example.org", "10.1.2.3")), print)
    return out


def names_of(folder):
    return {path.name for path in (folder / "data" / "users").iterdir()}


def test_every_user_is_at_one_node_and_the_server_has_none(config, folder):
    dealt = [names_of(folder / "nodes" / str(node)) for node in range(NODES)]
    dataset = build_dataset(config.data, config.seed)
    assert sum(map(len, dealt)) == dataset.population == len(set().union(*dealt))
    server = folder / "server"
    assert {path.name for path in server.iterdir()} == {"experiment.yaml", "held_out.safetensors"}
    found, measured = (
        next(each.evaluation())
        for each in (read_held_out(server / "held_out.safetensors", "user_files"), dataset)
    )
    assert found.inputs.equal(measured.inputs)
    assert found.targets.equal(measured.targets)
    assert not list(folder.glob("nodes/*/data/held_out*"))


def test_the_experiment_is_a_deployment_that_the_policies_allow(config, folder):
    experiment = load_config(folder / "server" / "experiment.yaml")
    assert experiment.runtime.deployment
    assert experiment.data.users == build_dataset(config.data, config.seed).population
    for node in range(NODES):
        policy = read_policy(folder / "nodes" / str(node) / "policy.yaml")
        policy.check(experiment, NODES)
        weaker = experiment.privacy.model_copy(
            update={"noise_multiplier": policy.smallest_z * 0.999}
        )
        with pytest.raises(NotAllowed, match="noise multiplier"):
            policy.check(experiment.model_copy(update={"privacy": weaker}), NODES)


POISSON = {"kind": "poisson", "expected_cohort": 2}
CASES = {
    "coins": ({"privacy__sampling": POISSON}, 0.1, 200),
    "a fixed number": (
        {"privacy__sampling": {"kind": "fixed_size", "expected_cohort": 2}},
        0.1,
        200,
    ),
    "groups": (
        {
            "privacy__sampling": POISSON,
            "privacy__mechanism": {"kind": "correlated", "bands": 4},
        },
        0.4,
        50,
    ),
}


@pytest.mark.parametrize(("changes", "chance", "tosses"), CASES.values(), ids=CASES)
def test_a_policy_allows_a_user_the_rounds_that_chance_can_give_it(changes, chance, tosses):
    config = small_config(rounds=200, data={"name": "digits", "users": 20}, **changes)
    ready, trainer = ready_trainer(config)
    share = largest_share(plan_for(ready, trainer))
    expected = binom.isf(1e-9 / 20, tosses, chance) + config.runtime.retries
    assert policy_with(share).users_may(200).in_run == expected < 200


def test_a_policy_allows_all_rounds_where_any_user_may_be_drawn_for_all(config, folder):
    for changes in ({"rounds": 3}, {"rounds": 50, "privacy__sampling": {"kind": "all"}}):
        ready, trainer = ready_trainer(small_config(**changes))
        assert largest_share(plan_for(ready, trainer)) is None
    policy = read_policy(folder / "nodes" / "0" / "policy.yaml")
    assert policy.users_may(config.rounds).in_run in (None, config.rounds)


def policy_with(share):
    return NodePolicy(smallest_z=1.0, largest_bound=1.0, rounds=999, share=share)


def certificate(path):
    return x509.load_pem_x509_certificates(path.read_bytes())[0]


def test_certificates_hold_for_the_names_that_were_asked_for_and_no_others(folder):
    authority = certificate(folder / "keys" / "submit" / "ca.crt")
    verifier = PolicyBuilder().store(Store([authority]))
    hosts = {"gateway.pem": ["gateway", "example.org"], "superlink.crt": ["superlink"]}
    for file, names in hosts.items():
        shown = certificate(next(folder.glob(f"keys/*/{file}")))
        for name in names:
            verifier.build_server_verifier(x509.DNSName(name)).verify(shown, [])
        with pytest.raises(x509.verification.VerificationError):
            verifier.build_server_verifier(x509.DNSName("other.org")).verify(shown, [])


def test_each_node_has_a_key_of_its_own_that_nobody_else_can_read(folder):
    publics = set()
    for node in range(NODES):
        private = folder / "nodes" / str(node) / "keys" / "node"
        assert private.stat().st_mode & 0o077 == 0
        key = load_ssh_private_key(private.read_bytes(), None)
        public = (folder / "keys" / "submit" / f"node-{node}.pub").read_bytes()
        numbers = key.public_key().public_bytes(*_openssh())
        assert public.strip() == numbers
        publics.add(public)
    assert len(publics) == NODES
    for secret in ("superlink/superlink.key", "gateway/gateway.pem"):
        assert (folder / "keys" / secret).stat().st_mode & 0o077 == 0


def _openssh():
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return Encoding.OpenSSH, PublicFormat.OpenSSH


def test_containers_mount_only_what_is_theirs(folder):
    for name in ("compose.yaml", "compose.tls.yaml"):
        services = yaml.safe_load((folder / name).read_text())["services"]
        for service, about in services.items():
            mounts = [each.split(":")[0] for each in about.get("volumes", ())]
            if service.startswith("node-"):
                own = f"./nodes/{service.removeprefix('node-')}/"
                assert all(mount.startswith(own) for mount in mounts)
            else:
                assert not any(mount.startswith("./nodes") for mount in mounts)
            for mount in mounts:
                assert mount == "state" or (folder / mount).exists()
    networks = yaml.safe_load((folder / "compose.yaml").read_text())["networks"]
    assert all(about["internal"] for about in networks.values())


def test_a_node_is_started_again_however_it_has_ended(folder):
    """One that is not known, or whose clock is off, ends with exit code 0."""
    services = yaml.safe_load((folder / "compose.yaml").read_text())["services"]
    nodes = [service for name, service in services.items() if name.startswith("node-")]
    assert [node["restart"] for node in nodes] == ["unless-stopped"] * NODES


def test_the_repository_has_the_files_of_three_nodes():
    for name in ("compose.yaml", "compose.tls.yaml"):
        text = compose_file(name, {"nodes": 3, "mib_per_minute": 64})
        assert (ROOT / "docker" / name).read_text() == text


def test_nothing_is_overwritten_and_nothing_half_done_stays(config, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="is there already"):
        prepare_deployment(config, Wanted(2, tmp_path / "there"), print)
    with pytest.raises(InputError, match="--nodes"):
        prepare_deployment(config, Wanted(10_000, tmp_path / "new"), print)
    with pytest.raises(InputError, match="--days"):
        prepare_deployment(config, Wanted(2, tmp_path / "new", days=0), print)
    with pytest.raises(InputError, match="--host"):
        prepare_deployment(config, Wanted(2, tmp_path / "new", hosts=("a b",)), print)
    with pytest.raises(InputError, match="without privacy"):
        prepare_deployment(small_config(privacy=None), Wanted(2, tmp_path / "new"), print)

    def broken(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_deployment(config, Wanted(2, tmp_path / "new"), broken)
    assert not (tmp_path / "new").exists()


def checked(folder, tmp_path, node=0, edit=lambda text: text, **changes):
    """What `node check` finds at a node whose paths are those of this machine."""
    own = folder / "nodes" / str(node)
    policy = (own / "policy.yaml").read_text()
    policy = policy.replace("data_path: /data", f"data_path: {own / 'data'}")
    policy = policy.replace("/state/node.ledger", str(tmp_path / "node.ledger"))
    (tmp_path / "policy.yaml").write_text(edit(policy))
    experiment = folder / "server" / "experiment.yaml"
    found = NodeCheck(experiment, tmp_path / "policy.yaml", nodes=NODES, **changes).findings()
    return {each.about: each for each in found}


def test_a_node_that_can_serve_is_told_so(folder, tmp_path):
    found = checked(folder, tmp_path, root_certificates=folder / "keys" / "submit" / "ca.crt")
    assert all(each.good for each in found.values()), found
    assert set(found) == {"policy", "experiment", "data", "model", "ledger", "disk", "certificate"}


def test_what_is_wrong_with_a_node_is_said(folder, tmp_path):
    stricter = checked(
        folder, tmp_path, edit=lambda text: text.replace("smallest_z: ", "smallest_z: 9")
    )
    assert not stricter["experiment"].good
    empty = checked(
        folder, tmp_path, edit=lambda text: text.replace(str(folder / "nodes" / "0"), "/no")
    )
    assert not empty["data"].good
    (tmp_path / "node.ledger").write_text("edited\n")
    assert not checked(folder, tmp_path)["ledger"].good
    no_link = checked(folder, tmp_path, superlink="127.0.0.1:1")
    assert "no answer" in no_link["link"].sentence
    bad_port = checked(folder, tmp_path, superlink="127.0.0.1")
    assert "host:port" in bad_port["link"].sentence


@contextmanager
def answering(late=0, certificate=None):
    """Something that answers on a port as a SuperLink does, whose clock is `late` by so much."""

    class Refusing(BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_error(401)

        def date_time_string(self, timestamp=None):
            return super().date_time_string(time.time() - late)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("late", "said"),
    [(0, "answers without TLS"), (60, "s ahead of the SuperLink's"), (-60, "answers"),
     (-900, "s behind the SuperLink's")],
)  # fmt: skip
def test_a_clock_that_the_superlink_would_not_believe_is_told(folder, tmp_path, late, said):
    with answering(late) as superlink:
        link = checked(folder, tmp_path, superlink=superlink)["link"]
    assert said in link.sentence
    assert link.good == ("answers" in said)


def test_an_address_at_which_something_else_answers_is_told(folder, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet():
            peer, _ = server.accept()
            peer.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
            peer.recv(2**16)
            peer.close()

        threading.Thread(target=greet, daemon=True).start()
        superlink = f"127.0.0.1:{server.getsockname()[1]}"
        link = checked(folder, tmp_path, superlink=superlink)["link"]
    assert "something else answers there" in link.sentence


@pytest.mark.parametrize(("days", "said"), [(1, "answers with TLSv1.3"), (0, "has expired")])
def test_a_certificate_of_the_superlink_that_has_ended_is_told(folder, tmp_path, days, said):
    authority = Authority.made(1)
    (tmp_path / "ca.crt").write_bytes(authority.pem)
    (tmp_path / "gateway.pem").write_bytes(b"".join(authority.issue(("127.0.0.1",), days)))
    changes = {"root_certificates": tmp_path / "ca.crt"}
    with answering(certificate=tmp_path / "gateway.pem") as superlink:
        link = checked(folder, tmp_path, superlink=superlink, **changes)["link"]
    assert said in link.sentence


def test_the_commands_end_with_the_code_of_bad_input(folder, tmp_path):
    runner = CliRunner()
    policy = tmp_path / "policy.yaml"
    policy.write_text("rounds: 1\n")
    experiment = folder / "server" / "experiment.yaml"
    asked = ["node", "check", str(experiment), "--policy", str(policy)]
    result = runner.invoke(app, asked)
    assert isinstance(result.exception, InputError)
    assert "policy      BAD" in result.output


def test_an_authority_that_has_ended_is_told(folder, tmp_path, monkeypatch):
    old = tmp_path / "old.crt"
    backdated = Authority.made(1).certificate.not_valid_after_utc
    old.write_bytes(Authority.made(1).pem)

    class Later:
        @staticmethod
        def now(_):
            return backdated + timedelta(days=3)

    monkeypatch.setattr(check, "datetime", Later)
    found = checked(folder, tmp_path, root_certificates=old)["certificate"]
    assert not found.good
    assert "ended on" in found.sentence


def test_where_there_is_no_terminal_each_stage_is_a_line_beside_the_result(
    config, folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(terminal, "_SHORT", 0.0)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    out = tmp_path / "new"
    made = CliRunner().invoke(
        app, ["deploy", "prepare", str(tmp_path / "config.yaml"), "--out", out]
    )
    assert made.stdout.splitlines() == [f"{out}: ready; next: cd {out} && docker compose up -d"]
    first, *parts = made.stderr.splitlines()
    assert first == "reading the data and computing ε"
    assert [each.partition(":")[0] for each in parts[:4]] == [
        "server/",
        *(f"nodes/{node}/" for node in range(NODES)),
    ]
    (tmp_path / "policy.yaml").write_text((out / "nodes" / "0" / "policy.yaml").read_text())
    experiment = str(out / "server" / "experiment.yaml")
    policy = str(tmp_path / "policy.yaml")
    asked = CliRunner().invoke(app, ["node", "check", experiment, "--policy", policy])
    assert asked.stdout.split()[0] == "policy"
    assert "checking: data …" in asked.stderr.splitlines()
