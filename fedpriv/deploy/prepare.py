"""A folder with all that a federation of nodes needs, each part for the machine that it is for.

.env, compose.yaml, compose.tls.yaml
server/    experiment.yaml, the public data, the seed model
nodes/K/   policy.yaml, data/ (its own users, and nobody else's), state/ (its ledger), keys/
keys/      superlink/, gateway/, submit/
runs/      results
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml
from scipy.special import bdtrc

from fedpriv.config import ExperimentConfig
from fedpriv.config_files import parse_config
from fedpriv.counting import numbered
from fedpriv.data.federated import FederatedDataset
from fedpriv.data.user_files import write_users
from fedpriv.deploy.keys import Authority, node_keys, write_secret
from fedpriv.errors import InputError
from fedpriv.federation.plan import Plan
from fedpriv.held_out import write_held_out
from fedpriv.preparation import plan_for, ready_trainer
from fedpriv.privacy.clipping_rules import AdaptiveOptions

#: Names under which containers of one Compose file reach SuperLink and gateway.
SUPERLINK, GATEWAY = "superlink", "gateway"
# A node that runs as root could not be kept from its own files.
_UNPRIVILEGED = 10001
# Flower sends a reply in pieces, with what describes them; and a node may answer twice a minute.
_REPLIES_A_MINUTE, _LEAST_MIB = 4, 64
# Clocks and programs differ in how far into the future they see.
_MOST_DAYS = 3650
# Adaptive bounds move; further than this a node does not follow.
_ADAPTIVE_ROOM = 10
# How often an honest run may leave somebody out whom its coins have drawn too often.
_UNLIKELY = 1e-9


@dataclass(frozen=True)
class Wanted:
    """How a federation is to be laid out.

    Attributes:
        nodes: number of nodes.
        out: the folder; it must not exist.
        tls: whether SuperLink and nodes have keys and certificates.
        hosts: more names or addresses under which nodes elsewhere reach the gateway.
        days: for how long certificates are valid.
    """

    nodes: int
    out: Path
    tls: bool = True
    hosts: tuple[str, ...] = ()
    days: int = 365


def prepare_deployment(
    config: ExperimentConfig, wanted: Wanted, told: Callable[[str], None]
) -> Plan:
    """Write the folder, and return the plan of the deployed run; `told` hears of each part.

    Raises:
        InputError: the experiment cannot be deployed, or the folder is there already. Nothing is
            left of it then.
    """
    _check(config, wanted)
    told("reading the data and computing ε")
    config, trainer = ready_trainer(config)
    dataset = trainer.dataset
    plan = plan_for(config, trainer)
    if dataset.population < wanted.nodes:
        raise InputError(
            f"--nodes: {wanted.nodes} for {numbered(dataset.population, 'user')}; write fewer"
        )
    out = wanted.out
    try:
        out.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"--out: {out}: {error.strerror}; name a new folder") from None
    try:
        _write_server(config, plan, dataset, wanted)
        told("server/: the experiment and the public data")
        for node in range(wanted.nodes):
            _write_node(config, plan, dataset, node, wanted)
            told(
                f"nodes/{node}/: policy and {numbered(len(_users(dataset, node, wanted)), 'user')}"
            )
        _write_compose(plan, wanted)
        if wanted.tls:
            _write_keys(wanted)
            told(f"keys/: valid for {numbered(wanted.days, 'day')}")
        (out / "runs").mkdir()
        _hand_over(out)
    except BaseException:
        shutil.rmtree(out)
        raise
    return plan


def _check(config: ExperimentConfig, wanted: Wanted) -> None:
    """Check what can be checked before any data are read.

    Raises:
        InputError: it cannot be deployed; one line.
    """
    if wanted.nodes < 1:
        raise InputError("--nodes: write 1 or more")
    if not 1 <= wanted.days <= _MOST_DAYS:
        raise InputError(f"--days: write 1 to {_MOST_DAYS}")
    for host in wanted.hosts:
        if re.fullmatch(r"[A-Za-z0-9._:-]{1,253}", host) is None:
            raise InputError(f"--host: {host!r:.60} is no name of a machine, and no address")
    if wanted.out.exists():
        raise InputError(f"--out: {wanted.out} is there already; name a new folder")
    if config.privacy is None:
        raise InputError("privacy: null: a node's policy lets nobody train without privacy")


def _users(dataset: FederatedDataset, node: int, wanted: Wanted) -> range:
    return range(node, dataset.population, wanted.nodes)


def _deployed(config: ExperimentConfig, plan: Plan, wanted: Wanted) -> dict[str, Any]:
    """Return the document of the experiment as the server runs it.

    Raises:
        InputError: a deployment cannot do what the config asks for.
    """
    document: dict[str, Any] = yaml.safe_load(config.to_yaml())
    places = plan.sampling.population
    document["data"] = {"name": "user_files", "users": places}
    document["evaluation"]["held_out"] = "/server/held_out.safetensors"
    document["run_dir"] = f"/runs/{config.name}"
    document["runtime"] |= {
        "deployment": True,
        "grid": "ray",
        "workers": wanted.nodes,
        "engine": "sequential",
        "ray_address": None,
        "profile": False,
    }
    privacy = document["privacy"]
    if privacy.get("target_epsilon") is not None:
        # What nodes hold against their policies is a number, not a promise to calibrate one.
        privacy |= {"target_epsilon": None, "noise_multiplier": _multiplier(plan)}
    if config.seed_model is not None:
        document["seed_model"]["path"] = "/server/seed_model.safetensors"
    parse_config(document)
    return document


def _multiplier(plan: Plan) -> float:
    return plan.mechanism.gaussian.noise_multiplier


def _write_server(
    config: ExperimentConfig, plan: Plan, dataset: FederatedDataset, wanted: Wanted
) -> None:
    server = wanted.out / "server"
    document = _deployed(config, plan, wanted)
    server.mkdir(parents=True)
    write_held_out(dataset, "user_files", server / "held_out.safetensors")
    if config.seed_model is not None:
        assert config.seed_model.path is not None
        shutil.copyfile(config.seed_model.path, server / "seed_model.safetensors")
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
    (server / "experiment.yaml").write_text(text, encoding="utf-8")


def _write_node(
    config: ExperimentConfig, plan: Plan, dataset: FederatedDataset, node: int, wanted: Wanted
) -> None:
    folder = wanted.out / "nodes" / str(node)
    folder.mkdir(parents=True)
    (folder / "state").mkdir(mode=0o700)
    write_users(dataset, _users(dataset, node, wanted), folder / "data")
    privacy = config.privacy
    assert privacy is not None
    silos, adaptive = privacy.unit == "example", isinstance(privacy.clipping, AdaptiveOptions)
    bound = math.hypot(privacy.clipping.bound, *config.algorithm.bounds.values())
    policy = {
        "unit": privacy.unit,
        "noise_by": ["silos" if silos else privacy.noise_by],
        "smallest_z": _multiplier(plan),
        "largest_bound": bound * (_ADAPTIVE_ROOM if adaptive else 1),
        "rounds": config.rounds,
        "share": largest_share(plan),
        "data": "user_files",
        "data_path": "/data",
        "population": plan.sampling.population,
        "components": [],
        "ledger": "/state/node.ledger",
    }
    text = f"# What node {node} does at most, for any server: see docs/deployment.md.\n"
    text += yaml.safe_dump(policy, sort_keys=False)
    (folder / "policy.yaml").write_text(text, encoding="utf-8")


def largest_share(plan: Plan) -> float | None:
    """Return the share of a run's rounds to which policies hold a server; None for all of them.

    It is that of the most rounds that coins give any user but once in 10^9 honest runs, and of
    `runtime.retries` more, for a node's ledger charges lost tries too.
    """
    config, sampling = plan.config, plan.sampling
    if sampling.kind not in ("poisson", "fixed_size"):
        return None
    rounds = config.rounds
    tosses = plan.mechanism.paid(rounds)
    chance = min(1.0, sampling.expected_cohort / sampling.population * rounds / tosses)
    tail = _UNLIKELY / sampling.population
    drawn = next(k for k in range(tosses + 1) if bdtrc(k, tosses, chance) <= tail)
    most = drawn + config.runtime.retries
    # Rounded down: a node rounds its number of rounds up.
    return math.floor(most / rounds * 1e6) / 1e6 if most < rounds else None


def _write_compose(plan: Plan, wanted: Wanted) -> None:
    reply = 8 * sum(plan.sizes) / 2**20
    facts = {
        "nodes": wanted.nodes,
        "mib_per_minute": max(_LEAST_MIB, math.ceil(_REPLIES_A_MINUTE * reply)),
    }
    names = ["compose.yaml", "compose.tls.yaml"] if wanted.tls else ["compose.yaml"]
    for name in names:
        (wanted.out / name).write_text(compose_file(name, facts), encoding="utf-8")
    user, group = _owner()
    settings = {"COMPOSE_FILE": ":".join(names), "FEDPRIV_USER": f"{user}:{group}"}
    lines = [f"{name}={value}\n" for name, value in settings.items()]
    (wanted.out / ".env").write_text("".join(lines), encoding="utf-8")


def compose_file(name: str, facts: Mapping[str, int]) -> str:
    """Return the text of a Compose file for a federation of `facts`: nodes, mib_per_minute."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fedpriv.deploy"),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    return environment.get_template(f"{name}.jinja").render(facts)


def _write_keys(wanted: Wanted) -> None:
    keys, authority = wanted.out / "keys", Authority.made(wanted.days)
    folders = [keys / SUPERLINK, keys / GATEWAY, keys / "submit"]
    folders += [wanted.out / "nodes" / str(node) / "keys" for node in range(wanted.nodes)]
    for folder in folders:
        folder.mkdir(parents=True, mode=0o700)
        (folder / "ca.crt").write_bytes(authority.pem)
    here = ("localhost", "127.0.0.1")
    certificate, key = authority.issue((SUPERLINK, *here), wanted.days)
    (keys / SUPERLINK / "superlink.crt").write_bytes(certificate)
    write_secret(keys / SUPERLINK / "superlink.key", key)
    certificate, key = authority.issue((GATEWAY, *here, *wanted.hosts), wanted.days)
    write_secret(keys / GATEWAY / "gateway.pem", certificate + key)
    for node in range(wanted.nodes):
        private, public = node_keys()
        write_secret(wanted.out / "nodes" / str(node) / "keys" / "node", private)
        (keys / "submit" / f"node-{node}.pub").write_bytes(public)


def _owner() -> tuple[int, int]:
    """Return who owns the folder and runs the containers: who calls, but never root."""
    user, group = os.getuid(), os.getgid()
    return (user, group) if user else (_UNPRIVILEGED, _UNPRIVILEGED)


def _hand_over(folder: Path) -> None:
    """Give all of the folder to whom the containers run as."""
    if os.getuid():
        return
    for path in [folder, *folder.rglob("*")]:
        os.chown(path, *_owner())
