"""An entry for the DP Deployments Registry has its schema's fields, and what the ledger proves."""

import json
import re

import pytest
from deployed import COUNTS, Deployed, deployed_config, three_nodes, trained
from in_process import Silent, train_small
from jsonschema import Draft7Validator
from typer.testing import CliRunner
from writers import write_writers

from fedpriv.cli import app
from fedpriv.errors import InputError
from fedpriv.export import export
from fedpriv.privacy.ledger import read_ledger
from fedpriv.reporting.reader import read_run
from fedpriv.reporting.spent import spent

TEXT = {"type": "string"}
TEXTS = {"type": "array", "items": TEXT, "minItems": 1}


def fields(*texts, required=(), **others):
    known = dict.fromkeys(texts, TEXT) | others
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": known,
        "required": list(required),
    }


def one_of(*values):
    return {"type": "string", "enum": list(values)}


#: The fields of OpenDP's deployments-registry-data, schemas/deployments-schema.yaml, 2026-07-15.
SCHEMA = fields(
    "url_slug",
    status=one_of("Converted", "Draft", "Pending", "Changes Required", "Approved"),
    tier={"type": "integer", "enum": [1, 2, 3]},
    required=["url_slug", "status", "tier", "deployment"],
    deployment=fields(
        required=["basic"],
        basic=fields(
            *("name", "intended_use", "data_product_region", "description", "publication_date"),
            data_curators=TEXTS,
            data_product_type=one_of("Summary statistics", "Machine learning model", "Dataset"),
            data_product_sector=one_of("Technology", "Healthcare", "Education", "Government"),
            required=[
                *("name", "data_curators", "description", "intended_use", "data_product_type"),
                *("data_product_region", "publication_date"),
            ],
        ),
        dp_variant=fields(
            *("data_domain", "unprotected_quantities"),
            variant_name=one_of("Pure DP", "Approximate DP", "Zero-concentrated DP", "Renyi DP"),
        ),
        privacy_loss=fields(
            *("privacy_unit", "privacy_unit_details", "privacy_parameters_details"),
            privacy_parameters=fields(epsilon={"type": "number"}, delta={"type": "number"}),
        ),
        deployment_model=fields(
            *("model_name_details", "actors", "release_type_details", "data_source_type_details"),
            "access_type_details",
            model_name=one_of("Local", "Central", "Shuffle", "Federated", "Varies"),
            release_type=one_of("One release", "Many releases"),
            data_source_type=one_of("Static", "Dynamic"),
            access_type=one_of("Interactive", "Non-interactive"),
        ),
        accounting=fields("post_processing", "composition"),
        implementation=fields(
            "preprocessing_and_hyperparameter_tuning", "mechanisms", "justification"
        ),
        administrative=fields(
            *("sources", "notes"), registry_authors=TEXTS, required=["registry_authors"]
        ),
    ),
)
#: What a signer says, and a run cannot know.
SIGNED = {
    "url_slug": "model-us-2026",
    "deployment.basic.data_curators": ["us"],
    "deployment.basic.data_product_sector": "Education",
    "deployment.deployment_model.release_type": "One release",
    "deployment.deployment_model.data_source_type": "Static",
    "deployment.administrative.registry_authors": ["me"],
}


@pytest.mark.parametrize(("noise_by", "model"), [("server", "Central"), ("users", "Local")])
def test_an_entry_says_what_the_ledger_proves_and_names_the_rest(tmp_path, noise_by, model):
    config = deployed_config(
        write_writers(tmp_path / "server", COUNTS),
        **{"rounds": 2, "data": {"users": 12}, "privacy__noise_by": noise_by},
        privacy__sampling={"kind": "poisson", "expected_cohort": 6},
        runtime={"workers": 3, "deployment": True, "device": "cpu"},
        run_dir=str(tmp_path / "run"),
    )
    directory = trained(config, Deployed(three_nodes(tmp_path)), Silent())
    out = tmp_path / "entry"
    done = CliRunner().invoke(
        app, ["export", str(directory.path), "--to", "registry", "--out", str(out)]
    )
    assert done.exit_code == 0, done.output
    entry, run = json.loads((out / "entry.json").read_text()), read_run(directory.path)
    told = entry["deployment"]
    loss, epsilon = told["privacy_loss"], min(spent(run).epsilons.values())
    assert epsilon <= loss["privacy_parameters"]["epsilon"] <= epsilon + 1e-3
    assert loss["privacy_parameters"]["delta"] == run.delta
    assert loss["privacy_unit"] == "User-level"
    assert told["deployment_model"]["model_name"] == model
    assert read_ledger(directory.ledger).hashes[-1] in told["administrative"]["notes"]

    # Nobody can hand it in as it is; what is open is named, and with that the schema is met.
    errors = {".".join(map(str, e.path)) for e in Draft7Validator(SCHEMA).iter_errors(entry)}
    named = re.findall(r"^- `(.*)`$", (out / "README.md").read_text(), re.MULTILINE)
    assert errors == set(named)
    assert set(SIGNED) < errors
    for path in named:
        *parents, last = path.split(".")
        section = entry
        for parent in parents:
            section = section[parent]
        section[last] = SIGNED.get(path, "said")
    Draft7Validator(SCHEMA).validate(entry)


def test_a_simulation_has_no_entry(tmp_path):
    simulated, _ = train_small(tmp_path / "run", rounds=1)
    with pytest.raises(InputError, match="whoever knows its seed can subtract the noise"):
        export(simulated.path, "registry", tmp_path / "entry")
    assert not (tmp_path / "entry").exists()
