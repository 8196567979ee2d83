"""An entry for the Differential Privacy Deployments Registry, as far as a run's ledger proves it.

The fields are those of OpenDP's `deployments-registry-data`, schemas/deployments-schema.yaml. What
a run cannot know is null, and the registry's own check refuses the entry until somebody who signs
for it has filled it in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fedpriv import __version__
from fedpriv.counting import numbered
from fedpriv.errors import InputError
from fedpriv.privacy.figures import epsilon_text
from fedpriv.privacy.ledger import read_ledger
from fedpriv.reporting.reader import Run
from fedpriv.reporting.run_directory import RunDirectory
from fedpriv.reporting.spent import spent
from fedpriv.reporting.statement import privacy_statement

#: By who adds the noise: what the registry calls it.
_MODELS = {"server": "Central", "nodes": "Federated", "silos": "Federated", "users": "Local"}


def registry_entry(run: Run) -> dict[str, Any]:
    """Return the entry of a deployment; None where whoever signs it must say.

    Raises:
        InputError: nothing may be claimed of the run, or only if its seed were secret.
    """
    account = spent(run)
    if run.seeded:
        raise InputError(
            "--to: registry is for deployments; this is a simulation, and whoever knows its seed "
            "can subtract the noise"
        )
    if not run.private or run.unclaimed or account.disagreements:
        raise InputError(
            "--to: registry is for runs of which something may be claimed; fedpriv report says why "
            "nothing may be of this one"
        )
    statement = privacy_statement(run, account)
    said = {section.key: " ".join(section.sentences) for section in statement.sections}
    ledger = read_ledger(RunDirectory(run.path).ledger)
    who = "silos" if run.header.unit == "example" else run.header.noise_by
    return {
        "url_slug": None,
        "status": "Draft",
        "tier": 3,
        "deployment": {
            "basic": {
                "name": run.config.name,
                "data_curators": None,
                "intended_use": None,
                "data_product_type": "Machine learning model",
                "data_product_region": None,
                "description": None,
                "publication_date": None,
                "data_product_sector": None,
            },
            "dp_variant": {
                "variant_name": "Approximate DP",
                "data_domain": None,
                "unprotected_quantities": said["logged"],
            },
            "privacy_loss": {
                "privacy_unit": f"{run.header.unit.capitalize()}-level",
                "privacy_unit_details": f"{said['unit']} {said['adjacency']}",
                "privacy_parameters": {
                    "epsilon": float(epsilon_text(min(account.epsilons.values()))),
                    "delta": run.delta,
                },
                "privacy_parameters_details": f"{statement.headline} {said['delta']}",
            },
            "deployment_model": {
                "model_name": _MODELS[who],
                "model_name_details": said["sampling"],
                "actors": said["trust"],
                "release_type": None,
                "release_type_details": said["releases"],
                "data_source_type": None,
                "data_source_type_details": None,
                "access_type": "Non-interactive",
                "access_type_details": "Nobody queries the data: a model is trained.",
            },
            "accounting": {
                "post_processing": "Whatever is made of the noisy sums: the models of all rounds.",
                "composition": said["accounting"],
            },
            "implementation": {
                "preprocessing_and_hyperparameter_tuning": f"{said['start']} {said['tuning']}",
                "mechanisms": f"{said['mechanism']} {said['floating-point']} {said['randomness']} "
                f"fedpriv {__version__}.",
                "justification": None,
            },
            "administrative": {
                "sources": None,
                "notes": f"{numbered(len(run.releases), 'release')}; SHA-256 of the ledger's "
                f"last line: {ledger.hashes[-1]}.",
                "registry_authors": None,
            },
        },
    }


def left_open(entry: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Yield the paths of what whoever signs an entry must fill in, or leave out."""
    for key, value in entry.items():
        if isinstance(value, Mapping):
            yield from left_open(value, f"{path}{key}.")
        elif value is None:
            yield f"{path}{key}"
