"""ε from the ledger alone, and contradictions."""

import json
from pathlib import Path

import dp_accounting
import pytest
from dp_accounting import pld, rdp

from fedpriv.reporting.reader import read_run
from fedpriv.reporting.spent import rdp_by_round, spent

EVENT = dp_accounting.PoissonSampledDpEvent(0.05, dp_accounting.GaussianDpEvent(1.1))


def test_epsilon_is_that_of_dp_accounting(make_run) -> None:
    account = spent(read_run(make_run()))
    for name, accountant in (("rdp", rdp.RdpAccountant()), ("pld", pld.PLDAccountant())):
        accountant.compose(EVENT, 6)
        # And what rounding may have taken from it.
        assert account.epsilons[name] == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-6)
        assert account.epsilons[name] >= accountant.get_epsilon(1e-5)
    assert account.disagreements == ()


def test_epsilon_by_round_is_what_the_run_logged(make_run) -> None:
    run = read_run(make_run(attempts={3: 2}))
    logged = [row["epsilon"]["rdp"] for row in run.rows]
    assert rdp_by_round(run) == pytest.approx(logged)
    assert spent(run).disagreements == ()


def test_a_run_without_privacy_has_no_epsilon(make_run) -> None:
    assert spent(read_run(make_run(privacy=None))).epsilons == {}


def test_no_noise_is_no_privacy(make_run) -> None:
    account = spent(read_run(noiseless(make_run)))
    assert account.epsilons == {}
    assert account.disagreements == ()


def noiseless(make_run) -> Path:
    return make_run(
        "noiseless",
        privacy={
            "delta": 1e-5,
            "noise_multiplier": 0.0,
            "sampling": {"kind": "poisson", "expected_cohort": 100},
            "clipping": {"kind": "global", "bound": 0.5},
        },
    )


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_metrics_that_contradict_the_ledger_are_reported(make_run, factor: float) -> None:
    path = make_run()
    _scale_last_epsilon(path, factor)
    (found,) = spent(read_run(path)).disagreements
    assert "RDP" in found
    assert "after round 6" in found


def test_a_changed_config_is_reported(make_run) -> None:
    path = make_run()
    config = path / "config.yaml"
    config.write_text(config.read_text().replace("noise_multiplier: 1.1", "noise_multiplier: 9.0"))
    run = read_run(path)
    (found,) = spent(run).disagreements
    assert found.startswith("config.yaml is not")
    assert spent(run).epsilons["rdp"] == pytest.approx(run.rows[-1]["epsilon"]["rdp"])


def test_an_uncharged_round_is_reported(make_run) -> None:
    path = make_run()
    ledger = path / "ledger.jsonl"
    ledger.write_text("".join(ledger.read_text().splitlines(keepends=True)[:-1]))
    assert any("charges nothing for 1" in each for each in spent(read_run(path)).disagreements)


def _scale_last_epsilon(path: Path, factor: float) -> None:
    metrics = path / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    rows[-1]["epsilon"]["rdp"] *= factor
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
