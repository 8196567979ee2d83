"""The one sentence with which a run ends on the terminal, and what to do next."""

from __future__ import annotations

from fedpriv.privacy.figures import epsilon_text
from fedpriv.reporting.reader import Run, run_labels
from fedpriv.reporting.spent import Spent
from fedpriv.reporting.terminal import in_a_shell
from fedpriv.reporting.wording import beside_epsilon


def conclusion(run: Run, account: Spent) -> str:
    """Return what a run came to: how good, and at which ε; ε is computed anew from the ledger."""
    measured = run.measured
    good = f"{measured.quality.name} {measured.told}" if measured.values else "not measured yet"
    begun = f"{run_labels([run])[0]}: {good}"
    if not run.private:
        return f"{begun} WITHOUT PRIVACY"
    contradicted = " ITS METRICS OR CONFIG CONTRADICT ITS LEDGER: see the report." * bool(
        account.disagreements
    )
    if run.unclaimed:
        return f"{begun}. Nothing can be claimed: {run.unclaimed}.{contradicted}"
    decides, payer = min(account.epsilons, key=account.epsilons.__getitem__), run.mechanism.payer
    whose = f" of the worst {payer}" if payer else ""
    whole = f", of all {run.config.rounds:,} planned rounds" if run.ahead else ""
    whole = ", of the tuning that chose it" if run.choice else whole
    return (
        f"{begun} at ε = {epsilon_text(account.epsilons[decides])}{whose} ({decides.upper()}"
        f"{whole}), δ = {run.delta:g}{beside_epsilon(run.seeded)}{'.' if contradicted else ''}"
        f"{contradicted}"
    )


def next_steps(run: Run) -> tuple[str, ...]:
    """Return commands that one may want after a run."""
    here = in_a_shell(run.path)
    return (
        f"next: fedpriv export {here}",
        f"      fedpriv report {here} ANOTHER",
        f"      fedpriv ledger verify {here}",
    )
