"""`config`: look at and check configs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from fedpriv.cli.common import CONFIG, ConfigPath, Overrides, errors, file_or_folder, say
from fedpriv.counting import numbered
from fedpriv.reporting.terminal import one_line, saying

Written = Annotated[Path, typer.Argument(parser=file_or_folder, metavar="FILE")]

config_app = typer.Typer(help="Look at and check configs.", no_args_is_help=True)


@config_app.command(epilog=CONFIG)
def show(config: ConfigPath, overrides: Overrides = None) -> None:
    """Print CONFIG with all defaults filled in."""
    from fedpriv.config_files import load_config

    sys.stdout.write(load_config(config, overrides or []).to_yaml())


@config_app.command(epilog=CONFIG)
def validate(config: ConfigPath, overrides: Overrides = None) -> None:
    """Check CONFIG, its data and its model, without running anything."""
    from fedpriv import experiment
    from fedpriv.config_files import load_config
    from fedpriv.data.federated import notes_of
    from fedpriv.privacy.figures import epsilon_text
    from fedpriv.reporting.wording import beside_epsilon
    from fedpriv.seed_model import with_seed_file

    loaded = load_config(config, overrides or [])
    with saying(errors, "reading the data and computing ε"):
        found = with_seed_file(loaded)
        # As a run begins, as far as that is known without training a seed model.
        prepared = experiment.prepare(found, seeded=found is not loaded)
    # Of a trial the ε is that of its tuning, which a config does not know.
    planned = None if loaded.trial else prepared.plan.planned_cost()
    cost = "what the tuning does that it is a trial of" if loaded.trial else "without privacy"
    if planned is not None:
        shown, name = epsilon_text(planned.epsilon), planned.accountant.upper()
        cost = f"ε = {shown} by {name} at δ={planned.delta:g}"
    mechanism = prepared.plan.mechanism
    if planned is not None:
        cost += mechanism.for_whom + mechanism.of_what
    if planned is not None:
        cost += beside_epsilon(not prepared.config.runtime.deployment)
    if not prepared.config.runtime.deployment:
        notes = notes_of(prepared.trainer.dataset, prepared.config.data.users)
        say(f"simulation only: {note}" for note in notes)
    say(() if loaded.trial else prepared.plan.advice())
    rounds = numbered(prepared.config.rounds, "round")
    verb = "costs" if prepared.config.rounds == 1 else "cost"
    print(f"{one_line(str(config))}: valid; {rounds} {verb} {cost}")
    if mechanism.trust is not None:
        print(mechanism.trust)


@config_app.command(epilog=f"{CONFIG}; FILE: the file to write")
def held_out(config: ConfigPath, file: Written, overrides: Overrides = None) -> None:
    """Write what the server of a deployment of CONFIG needs of its data: no users are in it."""
    from fedpriv.config_files import load_config
    from fedpriv.data.registry import build_dataset
    from fedpriv.held_out import is_held_out, write_held_out
    from fedpriv.reporting.own_files import require_replaceable
    from fedpriv.reporting.run_directory import require_no_record

    loaded = load_config(config, overrides or [])
    require_no_record(file, "FILE")
    require_replaceable(file, "FILE", ours=is_held_out)
    with saying(errors, "reading the data"):
        write_held_out(build_dataset(loaded.data, loaded.seed), loaded.data.name, file)
    print(f"{one_line(str(file))}: held-out examples of {loaded.data.name}, and no users")


@config_app.command()
def schema() -> None:
    """Print the JSON schema of a config: every key, its meaning, unit and bounds."""
    from fedpriv.config import ExperimentConfig

    print(json.dumps(ExperimentConfig.model_json_schema(), indent=2))
