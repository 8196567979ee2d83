import io
import re

import pytest
from in_process import SILOS, small_config
from rich.console import Console

from fedpriv import experiment
from fedpriv.reporting.progress import AuditLines, ProgressLines
from fedpriv.reporting.wording import KNOWN_SEED


def row(round_: int, epsilon: float | None, **changes) -> dict:
    seen = {"cohort": 7, "loss": 1.5, "users_per_second": 90.0, "non_finite": 0, "skipped": 0}
    return {
        "round": round_,
        "epsilon": {"rdp": epsilon},
        "delta": 1e-3,
        "nodes_lost": 0,
        "simulation_only": seen,
    } | changes


def shown(*rows: dict, verbose: bool = True, **config) -> str:
    text = io.StringIO()
    with ProgressLines(Console(file=text, width=40), verbose) as progress:
        progress.begin(experiment.prepare(small_config(**config)))
        for each in rows:
            progress.finished(each)
    return text.getvalue()


def test_a_round_is_one_line_with_its_price() -> None:
    text = shown(row(1, 0.5), row(2, 0.75, held_out={"accuracy": 0.81234, "loss": 1.0}))
    lines = text.splitlines()
    known, seen = (
        "(simulation with a known seed)",
        "simulation only: cohort 7, loss 1.500, 90 users/s",
    )
    assert f"round 1/4  ε 0.500 by RDP, δ 0.001 {known}  {seen}" in lines
    assert f"round 2/4  accuracy 81.2%  ε 0.750 by RDP, δ 0.001 {known}  {seen}" in lines
    assert any("all rounds will cost ε = " in line for line in lines)
    assert "users are trained 64 at a time" in lines
    one_by_one = shown(runtime__engine="sequential").splitlines()
    assert "users are trained one after another" in one_by_one


def test_each_threshold_of_the_budget_is_said_once() -> None:
    budget = {"privacy__budget": {"epsilon": 4.0}}
    text = shown(row(1, 1.9), row(2, 2.1), row(3, 3.7), row(4, 3.9), **budget)
    said = [line for line in text.splitlines() if "of the budget of ε = 4 spent" in line]
    assert [line.split()[0] for line in said] == ["50%", "75%", "90%", "95%"]


def test_the_tightest_accountant_is_shown_and_says_how_much_of_the_budget_is_spent() -> None:
    budget = {"privacy__budget": {"epsilon": 4.0}, "privacy__accountants": ["rdp", "pld"]}
    tight = row(2, 3.7, held_out={"accuracy": 0.5, "loss": 1.0})
    tight["epsilon"]["pld"] = 2.1
    text = shown(row(1, 3.1), tight, **budget)
    assert "ε 3.100 by RDP, δ" in text
    assert "ε 2.100 by PLD, δ" in text
    said = [line for line in text.splitlines() if "of the budget of ε = 4 spent" in line]
    assert [line.split()[0] for line in said] == ["50%"]


def test_what_promises_little_is_said_before_the_first_round() -> None:
    text = shown(privacy__noise_multiplier=0.5, privacy__delta=1e-2, rounds=40)
    assert "δ = 0.01 is 0.6 times 1/population" in text
    assert "is above 10: weak to none" in text
    assert "is above 10" not in shown(privacy__noise_multiplier=9.0, privacy__delta=1e-4)


def test_losses_are_said() -> None:
    broken = row(1, 0.5, nodes_lost=1)
    broken["simulation_only"] |= {"non_finite": 2, "skipped": 5}
    text = shown(broken)
    assert "1 node lost" in text
    assert "2 users contributed nothing" in text
    assert "5 examples skipped" in text


def test_a_round_in_which_nobody_was_trained_has_no_loss() -> None:
    nobody = row(1, 0.5)
    nobody["simulation_only"] |= {"loss": None, "norm": None, "clipped": None}
    assert "simulation only: cohort 7, nobody trained" in shown(nobody)


def test_silos_are_called_silos() -> None:
    broken = row(1, 0.5, silos={"median": 0.25})
    broken["simulation_only"] |= {"non_finite": 2}
    text = shown(broken, **SILOS, privacy__budget={"epsilon": 4.0})
    assert "3 rounds of 3 silos expected" in text
    spent = "ε of the worst silo 0.500 by RDP, of the median one 0.250 by RDP, δ 0.001 (simulation"
    assert spent in text
    assert "simulation only: cohort 7, loss 1.500, 90 silos/s" in text
    assert "2 silos contributed nothing" in text
    # Those that are drawn seldom reach the budget later, or never.
    assert "can stop the run as early as after round 1 of 3" in text
    assert "users" not in text.split("model vit")[1]


def test_speech_is_measured_in_word_errors() -> None:
    text = shown(row(1, 0.5, held_out={"wer": 0.1234, "cer": 0.05, "loss": 1.0}))
    assert "WER 12.3%  ε 0.500" in text


def test_a_run_without_privacy_says_so_and_a_deployment_shows_nothing_of_users() -> None:
    text = shown(row(1, None), privacy=None)
    assert "WITHOUT PRIVACY" in text
    assert "no privacy" in text
    deployed = row(1, 0.5)
    del deployed["simulation_only"]
    assert "cohort" not in shown(deployed).splitlines()[-1]


# ---------------------------------------------------------------- what is shown, and how wide


def test_there_is_a_line_for_each_evaluation_and_for_rounds_that_lack_a_node() -> None:
    rows = [row(1, 0.5), row(2, 0.6, held_out={"accuracy": 0.8}), row(3, 0.7, nodes_lost=1)]
    brief, all_ = (shown(*rows, verbose=verbose) for verbose in (False, True))
    said = [
        [line[:9] for line in text.splitlines() if line.startswith("round ")]
        for text in (brief, all_)
    ]
    assert said == [["round 2/4", "round 3/4"], ["round 1/4", "round 2/4", "round 3/4"]]


@pytest.mark.parametrize("width", [120, 80, 60, 45])
@pytest.mark.parametrize("payer", ["", "silos"])
def test_on_a_terminal_what_does_not_fit_is_left_out_whole(width, payer) -> None:
    last = row(4, 12.345, held_out={"accuracy": 0.81234, "loss": 1.0})
    last["simulation_only"] |= {"cohort": 123_456, "users_per_second": 98_765.0}
    if payer:
        last[payer] = {"median": 6.789}
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    with ProgressLines(console) as progress:
        progress._rounds = 4
        progress._seeded, progress._known = True, f" ({KNOWN_SEED})"
        progress.finished(last)
        lines = progress._line(last).plain.splitlines()
    assert all(len(line) <= width for line in lines)
    text = "  ".join(lines)
    assert "accuracy 81.2%" in text
    assert re.search(r"12\.345.{3,20}known seed", text)
    assert len(lines) == 1 or width < 80
    whole = {"4", "81.2", "12.345", "0.001", "123456", "1.500", "98765", "6.789"}
    assert set(re.findall(r"\d[\d.]*", text)) <= whole
    assert "123456" not in text or "simulation only: cohort 123456" in text


def test_the_bar_of_a_narrow_terminal_keeps_to_one_line() -> None:
    text = io.StringIO()
    console = Console(file=text, width=80, force_terminal=True, color_system=None)
    with ProgressLines(console) as progress:
        progress._progress.update(progress._task, total=12_345)
        progress.finished(row(12_344, 12.345, silos={"median": 6.789}))
        shown_now = console.render_lines(progress._progress.get_renderable())
    bars = ["".join(part.text for part in line) for line in shown_now]
    assert len(bars) == 1
    assert "12344/12345" in bars[0]
    assert "…" not in bars[0]


def test_an_audit_in_a_pipe_says_each_stage_and_each_tenth_of_the_rounds() -> None:
    console = Console(file=io.StringIO(), width=80)
    with AuditLines(console) as lines:
        lines.begin(25)
        for round_ in range(1, 26):
            lines.finished(round_)
    first, begun, *rounds, last = console.file.getvalue().splitlines()
    assert (first, begun) == ("reading the data and drawing canaries", "auditing 25 rounds")
    assert rounds[0] == "audited round  3/25"
    assert rounds[-2:] == ["audited round 24/25", "audited round 25/25"]
    assert len(rounds) == 9
    assert last == "computing ε and its lower bound"
