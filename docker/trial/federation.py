"""A federation in containers, as `fedpriv deploy prepare` laid it out, for tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: A small run on scikit-learn's digits.
SMALL = {
    "data.users": 40,
    "privacy.sampling.expected_cohort": 20,
    "privacy.delta": 0.001,
    "evaluation.every": 1,
}
# A round takes a new process on each node: 20 s on a busy machine of two cores.
_DEADLINE = 420


@dataclass(frozen=True)
class Federation:
    """A Compose project in its folder."""

    folder: Path
    tls: bool

    @classmethod
    def prepared(cls, folder: Path, nodes: int, rounds: int, tls: bool) -> Federation:
        """Lay one out, for the digits."""
        changes = {**SMALL, "rounds": rounds}
        asked = [sys.executable, "-m", "fedpriv", "deploy", "prepare", "configs/vit_digits.yaml"]
        asked += [f"--set={key}={value}" for key, value in changes.items()]
        asked += ["--nodes", str(nodes), "--out", str(folder), "--tls" if tls else "--no-tls"]
        subprocess.run(asked, cwd=ROOT, check=True)
        return cls(folder, tls)

    def compose(self, *asked: str, timeout: float = 300, **environment: str) -> str:
        """Run `docker compose`, and return what it printed; raise where it failed."""
        done = self.tried(*asked, timeout=timeout, **environment)
        assert done.returncode == 0, f"{asked}: {done.stdout}{done.stderr}"
        return done.stdout

    def tried(
        self, *asked: str, timeout: float = 300, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run `docker compose`, which may fail."""
        return subprocess.run(
            ["docker", "compose", *asked],
            cwd=self.folder,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def start(self) -> None:
        """Start SuperLink, gateway and nodes, and make the nodes known."""
        self.compose("up", "--detach", "--wait", "gateway")
        if self.tls:
            self.compose("run", "--rm", "register")
        self.compose("up", "--detach", "--wait")

    def flwr(self, *asked: str) -> str:
        """Run a command of `flwr` as the submitter."""
        return self.compose("run", "--rm", "submit", "flwr", *asked)

    def submit(self, **config: str) -> str:
        """Submit a run, and return its number."""
        settings = {"config": "/server/experiment.yaml", **config}
        told = " ".join(f"{name}='{value}'" for name, value in settings.items())
        app = "/opt/fedpriv-app"
        said = self.flwr("run", app, "--run-config", told, "--format", "json")
        return number_in(said)

    def status(self, run: str) -> str:
        """Say how far a run is."""
        said = self.flwr("ls", "--run-id", run, "--format", "json")
        return str(json.loads(said[said.index("{") :])["runs"][0]["status"])

    def finished(self, run: str, deadline: float = _DEADLINE) -> str:
        """Wait for the end of a run, and say what it was."""
        until = time.monotonic() + deadline
        while not (status := self.status(run)).startswith("finished"):
            assert time.monotonic() < until, f"still {status}\n{self.logs('superlink')}"
            time.sleep(3)
        return status

    def logs(self, *services: str) -> str:
        """Return what services printed."""
        return self.compose("logs", "--no-color", *services)

    def lines(self, name: str, run: str = "vit-digits") -> list[dict]:
        """Return the lines of a JSON file of a run's results, which are on the host."""
        text = (self.folder / "runs" / run / name).read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def stop(self) -> None:
        """End it, with its volumes."""
        self.compose("down", "--volumes", "--timeout", "5")


def number_in(said: str) -> str:
    """Return the number of the run that `flwr run --format json` says it has started."""
    assert "{" in said, said
    document = json.loads(said[said.index("{") :])
    assert "run-id" in document, document
    return str(document["run-id"])
