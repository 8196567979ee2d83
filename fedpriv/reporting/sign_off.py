"""What a person signs who approves of a run: which model, which ledger, which settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedpriv.counting import numbered
from fedpriv.privacy.ledger import read_ledger
from fedpriv.reporting.reader import PARAMETER, Run
from fedpriv.reporting.run_directory import RunDirectory
from fedpriv.training.checkpoint import checkpoint_files, digest_of


@dataclass(frozen=True)
class Signed:
    """One thing that is signed.

    Attributes:
        what: what it is.
        value: a digest, or a few words.
        private: whether it depends on users' data, and must not leave a simulation.
    """

    what: str
    value: str
    private: bool = False


def signed(run: Run) -> list[Signed]:
    """Return what is signed with a run.

    The ledger of a simulation has the digest of users' data in its header: its hashes are private,
    as is the fingerprint of the configuration. The digest of a model is a function of releases.
    """
    ledger = read_ledger(RunDirectory(run.path).ledger)
    head = ledger.hashes[-1] if ledger.hashes else ledger.header_hash
    versions: Mapping[str, str] = run.environment.get("versions", {})
    return [
        *_models(run),
        Signed(
            "Head of the ledger",
            f"{head}, of {numbered(len(run.releases), 'release')}",
            private=run.seeded,
        ),
        Signed("Configuration", run.header.fingerprint, private=run.seeded),
        Signed("Made by", f"fedpriv {versions.get('fedpriv', 'of unknown version')}"),
    ]


def _models(run: Run) -> list[Signed]:
    """Return the digests of the trained parameters of the newest model, and of the best one."""
    directory, found = RunDirectory(run.path), list[Signed]()
    newest = checkpoint_files(directory.checkpoints)[-1:]
    for what, path in [("newest", path) for path in newest] + [("best", directory.best)]:
        if not path.is_file():
            continue
        try:
            with safe_open(path, framework="pt") as file:
                names = [name for name in file.keys() if name.startswith(PARAMETER)]  # noqa: SIM118
                tensors: dict[str, Tensor] = {
                    name.removeprefix(PARAMETER): file.get_tensor(name) for name in names
                }
        except (SafetensorError, OSError):
            continue
        which = "of the best round" if what == "best" else f"of round {int(path.stem[6:]):,}"
        found.append(Signed(f"Model {which}, its trained parameters", digest_of(tensors)))
    return found or [Signed("Model", "no checkpoint is there: there is no model to sign for")]
