"""`budget`: plan what privacy costs, before a run."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedpriv.cli.common import Overrides, check_format, errors, file_or_folder, say
from fedpriv.errors import InputError
from fedpriv.reporting.terminal import console, working

if TYPE_CHECKING:  # commands import what they need
    from fedpriv.privacy.factorizations import Workload

budget_app = typer.Typer(help="Plan what privacy costs, before a run.", no_args_is_help=True)

Population = Annotated[int, typer.Option(help="number of users N")]
BudgetFormat = Annotated[str, typer.Option("--format", help="table, json or csv")]
PlotPath = Annotated[
    Path | None,
    typer.Option(
        "--plot", parser=file_or_folder, metavar="FILE", help="also draw it: FILE.png or .svg"
    ),
]


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
    sampling: Annotated[
        str, typer.Option(help="poisson, fixed_size, all, random_allocation or min_separation")
    ] = "poisson",
    separation: Annotated[
        int | None,
        typer.Option(
            help="with --sampling min_separation: of how many rounds a user is in one at most; "
            "default: N/cohort, and with --noise correlated 1, 2, 4, ... of it"
        ),
    ] = None,
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
    bands: Annotated[
        int, typer.Option(help="of correlated noise: as privacy.mechanism.bands; 1: independent")
    ] = 1,
    noise: Annotated[
        str,
        typer.Option(
            help="correlated: with --epsilon, try bands for this run and say which of them pays"
        ),
    ] = "independent",
    factorization: Annotated[
        str, typer.Option(help="of correlated noise: optimized, square_root, bisr or blt")
    ] = "optimized",
    momentum: Annotated[float, typer.Option(help="of the server, for --noise correlated")] = 0.0,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            parser=file_or_folder,
            metavar="CONFIG",
            help="for --noise correlated, in place of --momentum: the config whose server, with "
            "its schedule and momentum, uses the noise",
        ),
    ] = None,
    overrides: Overrides = None,
    format: BudgetFormat = "table",
    plot: PlotPath = None,
) -> None:
    """Say what a recipe costs, or what a budget allows.

    Budgets are held against the smallest ε that has a proof, as in a run: by PLD, or by RDP where
    PLD has none.
    """
    from fedpriv.privacy import band_planning, planning
    from fedpriv.reporting import budget
    from fedpriv.reporting.strict_json import to_json

    check_format(format, "table", "json", "csv")
    if plot is not None:
        budget.check_plot_path(plot)
    if noise not in ("independent", "correlated"):
        raise InputError(f"--noise: write independent or correlated, not {noise}")
    question = planning.BudgetQuestion(
        population=population,
        deltas=tuple(delta or ()),
        rounds=rounds,
        cohort=cohort,
        noise_multiplier=noise_multiplier,
        epsilon=epsilon,
        sampling=sampling,
        adjacency=adjacency,
        solve=solve,
        bands=bands,
        separation=separation,
        factorization=factorization,
    )
    with working(errors, "computing ε"):
        question = replace(question, workload=_workload(rounds, momentum, config, overrides))
        tried = band_planning.choices(question) if noise == "correlated" else ()
        if tried:
            question = band_planning.chosen(question, tried)
        answer = planning.answer(question)
        if plot is not None:
            curves = planning.epsilon_curves(answer.recipe, answer.deltas[0])
            budget.plan_plot(answer, curves, plot)
    say((*answer.notes, *budget.which_pays(tried, cohort)))
    if format == "table":
        if tried:
            console().print(budget.choices_table(tried))
        console().print(budget.plan_table(answer))
    elif format == "json":
        sys.stdout.write(to_json(budget.plan_document(answer, tried)))
    else:
        sys.stdout.write(budget.plan_csv(answer))


def _workload(
    rounds: int | None, momentum: float, config: Path | None, overrides: list[str] | None
) -> Workload | None:
    """Return what the server makes of the noise, as a run makes it; None for the prefix sums.

    Raises:
        InputError: momentum or settings that there are not, or not for this.
    """
    if not 0 <= momentum < 1:
        raise InputError(f"--momentum: write a number from 0 to below 1, got {momentum:g}")
    if config is None and overrides:
        raise InputError("--set: goes with --config, of whose server it changes a setting")
    if rounds is None or (config is None and not momentum):
        return None
    if config is None:
        from fedpriv.privacy.factorizations import Workload

        return Workload((1.0,) * rounds, momentum)
    if momentum:
        raise InputError("--config has a server with a momentum of its own; leave out --momentum")
    from fedpriv.config_files import load_config
    from fedpriv.federation.plan import workload_of

    return workload_of(load_config(config, overrides or ()).server, rounds)


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
    from fedpriv.privacy import extrapolation
    from fedpriv.reporting import budget
    from fedpriv.reporting.strict_json import to_json

    check_format(format, "table", "json", "csv")
    if accountant not in ("rdp", "pld"):
        raise InputError(f"--accountant: write rdp or pld, not {accountant}")
    if plot is not None:
        budget.check_plot_path(plot)
    recipe = extrapolation.Extrapolation(
        population=population,
        cohort=cohort,
        noise_multiplier=noise_multiplier,
        rounds=rounds,
        delta=delta,
        population_factors=_factors("--scale-population", scale_population),
        cohort_factors=_factors("--scale-cohort", scale_cohort),
        accountants=("rdp", "pld") if accountant == "pld" else ("rdp",),
    )
    with working(errors, "computing ε"):
        grid = extrapolation.extrapolate(recipe)
    if plot is not None:
        budget.grid_plot(recipe, grid, plot)
    say(grid.notes)
    if format == "table":
        console().print(budget.grid_table(recipe, grid))
    elif format == "json":
        sys.stdout.write(to_json(budget.grid_rows(recipe, grid)))
    else:
        sys.stdout.write(budget.grid_csv(recipe, grid))


def _factors(option: str, text: str) -> tuple[float, ...]:
    """Return the numbers in a list such as 1,10,100."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(
            f"{option}: write numbers with commas between, such as 1,10,100, got {text!r}"
        ) from None
