"""The commands. What one needs is imported by it, so that the others need not wait for it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer
from rich.text import Text

import fedpriv
from fedpriv.disk import has_no_room, write_whole
from fedpriv.errors import (
    BudgetError,
    ClaimRefuted,
    ClientFault,
    FedprivError,
    InputError,
    Interrupted,
)
from fedpriv.reporting.terminal import (
    console,
    in_a_shell,
    let_print_anything,
    one_line,
    print_lines,
)

if TYPE_CHECKING:
    from fedpriv.config import ExperimentConfig, RuntimeConfig
    from fedpriv.experiment import Experiment
    from fedpriv.reporting.run_directory import RunDirectory

app = typer.Typer(
    help="Differentially private federated learning, simulated.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
config_app = typer.Typer(help="Look at and check configs.", no_args_is_help=True)
app.add_typer(config_app, name="config")
budget_app = typer.Typer(help="Plan what privacy costs, before a run.", no_args_is_help=True)
app.add_typer(budget_app, name="budget")
ledger_app = typer.Typer(
    help="Look at, check and add up what runs spent; a ledger is never changed.",
    no_args_is_help=True,
)
app.add_typer(ledger_app, name="ledger")

Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="key=value, e.g. privacy.delta=1e-6; repeatable")
]


def file_or_folder(text: str) -> Path:
    """Return a path of the command line, where a shell leaves `--run=~/x` as it is."""
    from fedpriv.sections import user_path

    return user_path(Path(text))


# Arguments have no help of their own: the pinned versions of typer and click lose it.
_CONFIG = "CONFIG: a config in YAML"
_LEDGER = "PATH: a run directory or a ledger file"
ConfigPath = Annotated[Path, typer.Argument(parser=file_or_folder, metavar="CONFIG")]
Population = Annotated[int, typer.Option(help="number of users N")]
BudgetFormat = Annotated[str, typer.Option("--format", help="table, json or csv")]
LedgerFormat = Annotated[str, typer.Option("--format", help="table or json")]
PlotPath = Annotated[
    Path | None,
    typer.Option(
        "--plot", parser=file_or_folder, metavar="FILE", help="also draw it: FILE.png or .svg"
    ),
]
LedgerPath = Annotated[Path, typer.Argument(parser=file_or_folder, metavar="PATH")]

_errors = console(stderr=True)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"fedpriv {fedpriv.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="say which this is"),
    ] = False,
) -> None:
    """Train, plan and check with differential privacy."""


@app.command(epilog=_CONFIG)
def run(
    config: ConfigPath,
    overrides: Overrides = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="show where the time goes, and write trace.json")
    ] = False,
) -> None:
    """Train as CONFIG says, in a new run directory."""
    from fedpriv.config import load_config
    from fedpriv.preparation import plan_for, ready_trainer
    from fedpriv.reporting.run_directory import require_empty

    overrides = [*(overrides or []), *(["runtime.profile=true"] if profile else [])]
    settings = load_config(config, overrides)
    if settings.run_dir is not None:
        require_empty(settings.run_dir)
    settings, trainer = ready_trainer(_seeded(settings))
    with _ray_starting(settings.runtime) as wait_for_ray:
        from fedpriv import experiment

        prepared = experiment.complete(plan_for(settings, trainer), trainer)
        wait_for_ray()  # where it does not start nothing should be left behind
        _train(experiment.create(prepared), prepared)


@app.command(epilog=_CONFIG)
def pretrain(config: ConfigPath, overrides: Overrides = None) -> None:
    """Make CONFIG's seed model from public data, without privacy; `run` does so when needed."""
    from fedpriv import seed_model
    from fedpriv.config import load_config
    from fedpriv.reporting.summary import seed_model_table

    settings = load_config(config, overrides or [])
    if settings.seed_model is None or settings.seed_model.pretrain is None:
        raise InputError(f"{config}: write seed_model.pretrain, which says how to train it")
    path = seed_model.seed_path(settings)
    if path.exists():
        _say([f"{path} is there already; remove it to train it again"])
    _seeded(settings)
    origin = seed_model.origin_of(settings)
    console().print(seed_model_table(seed_model.read_measures(path), origin))
    print_lines(_errors, f"seed model: {path}")


@app.command(epilog="DIRECTORY: the folder of a run")
def resume(
    directory: Annotated[Path, typer.Argument(parser=file_or_folder, metavar="DIRECTORY")],
) -> None:
    """Continue an interrupted run, on the same ledger."""
    from fedpriv import experiment

    _train(*experiment.reopen(directory))


@app.command(epilog="DIRECTORIES: one or more run directories")
def report(
    directories: Annotated[
        list[Path], typer.Argument(parser=file_or_folder, metavar="DIRECTORIES")
    ],
    format: Annotated[str, typer.Option(help="html, md, json or csv")] = "html",
    output: Annotated[
        Path | None,
        typer.Option(
            parser=file_or_folder,
            metavar="FILE",
            help="the file; by default html goes into the run directory, text to stdout",
        ),
    ] = None,
) -> None:
    """Report on a run, or compare several."""
    from fedpriv.reporting.report import render
    from fedpriv.reporting.run_directory import require_no_record

    _check_format(format, "html", "md", "json", "csv")
    if output is not None:
        require_no_record(output, "--output")
    if format == "html":
        _conclude(directories, output)
        return
    text = render(directories, cast(Literal["md", "json", "csv"], format))
    if output is None:
        sys.stdout.write(text)
        return
    try:
        write_whole(output, text)
    except OSError as error:
        raise InputError(f"--output: cannot write {output} ({error.strerror})") from None


@app.command(epilog=_CONFIG)
def audit(
    config: ConfigPath,
    overrides: Overrides = None,
    canaries: Annotated[
        int, typer.Option(help="made-up users who join, each in or out by coin")
    ] = 500,
    rounds: Annotated[
        int | None, typer.Option(help="rounds to run and judge; default: all of the config's")
    ] = None,
    confidence: Annotated[float, typer.Option(help="of the lower bound on ε")] = 0.95,
    run_dir: Annotated[
        Path | None,
        typer.Option(
            "--run",
            parser=file_or_folder,
            metavar="DIRECTORY",
            help="a run of CONFIG: audit.json goes there, for its report",
        ),
    ] = None,
    format: LedgerFormat = "table",
) -> None:
    """Measure privacy from outside: a lower bound on ε, to hold against the accountant's.

    Exit code 1 where the bound exceeds the ε that is accounted for.
    """
    from fedpriv import audit as auditing
    from fedpriv.config import load_config
    from fedpriv.experiment import stop_signal
    from fedpriv.reporting import audit as reporting
    from fedpriv.reporting.progress import AuditLines
    from fedpriv.reporting.run_directory import RunDirectory

    _check_format(format, "table", "json")
    settings = load_config(config, overrides or [])
    wanted = auditing.AuditSettings(canaries, rounds, confidence)
    auditing.check(settings, wanted)
    settings = _seeded(settings)
    if run_dir is not None and (
        RunDirectory.open(run_dir).config_to_continue().fingerprint("") != settings.fingerprint("")
    ):
        raise InputError(f"--run: {run_dir} is a run of another configuration than {config}")
    with AuditLines(_errors) as lines, stop_signal(lambda said: _say([said])) as stop:
        found = auditing.audit(settings, wanted, lines, stop)
    if run_dir is not None:
        written = reporting.write_audit(run_dir, found)
        _say([f"{written}: shown by fedpriv report {in_a_shell(run_dir)}"])
    if format == "json":
        sys.stdout.write(reporting.audit_document(found))
    else:
        console().print(reporting.audit_table(found))
    verdict = reporting.audit_verdict(found)
    if not found.holds:
        raise ClaimRefuted(verdict)
    print_lines(_errors, verdict)


@config_app.command(epilog=_CONFIG)
def show(config: ConfigPath, overrides: Overrides = None) -> None:
    """Print CONFIG with all defaults filled in."""
    from fedpriv.config import load_config

    sys.stdout.write(load_config(config, overrides or []).to_yaml())


@config_app.command(epilog=_CONFIG)
def validate(config: ConfigPath, overrides: Overrides = None) -> None:
    """Check CONFIG, its data and its model, without running anything."""
    from fedpriv import experiment
    from fedpriv.config import load_config
    from fedpriv.privacy.figures import epsilon_text
    from fedpriv.reporting.wording import beside_epsilon

    prepared = experiment.prepare(load_config(config, overrides or []), seeded=False)
    planned = prepared.plan.planned_cost()
    cost = "without privacy"
    if planned is not None:
        shown, name = epsilon_text(planned.epsilon), planned.accountant.upper()
        cost = f"ε = {shown} by {name} at δ={planned.delta:g}"
    mechanism = prepared.plan.mechanism
    if planned is not None:
        cost += mechanism.for_whom + mechanism.of_what
    if planned is not None:
        cost += beside_epsilon(not prepared.config.runtime.deployment)
    _say(prepared.plan.advice())
    print(f"{one_line(str(config))}: valid; {prepared.config.rounds} rounds cost {cost}")
    if mechanism.trust is not None:
        print(mechanism.trust)


@config_app.command()
def schema() -> None:
    """Print the JSON schema of a config: every key, its meaning, unit and bounds."""
    from fedpriv.config import ExperimentConfig

    print(json.dumps(ExperimentConfig.model_json_schema(), indent=2))


@budget_app.command()
def plan(
    population: Population,
    delta: Annotated[
        list[float] | None,
        typer.Option(help="δ; repeatable: what is solved for holds at the first"),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(help="number of rounds; with --solve rounds the most to consider")
    ] = None,
    cohort: Annotated[
        float | None,
        typer.Option(help="expected users a round; with --solve cohort the most to consider"),
    ] = None,
    noise_multiplier: Annotated[
        float | None, typer.Option(help="z: standard deviation of the noise over the clip bound")
    ] = None,
    epsilon: Annotated[float | None, typer.Option(help="the budget ε")] = None,
    sampling: Annotated[str, typer.Option(help="poisson, fixed_size or all")] = "poisson",
    adjacency: Annotated[
        str | None,
        typer.Option(help="add_or_remove_one, replace_one or zero_out; default: the sampling's"),
    ] = None,
    solve: Annotated[
        str | None,
        typer.Option(
            help="epsilon, noise, delta, rounds (the most) or cohort (the largest) that the budget "
            "allows; default: whichever of ε and noise is not given"
        ),
    ] = None,
    format: BudgetFormat = "table",
    plot: PlotPath = None,
) -> None:
    """Say what a recipe costs, or what a budget allows.

    Budgets are held against the smallest ε that has a proof, as in a run: by PLD, or by RDP where
    PLD has none.
    """
    from fedpriv.privacy import planning
    from fedpriv.reporting import budget
    from fedpriv.reporting.strict_json import to_json

    _check_format(format, "table", "json", "csv")
    if plot is not None:
        budget.check_plot_path(plot)
    answer = planning.answer(
        planning.BudgetQuestion(
            population=population,
            deltas=tuple(delta or ()),
            rounds=rounds,
            cohort=cohort,
            noise_multiplier=noise_multiplier,
            epsilon=epsilon,
            sampling=sampling,
            adjacency=adjacency,
            solve=solve,
        )
    )
    if plot is not None:
        curves = planning.epsilon_curves(answer.recipe, answer.deltas[0])
        budget.plan_plot(answer, curves, plot)
    _say(answer.notes)
    if format == "table":
        console().print(budget.plan_table(answer))
    elif format == "json":
        sys.stdout.write(to_json(budget.plan_document(answer)))
    else:
        sys.stdout.write(budget.plan_csv(answer))


@budget_app.command()
def extrapolate(
    population: Population,
    cohort: Annotated[float, typer.Option(help="expected users a round S")],
    noise_multiplier: Annotated[float, typer.Option(help="z of the trained recipe")],
    rounds: Annotated[int, typer.Option(help="number of rounds")],
    delta: Annotated[float, typer.Option(help="δ")],
    scale_population: Annotated[str, typer.Option(help="factors, such as 1,10,100")] = "1",
    scale_cohort: Annotated[str, typer.Option(help="factors, such as 1,10,100")] = "1",
    accountant: Annotated[
        str, typer.Option(help="pld, which is tighter, where it has a proof; or rdp alone")
    ] = "pld",
    format: BudgetFormat = "table",
    plot: PlotPath = None,
) -> None:
    """Say what a recipe that trains well would cost with more users (Poisson sampling).

    The noise on the mean, z·C/S, is held fixed: z grows with the cohort S, and q = S/N.
    """
    from fedpriv.privacy import planning
    from fedpriv.reporting import budget
    from fedpriv.reporting.strict_json import to_json

    _check_format(format, "table", "json", "csv")
    if accountant not in ("rdp", "pld"):
        raise InputError(f"--accountant: write rdp or pld, not {accountant}")
    if plot is not None:
        budget.check_plot_path(plot)
    recipe = planning.Extrapolation(
        population=population,
        cohort=cohort,
        noise_multiplier=noise_multiplier,
        rounds=rounds,
        delta=delta,
        population_factors=_factors("--scale-population", scale_population),
        cohort_factors=_factors("--scale-cohort", scale_cohort),
        accountants=("rdp", "pld") if accountant == "pld" else ("rdp",),
    )
    grid = planning.extrapolate(recipe)
    if plot is not None:
        budget.grid_plot(recipe, grid, plot)
    _say(grid.notes)
    if format == "table":
        console().print(budget.grid_table(recipe, grid))
    elif format == "json":
        sys.stdout.write(to_json(budget.grid_rows(recipe, grid)))
    else:
        sys.stdout.write(budget.grid_csv(recipe, grid))


@ledger_app.command("show", epilog=_LEDGER)
def show_ledger(path: LedgerPath, format: LedgerFormat = "table") -> None:
    """Print the releases of a ledger, those that cost the same in one line, and their ε."""
    from fedpriv.reporting import ledgers
    from fedpriv.reporting.strict_json import to_json

    _check_format(format, "table", "json")
    opened = ledgers.open_ledger(path)
    bill = opened.account.bill(opened.account.header.delta)
    _say([*opened.notes, *ledgers.bill_notes(opened, bill)])
    if format == "json":
        sys.stdout.write(to_json(ledgers.ledger_document(opened, bill)))
    else:
        console().print(ledgers.ledger_table(opened, bill))


@ledger_app.command(epilog=_LEDGER)
def verify(path: LedgerPath, format: LedgerFormat = "table") -> None:
    """Check every line of a ledger, compute ε from it alone, and compare with the run's metrics."""
    from fedpriv.reporting import ledgers
    from fedpriv.reporting.strict_json import to_json

    _check_format(format, "table", "json")
    verified = ledgers.verify(path)
    _say([*verified.opened.notes, *ledgers.bill_notes(verified.opened, verified.bill)])
    if format == "json":
        sys.stdout.write(to_json(ledgers.verified_document(verified)))
    else:
        console().print(ledgers.verified_lines(verified), soft_wrap=True)


@ledger_app.command(epilog="PATHS: run directories or ledger files")
def merge(
    paths: Annotated[list[Path], typer.Argument(parser=file_or_folder, metavar="PATHS")],
    delta: Annotated[
        float | None, typer.Option(help="δ; by default the one that the ledgers share")
    ] = None,
    format: LedgerFormat = "table",
) -> None:
    """Say what several runs over one population cost its users, or its silos, together.

    Equal populations are taken to be the same people, or silos, the worst case: the runs compose in
    sequence.
    """
    from fedpriv.privacy import composition
    from fedpriv.privacy.planning import check_delta
    from fedpriv.reporting import ledgers
    from fedpriv.reporting.strict_json import to_json

    _check_format(format, "table", "json")
    if delta is not None:
        check_delta(delta)
    opened = [ledgers.open_ledger(path) for path in paths]
    for each in opened:
        each.require_complete()
    merged = composition.merge([each.account for each in opened], delta)
    _say(ledgers.merge_notes(opened, merged))
    if format == "json":
        sys.stdout.write(to_json(ledgers.merged_document(merged)))
    else:
        console().print(ledgers.merged_table(merged))


def _seeded(config: ExperimentConfig) -> ExperimentConfig:
    """Return the config with its seed model, which is pre-trained where it is missing."""
    # Asked before the imports, for which a run without a seed model need not wait.
    if config.seed_model is None:
        return config
    from fedpriv.experiment import stop_signal
    from fedpriv.reporting.progress import PretrainingLines
    from fedpriv.seed_model import with_seed_model

    again = "the same command goes on from there"
    with (
        _if_no_room(again),
        PretrainingLines(_errors) as lines,
        stop_signal(lines.say) as stop,
    ):
        try:
            return with_seed_model(config, lines, stop)
        except Interrupted as stopped:
            raise Interrupted(f"{stopped}; {again}") from None


@contextmanager
def _if_no_room(how_to_go_on: str) -> Iterator[None]:
    """Turn a full disk, which has cost nothing that was finished, into an interruption."""
    try:
        yield
    except (OSError, ClientFault) as error:
        if not has_no_room(error):
            raise
        raise Interrupted(f"{_no_room(error)}, then {how_to_go_on}") from None


def _no_room(error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) else "a worker could not write"
    where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
    return f"a disk is full ({where}{reason}); nothing that is finished is lost: make room"


@contextmanager
def _ray_starting(runtime: RuntimeConfig) -> Iterator[Callable[[], None]]:
    """Start the simulated nodes' cluster, beside the imports and the rest that a run needs.

    Yields what waits for it. A failure is told before the cluster is waited for and shut down,
    which takes seconds.
    """
    if runtime.deployment or runtime.grid == "local":
        yield lambda: None
        return
    from fedpriv.federation.ray_cluster import cluster, ensure_started

    with cluster(runtime):
        try:
            yield lambda: ensure_started(runtime)
        except FedprivError as error:
            _tell(error)
            sys.exit(error.exit_code)


def _train(directory: RunDirectory, prepared: Experiment) -> None:
    """Run the rounds that are left; the report is written also where the run was stopped."""
    from fedpriv import experiment
    from fedpriv.reporting.progress import ProgressLines

    how_to_go_on = f"continue with: fedpriv resume {in_a_shell(directory.path)}"
    with _if_no_room(how_to_go_on):
        try:
            with ProgressLines(_errors) as progress:
                experiment.train(prepared, directory, progress)
        except (BudgetError, Interrupted) as stopped:
            if directory.read_metrics():
                _conclude([directory.path])
                _show_profile(prepared, directory)
            if isinstance(stopped, Interrupted):
                raise Interrupted(f"{stopped}; {how_to_go_on}") from None
            raise
        _conclude([directory.path])
        _show_profile(prepared, directory)


def _show_profile(prepared: Experiment, directory: RunDirectory) -> None:
    if prepared.config.runtime.profile and not prepared.finished:
        _errors.print(prepared.profile.table())
        print_lines(_errors, f"trace: {directory.trace}")


def _conclude(directories: list[Path], output: Path | None = None) -> None:
    from fedpriv.reporting.picture import write_picture
    from fedpriv.reporting.report import write_report
    from fedpriv.reporting.summary import summary_table

    written = write_report(directories, output)
    console().print(summary_table(directories))
    for directory in directories:
        print_lines(_errors, f"plot: {write_picture(directory)}")
    print_lines(_errors, f"report: {written}")


def _check_format(value: str, *formats: str) -> None:
    if value not in formats:
        raise InputError(f"--format: write {', '.join(formats[:-1])} or {formats[-1]}, not {value}")


def _say(notes: Iterable[str]) -> None:
    print_lines(_errors, *(f"note: {note}" for note in notes))


def _factors(option: str, text: str) -> tuple[float, ...]:
    """Return the numbers in a list such as 1,10,100."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(
            f"{option}: write numbers with commas between, such as 1,10,100, got {text!r}"
        ) from None


def _tell(error: FedprivError) -> None:
    if isinstance(error, Interrupted):
        print_lines(_errors, str(error))
    else:
        _complain(str(error))


def _complain(reason: str) -> None:
    print_lines(_errors, Text.assemble(("error:", "bold red"), f" {one_line(reason)}"))


def _flush() -> None:
    """Write what is left of the output, while it can still be told that there is no room for it.

    Raises:
        OSError: there is none, and what was left is given up; a reader who has gone is no error.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise


def main() -> None:
    """Run the command line; every expected failure is one line and an exit code."""
    let_print_anything()
    # A notebook's backend, say: it need not be installed here, where files alone are drawn.
    os.environ.pop("MPLBACKEND", None)
    try:
        try:
            app()
        finally:
            _flush()
    except FedprivError as error:
        _tell(error)
        sys.exit(error.exit_code)
    except OSError as error:
        if not has_no_room(error):
            raise
        _complain(_no_room(error))
        sys.exit(FedprivError.exit_code)
    except KeyboardInterrupt:
        print_lines(_errors, "abandoned")
        sys.exit(Interrupted.exit_code)
