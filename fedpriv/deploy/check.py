"""Whether a node can serve an experiment: each thing that a first round would find out too late."""

from __future__ import annotations

import os
import shutil
import ssl
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cached_property
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any

from cryptography import x509

from fedpriv.components import LookUp
from fedpriv.config import ExperimentConfig
from fedpriv.config_files import document_of, parse_config
from fedpriv.counting import numbered
from fedpriv.errors import FedprivError, InputError
from fedpriv.federation.builders import build_trainer
from fedpriv.federation.node_ledger import NodeLedger
from fedpriv.federation.policy import NodePolicy, NodeTerms, read_policy
from fedpriv.models.parameters import Layout
from fedpriv.training.cohort import CohortTrainer

# A ledger's line and a message in pieces.
_LEAST_MIB_FREE = 256
_SECONDS_TO_CONNECT = 10
# Flower's limits for the time that a node signs.
_MOST_AHEAD, _MOST_BEHIND = 5, 300


@dataclass(frozen=True)
class Finding:
    """What was found of one thing. It may be about users: it is for the node alone."""

    about: str
    good: bool
    sentence: str


@dataclass(frozen=True)
class NodeCheck:
    """A node as its operator is about to start it.

    Attributes:
        experiment: the config file that the server will send.
        policy_file: the node's policy.
        superlink: `host:port` of the gateway or SuperLink; None leaves the link unchecked.
        root_certificates: whom the node trusts to say who that is; None for no TLS.
        nodes: num-partitions of the node's config; 0 where it is not known.
    """

    experiment: Path
    policy_file: Path
    superlink: str | None = None
    root_certificates: Path | None = None
    nodes: int = 0

    def findings(
        self, checking: Callable[[str], AbstractContextManager[Any]] = nullcontext
    ) -> Iterator[Finding]:
        """Yield what was found, one after another; what rests on something bad is left out.

        `checking` is around each look, and is told of what.
        """
        for about, look in self._looks():
            try:
                with checking(about):
                    sentence = look()
            except FedprivError as error:
                yield Finding(about, False, str(error))
                if about in ("policy", "experiment"):
                    return
            else:
                yield Finding(about, True, sentence)

    def _looks(self) -> Iterator[tuple[str, Callable[[], str]]]:
        yield "policy", self._look_at_policy
        yield "experiment", self._look_at_experiment
        yield "data", self._look_at_data
        yield "model", self._look_at_model
        yield "ledger", self._look_at_ledger
        yield "disk", self._look_at_disk
        if self.root_certificates is not None:
            yield "certificate", self._look_at_certificate
        if self.superlink is not None:
            yield "link", self._look_at_link

    @cached_property
    def _policy(self) -> NodePolicy:
        return read_policy(self.policy_file)

    @cached_property
    def _config(self) -> ExperimentConfig:
        allowed = self._policy.components or ()
        document = document_of(self.experiment)
        return parse_config(document, LookUp(self.experiment.absolute().parent, allowed=allowed))

    @cached_property
    def _terms(self) -> NodeTerms:
        policy, allowed = self._policy, frozenset(self._policy.components or ())
        return NodeTerms(policy, policy.data_path, allowed, self.nodes, run=0, simulated=False)

    @cached_property
    def _trainer(self) -> CohortTrainer:
        data = self._config.data.model_copy(update={"path": self._policy.data_path, "users": None})
        config = self._config.model_copy(update={"data": data})
        return build_trainer(config, allow=self._terms.check_size)

    def _look_at_policy(self) -> str:
        policy = self._policy
        return f"z of at least {policy.smallest_z:g}, C of at most {policy.largest_bound:g}"

    def _look_at_experiment(self) -> str:
        policy = self._policy
        self._terms.check(self._config, "")
        if self._config.rounds > policy.rounds:
            return (
                f"{numbered(self._config.rounds, 'round')}, and a user takes part in "
                f"{policy.rounds} at most: "
                "whoever is drawn more often is left out"
            )
        return f"{self._config.name}: the policy allows it"

    def _look_at_data(self) -> str:
        dataset = self._trainer.dataset
        if dataset.population == 0:
            raise InputError(f"{self._policy.data_path}: there are no users in it")
        places = self._config.data.users or 0
        if dataset.population > places:
            raise InputError(
                f"{numbered(dataset.population, 'user')} here, and data.users says {places} on "
                "all nodes"
            )
        bad = [ident for index, ident in enumerate(dataset.user_ids) if not self._has(index)]
        if bad:
            raise InputError(
                f"{len(bad)} of {numbered(dataset.population, 'user')} cannot be trained, "
                f"{bad[0]} first"
            )
        return f"{numbered(dataset.population, 'user')}, all can be read"

    def _has(self, user: int) -> bool:
        try:
            return len(self._trainer.dataset.user(user)) > 0
        except FedprivError:
            return False

    def _look_at_model(self) -> str:
        total = Layout.of(self._trainer.model).total
        return f"{total:,} parameters; a reply takes {8 * total / 2**20:.1f} MiB"

    def _look_at_ledger(self) -> str:
        assert self._policy.ledger is not None
        return f"{NodeLedger(self._policy.ledger, self._policy.unit).check()} charges so far"

    def _look_at_disk(self) -> str:
        assert self._policy.ledger is not None
        folder = self._policy.ledger.parent
        free = shutil.disk_usage(folder).free // 2**20
        if free < _LEAST_MIB_FREE:
            raise InputError(f"{folder}: {free} MiB are free; make {_LEAST_MIB_FREE} MiB of room")
        return f"{free:,} MiB free for the ledger"

    def _look_at_certificate(self) -> str:
        assert self.root_certificates is not None
        try:
            found = x509.load_pem_x509_certificate(self.root_certificates.read_bytes())
        except OSError as error:
            raise InputError(f"{self.root_certificates}: {error.strerror}") from None
        except ValueError:
            raise InputError(f"{self.root_certificates}: no certificate in PEM") from None
        left = (found.not_valid_after_utc - datetime.now(UTC)).days
        if left < 0:
            raise InputError(
                f"{self.root_certificates}: ended on {found.not_valid_after_utc:%Y-%m-%d}; ask "
                "whoever runs the SuperLink for a new one"
            )
        return f"valid for {left} days"

    def _look_at_link(self) -> str:
        assert self.superlink is not None
        host, _, port = self.superlink.rpartition(":")
        if not host or not port.isdecimal():
            raise InputError(f"--superlink: {self.superlink}: write host:port")
        try:
            return self._answered(host.strip("[]"), int(port))
        except ssl.SSLCertVerificationError as error:
            raise InputError(f"{self.superlink}: {error.verify_message}") from None
        except HTTPException:
            raise InputError(
                f"{self.superlink}: something else answers there; write the gateway's address"
            ) from None
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise InputError(f"{self.superlink}: no answer ({reason})") from None

    def _answered(self, host: str, port: int) -> str:
        """Ask for what only a node is told, and look at how and when that is refused."""
        link: HTTPConnection
        if self.root_certificates is None:
            link = HTTPConnection(host, port, timeout=_SECONDS_TO_CONNECT)
        else:
            context = ssl.create_default_context(cafile=self.root_certificates)
            link = HTTPSConnection(host, port, timeout=_SECONDS_TO_CONNECT, context=context)
        with closing(link):
            link.connect()
            used = link.sock
            tls = f"with {used.version()}" if isinstance(used, ssl.SSLSocket) else "without TLS"
            link.request("POST", "/v1/fleet/activate-node", body=b"")
            there = link.getresponse().headers.get("date")
        if there is not None:
            _check_clock(parsedate_to_datetime(there))
        return f"{self.superlink} answers {tls}"


def _check_clock(there: datetime) -> None:
    """Raise InputError where a clock is so far from this one that what a node signs is refused."""
    ahead = (datetime.now(UTC) - there).total_seconds()
    # The date there has whole seconds, and an answer takes some.
    if -_MOST_BEHIND - 1 < ahead < _MOST_AHEAD + 1:
        return
    raise InputError(
        f"the clock here is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the "
        f"SuperLink's, which knows no node that is {_MOST_AHEAD} s ahead or {_MOST_BEHIND} s "
        "behind; set both by NTP"
    )


def versions() -> str:
    """Return what a node's results depend on, for a comparison with the server's."""
    from importlib.metadata import version

    found = {name: version(name) for name in ("fedpriv", "torch", "flwr")}
    return (
        ", ".join(f"{name} {number}" for name, number in found.items()) + f"; {os.cpu_count()} CPUs"
    )
