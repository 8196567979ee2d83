"""`run`, `pretrain`, `resume`, `report` and `audit`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer
from rich.text import Text

from fedpriv.cli.common import (
    CONFIG,
    ConfigPath,
    LedgerFormat,
    Overrides,
    abandon,
    check_format,
    errors,
    file_or_folder,
    say,
    tell,
)
from fedpriv.disk import has_no_room, no_room, write_whole
from fedpriv.errors import (
    BudgetError,
    ClaimRefuted,
    ClientFault,
    FedprivError,
    InputError,
    Interrupted,
    WorkerLost,
)
from fedpriv.reporting.terminal import console, in_a_shell, one_line, print_lines, saying, working

if TYPE_CHECKING:
    from fedpriv.config import ExperimentConfig
    from fedpriv.experiment import Experiment
    from fedpriv.reporting.run_directory import RunDirectory
    from fedpriv.runtime import RuntimeConfig

runs_app = typer.Typer()

Verbose = Annotated[
    bool, typer.Option("--verbose", help="a line for each round, not for evaluations alone")
]


@runs_app.command(epilog=CONFIG)
def run(
    config: ConfigPath,
    overrides: Overrides = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="show where the time goes, and write trace.json")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Train as CONFIG says, in a new run directory."""
    from fedpriv.config_files import load_config
    from fedpriv.preparation import plan_for, ready_trainer
    from fedpriv.reporting.run_directory import require_empty

    overrides = [*(overrides or []), *(["runtime.profile=true"] if profile else [])]
    settings = load_config(config, overrides)
    if settings.run_dir is not None:
        require_empty(settings.run_dir)
    settings = _seeded(settings)
    with saying(errors, "reading the data"):
        settings, trainer = ready_trainer(settings)
    with _ray_starting(settings.runtime) as wait_for_ray:
        from fedpriv import experiment

        with working(errors, "computing ε"):
            prepared = experiment.complete(plan_for(settings, trainer), trainer)
        wait_for_ray()  # where it does not start nothing should be left behind
        _train(experiment.create(prepared), prepared, verbose)


@runs_app.command(epilog=CONFIG)
def pretrain(config: ConfigPath, overrides: Overrides = None) -> None:
    """Make CONFIG's seed model from public data, without privacy; `run` does so when needed."""
    from fedpriv import seed_model
    from fedpriv.config_files import load_config
    from fedpriv.reporting.summary import seed_model_table

    settings = load_config(config, overrides or [])
    if settings.seed_model is None or settings.seed_model.pretrain is None:
        raise InputError(f"{config}: write seed_model.pretrain, which says how to train it")
    path = seed_model.seed_path(settings)
    if path.exists():
        say([f"{path} is there already; remove it to train it again"])
    _seeded(settings)
    origin = seed_model.origin_of(settings)
    console().print(seed_model_table(seed_model.read_measures(path), origin))
    print_lines(errors, f"seed model: {path}")


@runs_app.command(epilog="DIRECTORY: the folder of a run")
def resume(
    directory: Annotated[Path, typer.Argument(parser=file_or_folder, metavar="DIRECTORY")],
    verbose: Verbose = False,
) -> None:
    """Continue an interrupted run, on the same ledger."""
    from fedpriv import experiment

    with saying(errors, "reading the run and its data"):
        reopened = experiment.reopen(directory)
    _train(*reopened, verbose)


@runs_app.command(epilog="DIRECTORIES: one or more run directories")
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
    from fedpriv.reporting.own_files import require_replaceable
    from fedpriv.reporting.report import render
    from fedpriv.reporting.run_directory import require_no_record

    check_format(format, "html", "md", "json", "csv")
    if output is not None:
        require_no_record(output, "--output")
        require_replaceable(output, "--output")
    if format == "html":
        _conclude(directories, output)
        return
    with working(errors, "computing ε from the ledger"):
        text = render(directories, cast(Literal["md", "json", "csv"], format))
    if output is None:
        sys.stdout.write(text)
        return
    try:
        write_whole(output, text)
    except OSError as error:
        raise InputError(f"--output: cannot write {output} ({error.strerror})") from None


@runs_app.command(epilog=CONFIG)
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
    from fedpriv.config_files import load_config
    from fedpriv.experiment import stop_signal
    from fedpriv.reporting import audit as reporting
    from fedpriv.reporting.progress import AuditLines
    from fedpriv.reporting.run_directory import RunDirectory

    check_format(format, "table", "json")
    settings = load_config(config, overrides or [])
    wanted = auditing.AuditSettings(canaries, rounds, confidence)
    auditing.check(settings, wanted)
    settings = _seeded(settings)
    if run_dir is not None:
        begun = RunDirectory.open(run_dir).config_to_continue()
        settings = settings.begun_with(begun.model.frozen_sha256, begun.model.start_sha256)
        if begun.fingerprint("") != settings.fingerprint(""):
            raise InputError(f"--run: {run_dir} is a run of another configuration than {config}")
    with AuditLines(errors) as lines, stop_signal(lambda said: say([said])) as stop:
        found = auditing.audit(settings, wanted, lines, stop)
    if run_dir is not None:
        written = reporting.write_audit(run_dir, found)
        say([f"{written}: shown by fedpriv report {in_a_shell(run_dir)}"])
    if format == "json":
        sys.stdout.write(reporting.audit_document(found))
    else:
        console().print(reporting.audit_table(found))
    verdict = reporting.audit_verdict(found)
    if not found.holds:
        raise ClaimRefuted(verdict)
    print_lines(errors, verdict)


def _seeded(config: ExperimentConfig) -> ExperimentConfig:
    """Return the config with its seed model, which is pre-trained where it is missing."""
    # Asked before the imports, for which a run without a seed model need not wait.
    if config.seed_model is None:
        return config
    from fedpriv.experiment import stop_signal
    from fedpriv.reporting.progress import PretrainingLines
    from fedpriv.seed_model import with_seed_model

    again = "the same command continues from there"
    with (
        _if_no_room(again),
        PretrainingLines(errors) as lines,
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
        raise Interrupted(f"{no_room(error)}, then {how_to_go_on}") from None


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
            tell(error)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            abandon()


def _train(directory: RunDirectory, prepared: Experiment, verbose: bool) -> None:
    """Run the rounds that are left; the report is written also where the run was stopped."""
    from fedpriv import experiment
    from fedpriv.reporting.progress import lines_of

    how_to_go_on = f"continue with: fedpriv resume {in_a_shell(directory.path)}"
    with _if_no_room(how_to_go_on):
        try:
            # Ray prints what dies, and whoever's code it is may print, where documents go.
            lines = lines_of(prepared.config, errors, verbose)
            with lines as progress, redirect_stdout(sys.stderr):
                experiment.train(prepared, directory, progress)
        except (BudgetError, Interrupted) as stopped:
            if directory.read_metrics():
                _conclude([directory.path])
                _show_profile(prepared, directory)
            if isinstance(stopped, Interrupted):
                raise Interrupted(f"{stopped}; {how_to_go_on}") from None
            raise
        except WorkerLost as lost:
            raise WorkerLost(f"{lost}; {how_to_go_on}") from None
        _conclude([directory.path], finished=True)
        _show_profile(prepared, directory)


def _show_profile(prepared: Experiment, directory: RunDirectory) -> None:
    if prepared.config.runtime.profile and not prepared.finished:
        errors.print(prepared.profile.table())
        print_lines(errors, f"trace: {directory.trace}")


def _conclude(directories: list[Path], output: Path | None = None, finished: bool = False) -> None:
    """Write the report and say what came out: a sentence of one run, a table of several."""
    from fedpriv.reporting.conclusion import conclusion, next_steps
    from fedpriv.reporting.picture import write_picture
    from fedpriv.reporting.reader import read_run
    from fedpriv.reporting.report import write_report
    from fedpriv.reporting.spent import spent
    from fedpriv.reporting.summary import summary_table

    with working(errors, "writing the report"):
        written = write_report(directories, output)
        pictures = [write_picture(directory) for directory in directories]
    run = read_run(directories[0])
    if len(directories) == 1:
        console().print(Text(one_line(conclusion(run, spent(run)))))
    else:
        console().print(summary_table(directories))
    print_lines(errors, *(f"plot: {picture}" for picture in pictures), f"report: {written}")
    if finished:
        print_lines(errors, *next_steps(run))
