"""A federation of containers: it trains, it keeps its books, and it lets in only who belongs to it.

`docker/test.sh` runs this, with an engine and images. It is a stage of its own: some minutes.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from federation import ROOT, Federation, number_in

from fedpriv.deploy.keys import Authority, node_keys
from fedpriv.federation.node_ledger import NodeLedger

HERE = Path(__file__).parent
ROUNDS = 2


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    """Two nodes with TLS and keys, and one run of two rounds."""
    laid = Federation.prepared(tmp_path_factory.mktemp("f") / "tls", 2, ROUNDS, tls=True)
    try:
        laid.start()
        yield laid
    finally:
        laid.stop()


@pytest.fixture(scope="module")
def run(federation):
    number = federation.submit()
    assert federation.finished(number) == "finished:completed", federation.logs("superlink")
    return number


def test_every_round_is_released_once_and_costs_what_was_planned(federation, run):
    metrics = federation.lines("metrics.jsonl")
    ledger = federation.lines("ledger.jsonl")
    releases = [line for line in ledger if line.get("kind") == "release"]
    assert [row["round"] for row in metrics] == [1, ROUNDS]
    assert all(row["nodes_lost"] == 0 for row in metrics)
    assert len(releases) == ROUNDS
    assert metrics[-1]["epsilon"]["pld"] == pytest.approx(8.0, abs=1e-3)
    assert ledger[0]["mode"] == "deployment"


def test_each_node_has_charged_its_own_users(federation, run):
    for node in range(2):
        ledger = NodeLedger(federation.folder / "nodes" / str(node) / "state" / "node.ledger")
        assert 1 <= ledger.check() <= ROUNDS


def test_state_is_for_its_owner_alone_and_no_port_is_published(federation):
    modes = federation.compose("exec", "-T", "superlink", "sh", "-c", "stat -c %a /state/*")
    assert set(modes.split()) == {"600"}
    assert "->" not in federation.compose("ps", "--format", "{{.Ports}}")


def as_node(federation, name, *, keys=None, command=None, **about):
    """Write an override that changes node 1, and return the options that use it."""
    service = {**about}
    if keys is not None:
        service["volumes"] = [f"{keys}:/run/keys:ro", *about.get("volumes", ())]
    if command is not None:
        service["command"] = command
    path = federation.folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"services": {"node-1": service}}))
    return ("-f", "compose.yaml", "-f", "compose.tls.yaml", "-f", path.name)


def with_keys(federation, name, private=None, certificate=None):
    """Copy node 1's keys, with another private key or another authority."""
    folder = federation.folder / f"keys-{name}"
    shutil.copytree(federation.folder / "nodes" / "1" / "keys", folder)
    if private is not None:
        (folder / "node").write_bytes(private)
    if certificate is not None:
        (folder / "ca.crt").write_bytes(certificate)
    folder.chmod(0o755)
    for path in folder.iterdir():
        path.chmod(0o644)
    return folder


def ran_once(federation, options):
    """Run node 1 as the override says, for a while, and return what it said."""
    done = federation.tried(
        *options, "run", "--rm", "--no-deps", "--entrypoint", "timeout", "node-1", "20",
        "flower-supernode", "--superlink=gateway:8000", "--root-certificates=/run/keys/ca.crt",
        "--node-config=partition-id=1 num-partitions=2",
        "--auth-supernode-private-key=/run/keys/node", "--max-retries=2",
    )  # fmt: skip
    assert done.returncode != 0
    return done.stdout + done.stderr


def test_a_node_that_is_not_registered_is_refused(federation, run):
    keys = with_keys(federation, "stranger", private=node_keys()[0])
    before = federation.flwr("supernode", "list", "--format", "json")
    said = ran_once(federation, as_node(federation, "stranger", keys=keys))
    assert "SuperNode ID" not in said
    after = federation.flwr("supernode", "list", "--format", "json")
    assert before.count("node-id") == after.count("node-id")


def test_a_node_refuses_a_superlink_that_another_authority_vouches_for(federation, run):
    keys = with_keys(federation, "impostor", certificate=Authority.made(1).pem)
    said = ran_once(federation, as_node(federation, "impostor", keys=keys))
    assert "SuperNode ID" not in said
    assert "certificate" in said.lower()


def asked_from_a_node(federation, script):
    return federation.tried("exec", "-T", "node-0", "python3", "-c", script)


def test_nodes_reach_nothing_but_the_calls_of_nodes(federation, run):
    script = """
import ssl, sys, urllib.error, urllib.request as u
context = ssl.create_default_context(cafile="/run/keys/ca.crt")
for path in ("/v1/control/start-run", "/v1/control/register-node", "/v1/runtime/push-messages",
             "/v1/fleet/../control/start-run", "/v1/fleet/%2e%2e/control/start-run", "/docs"):
    try:
        u.urlopen(u.Request("https://gateway:8000" + path, data=b""), context=context, timeout=10)
        print("let through", path)
    except urllib.error.HTTPError as error:
        print(error.code, path)
"""
    said = asked_from_a_node(federation, script)
    lines = said.stdout.split("\n")[:-1]
    assert len(lines) == 6, said.stderr
    assert all(line.startswith("403 ") for line in lines), lines


def test_nodes_do_not_reach_the_superlink_itself(federation, run):
    said = asked_from_a_node(
        federation, "import socket; socket.create_connection(('superlink', 8000), 5)"
    )
    assert said.returncode != 0


def test_a_message_that_is_too_large_stops_at_the_gateway(federation, run):
    script = """
import ssl, urllib.error, urllib.request as u
context = ssl.create_default_context(cafile="/run/keys/ca.crt")
request = u.Request("https://gateway:8000/v1/fleet/push-object", data=b"x" * (25 * 2**20))
try:
    u.urlopen(request, context=context, timeout=60)
except urllib.error.HTTPError as error:
    print(error.code)
except OSError as error:
    print("cut off")
"""
    assert asked_from_a_node(federation, script).stdout.strip() in ("413", "cut off")


STRANGE = """
[project]
name = "strange-app"
version = "0.1.0"
description = "not fedpriv's"
license = "Apache-2.0"
dependencies = []
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[tool.flwr.app]
publisher = "somebody"
[tool.flwr.app.components]
serverapp = "strange:server"
clientapp = "strange:client"
"""


def test_an_app_that_is_not_installed_runs_nowhere(federation, run):
    app = federation.folder / "strange"
    app.mkdir()
    (app / "pyproject.toml").write_text(STRANGE)
    (app / "strange.py").write_text(
        "from flwr.clientapp import ClientApp\nfrom flwr.serverapp import ServerApp\n"
        "print('strange code ran', flush=True)\nclient = ClientApp()\nserver = ServerApp()\n"
        "@server.main()\ndef main(grid, context):\n    print('strange code ran', flush=True)\n"
    )
    said = federation.compose(
        "run", "--rm", "--volume", f"{app}:/strange:ro", "submit",
        "flwr", "run", "/strange", "--format", "json",
    )  # fmt: skip
    number = number_in(said)
    assert federation.finished(number).startswith("finished:failed")
    assert "strange code ran" not in federation.logs("superlink", "node-0", "node-1")
    for service in ("superlink", "node-0"):
        made = federation.tried("exec", "-T", service, "mkdir", "/opt/flower/apps/another")
        assert made.returncode != 0


def test_an_honest_run_goes_on_beside_a_node_that_lies(federation, run):
    liar = federation.folder / "liar"
    liar.mkdir()
    installed = federation.compose(
        "exec", "-T", "node-1", "sh", "-c", "cd /opt/flower/apps && ls -d fedpriv.*"
    ).strip()
    app = (ROOT / "simulations" / "flower_app" / "pyproject.toml").read_text()
    app = app.replace("fedpriv.federation.client_app:app", "liar:app")
    (liar / "pyproject.toml").write_text(app)
    shutil.copy(HERE / "liar.py", liar)
    options = as_node(
        federation,
        "liar",
        volumes=[f"{liar}:/opt/flower/apps/{installed}:ro"],
        environment={"LIES": "huge endless"},
    )
    federation.compose(*options, "up", "--detach", "--wait", "node-1")
    number = federation.submit(set="run_dir=/runs/beside-a-liar")
    assert federation.finished(number) == "finished:completed"
    metrics = federation.lines("metrics.jsonl", "beside-a-liar")
    assert [row["nodes_lost"] for row in metrics] == [1, 1]
    said = federation.flwr("log", number, "--show")
    # Flower's log has its lines twice where another library has set up logging.
    told = [line for line in said.splitlines() if "takes no part" in line]
    assert len({line.partition("takes no part")[2] for line in told}) == ROUNDS, said
