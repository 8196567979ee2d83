"""The card of an exported model, in Hugging Face's format: what it is, and what it cost whom."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedpriv import __version__, yaml_text
from fedpriv.counting import numbered
from fedpriv.privacy.ledger import read_ledger
from fedpriv.reporting.reader import Run, run_labels
from fedpriv.reporting.run_directory import RunDirectory
from fedpriv.reporting.spent import spent
from fedpriv.reporting.statement import privacy_statement, to_markdown
from fedpriv.reporting.wording import KNOWN_SEED

#: By the task's class: Hugging Face's name of it.
_PIPELINES = {
    "Classification": "image-classification",
    "NextToken": "text-generation",
    "Recognition": "automatic-speech-recognition",
}


@dataclass(frozen=True)
class Exported:
    """What is known of an exported model.

    Attributes:
        run: the run that it is of.
        round: the round after which it was as it is.
        task: the class of its task.
        library: whose format it has.
        parameters: how many numbers it has.
        trained: how many of them were trained; with adapters, how many these have.
        sha256: digest of its numbers.
    """

    run: Run
    round: int
    task: str
    library: str
    parameters: int
    trained: int
    sha256: str


def metadata_of(exported: Exported) -> dict[str, str]:
    """Return what goes into the model's own file, and holds without its card.

    The ledger of a simulation has the digest of users' data in its header: its hash is private.
    """
    run = exported.run
    account = spent(run)
    claimed = run.private and not run.unclaimed and not account.disagreements
    ledger = read_ledger(RunDirectory(run.path).ledger)
    head = ledger.hashes[-1] if ledger.hashes else ledger.header_hash
    known = {
        "format": "pt",
        "fedpriv": __version__,
        "experiment": run.config.name,
        "mode": "simulation" if run.seeded else "deployment",
        "privacy": privacy_statement(run, account).headline,
        "epsilon": f"{min(account.epsilons.values()):.6g}" if claimed else None,
        "delta": f"{run.delta:g}" if claimed else None,
        "unit": run.header.unit if claimed else None,
        "adjacency": run.header.adjacency if claimed else None,
        "seed": KNOWN_SEED if run.seeded else None,
        "rounds": str(run.finished_rounds),
        "model_of_round": str(exported.round),
        "releases": str(len(run.releases)),
        "trained_parameters": str(exported.trained),
        "model_sha256": exported.sha256,
        "frozen_sha256": run.config.model.frozen_sha256,
        "seed_model_sha256": run.config.seed_model.sha256 if run.config.seed_model else None,
        ("simulation_only.ledger_head" if run.seeded else "ledger_head"): head,
    }
    return {key: value for key, value in known.items() if value is not None}


def model_card(exported: Exported) -> str:
    """Return the card as markdown, its front matter first."""
    run = exported.run
    title = run_labels([run])[0]
    statement = to_markdown(privacy_statement(run, spent(run)), title).replace("\n#", "\n##")
    parts = [
        f"---\n{yaml_text.dump(_front_matter(exported, title))}---",
        f"# {title}",
        _about(exported),
        *([f"> **A simulation:** {KNOWN_SEED}, as they are in any simulation."] * run.seeded),
        f"#{statement}".rstrip(),
        "## Digests",
        _table(metadata_of(exported)),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(exported: Exported, title: str) -> dict[str, Any]:
    run, pipeline = exported.run, _PIPELINES.get(exported.task)
    tags = ["federated-learning", *(["differential-privacy"] if run.private else [])]
    front: dict[str, Any] = {"library_name": exported.library, "tags": tags}
    if pipeline is not None:
        front["pipeline_tag"] = pipeline
    measured = run.measured
    if exported.round in measured.rounds:
        value = measured.values[measured.rounds.index(exported.round)]
        result = {
            "task": {"type": pipeline or exported.task.lower()},
            "dataset": {"name": run.config.data.name, "type": run.config.data.name},
            "metrics": [{"type": measured.quality.key, "value": value}],
        }
        front["model-index"] = [{"name": title, "results": [result]}]
    return front


def _about(exported: Exported) -> str:
    run, model = exported.run, exported.run.config.model
    sentences = [
        f"Trained by [fedpriv](https://pypi.org/project/fedpriv/) {__version__}, federated, for "
        f"{numbered(run.finished_rounds, 'round')}: a model `{model.name}` of "
        f"{exported.parameters:,} numbers."
    ]
    if exported.round != run.finished_rounds:
        sentences.append(f"It is that of round {exported.round}, the best by its held-out measure.")
    if model.train != "all":
        what = {"head": "its last layer", "lora": "low-rank adapters, which are merged into it"}
        named = model.train if isinstance(model.train, str) else "parts of it"
        sentences.append(
            f"Trained on users' data was {what.get(named, named)}: {exported.trained:,} numbers. "
            "All others are as they were before; the guarantee below does not speak of the data "
            "that those were trained on."
        )
    if run.config.seed_model is not None:
        sentences.append("It began with a seed model, of which the statement below speaks.")
    return " ".join(sentences)


def _table(metadata: Mapping[str, str]) -> str:
    shown = {k: v for k, v in metadata.items() if "sha256" in k or k.endswith("ledger_head")}
    lines = ["| of | SHA-256 |", "|---|---|"]
    return "\n".join([*lines, *(f"| `{key}` | `{value}` |" for key, value in shown.items())])
