"""The head of a report, its cautions, the classes, and what is signed."""

import json
import math
import re

import pytest
import torch
from scipy import stats

from fedpriv.privacy.ledger import read_ledger
from fedpriv.reporting.overview import class_rows, interval_of
from fedpriv.reporting.reader import read_run
from fedpriv.reporting.report import render, write_report
from fedpriv.reporting.spent import spent
from fedpriv.reporting.statement import privacy_statement
from fedpriv.reporting.wording import KNOWN_SEED
from fedpriv.training.checkpoint import Checkpoint, digest_of, save_checkpoint

BY_CLASS = {"examples": [4, 6, 0], "right": [4, 3, 0], "answers": [5, 5, 0]}


def cautions_of(path) -> tuple[str, ...]:
    run = read_run(path)
    return privacy_statement(run, spent(run)).cautions


def change_rows(path, change) -> None:
    metrics = path / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    for row in rows:
        change(row)
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))


def set_facts(path, **facts) -> None:
    environment = json.loads((path / "environment.json").read_text())
    (path / "environment.json").write_text(json.dumps(environment | {"data_facts": facts}))


def overview_of(path) -> dict:
    return json.loads(render([path], "json"))["runs"][0]["overview"]


# ---------------------------------------------------------------- the head


def test_the_accountant_that_decides_comes_first_and_the_other_is_folded(make_run) -> None:
    path = make_run()
    text = write_report([path]).read_text()
    epsilons = json.loads(render([path], "json"))["runs"][0]["epsilon"]
    assert epsilons["pld"] < epsilons["rdp"]
    assert overview_of(path)["decides"]["accountant"] == "pld"
    assert text.index('id="epsilon-pld"') < text.index("<details><summary>By RDP, a larger bound")
    assert text.index("<details><summary>By RDP") < text.index('id="epsilon-rdp"')


def test_a_page_has_figures_before_paragraphs_and_speed_last(make_run) -> None:
    text = write_report([make_run()]).read_text()
    order = ["summary", "guarantee", "figures", "classes", "settings", "statement", "sign-off"]
    places = [text.index(f'<section id="{name}"') for name in [*order, "speed"]]
    assert places == sorted(places)
    assert text.index('<figure id="quality-by-epsilon"') < places[1]
    assert text.index('<figure id="throughput"') > places[-1]


def test_it_says_in_which_sense_epsilon_holds(make_run) -> None:
    simulated, deployed = make_run(), make_run("d", runtime={"deployment": True})
    assert overview_of(simulated)["badge"] == KNOWN_SEED
    assert overview_of(deployed)["badge"] == "deployment"
    assert "this run protects nobody" in " ".join(overview_of(simulated)["plain"])
    assert "protects nobody" not in render([deployed], "md")
    assert "never stored" in " ".join(overview_of(deployed)["plain"])


def test_the_factor_is_that_of_epsilon_rounded_up(make_run) -> None:
    path = make_run()
    epsilon = json.loads(render([path], "json"))["runs"][0]["epsilon"]["pld"]
    (said,) = re.findall(r"more than ([\d.,]+) times as likely", render([path], "md"))
    assert math.exp(epsilon) <= float(said.replace(",", "")) <= 1.1 * math.exp(epsilon)


def test_where_lines_of_the_ledger_are_missing_no_epsilon_stands_at_the_head(make_run) -> None:
    path = make_run()
    lines = (path / "ledger.jsonl").read_text().splitlines(keepends=True)
    (path / "ledger.jsonl").write_text("".join(lines[:-1]))
    assert (overview_of(path)["epsilon"], overview_of(path)["decides"]) == ("unknown", None)
    text = write_report([path]).read_text()
    assert "<data" not in text
    assert '<figure id="epsilon">' not in text
    assert "no ε of what is left is an upper bound" in text
    assert json.loads(render([path], "json"))["runs"][0]["epsilon"] == {}


def test_how_sure_a_measure_is_is_said_or_that_nobody_knows(make_run) -> None:
    path = make_run()
    assert interval_of(read_run(path)) is None
    assert "was not recorded" in " ".join(overview_of(path)["plain"])
    change_rows(path, lambda row: row.get("held_out", {}).update(examples=300))
    right = stats.binomtest(240, 300).proportion_ci(method="wilson")
    assert interval_of(read_run(path)) == pytest.approx((right.low, right.high), abs=1e-6)
    said = f"95% interval of {right.low:.1%} to {right.high:.1%}"
    assert said in " ".join(overview_of(path)["plain"])


def test_of_words_the_interval_is_the_recorded_one(make_run) -> None:
    path = make_run()

    def speak(row) -> None:
        if "held_out" in row:
            row["held_out"] = {"wer": 0.2, "wer_low": 0.15, "wer_high": 0.26, "words": 300}

    change_rows(path, speak)
    assert "20.0%, with a 95% interval of 15.0% to 26.0%" in " ".join(overview_of(path)["plain"])


# ---------------------------------------------------------------- cautions


def test_a_run_as_it_should_be_has_none(make_run) -> None:
    assert cautions_of(make_run()) == ()


def test_a_large_delta_and_a_large_epsilon_are_said(make_run) -> None:
    weak = {
        "delta": 4e-4,
        "noise_multiplier": 0.4,
        "sampling": {"kind": "poisson", "expected_cohort": 1000},
        "clipping": {"kind": "global", "bound": 0.5},
    }
    of_delta, of_epsilon = cautions_of(make_run(privacy=weak))
    assert of_delta.startswith("δ = 0.0004 is 0.8 times 1/population")
    assert re.match(rf"ε = \d+\.\d{{3}} \({KNOWN_SEED}\) is above 10: weak to none", of_epsilon)


def test_rounds_that_lost_nodes_or_released_noise_alone_are_said(make_run) -> None:
    path = make_run()

    def lose(row) -> None:
        row["nodes_lost"] = int(row["round"] in (2, 3, 5))
        if row["round"] == 5:
            row["noise_only"] = True

    change_rows(path, lose)
    silent, lost = cautions_of(path)
    assert silent.startswith("1 of 6 rounds (5) released noise alone")
    assert lost.startswith("2 of 6 rounds (2–3) lost nodes")
    for text in (render([path], "md"), write_report([path]).read_text()):
        assert lost in text


def test_a_run_that_is_not_finished_says_so_and_one_without_privacy_promises_nothing(
    make_run,
) -> None:
    path = make_run(privacy=None)
    metrics = path / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-1]))
    (said,) = cautions_of(path)
    assert said.startswith("Finished: 5 of 6 planned rounds;")
    assert "ε" not in said


def test_a_private_run_that_stopped_says_what_holds_if_its_releases_were_the_reason(
    make_run,
) -> None:
    path = make_run()
    metrics = path / "metrics.jsonl"
    assert not any(said.startswith("Finished") for said in cautions_of(path))
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-1]))
    (said,) = [each for each in cautions_of(path) if each.startswith("Finished")]
    assert said.endswith("what may be claimed is the ε of all planned rounds alone.")


# ---------------------------------------------------------------- classes


@pytest.mark.parametrize("held_out", ["others", "made_up", "unnamed", "same", "unknown"])
def test_single_classes_are_shown_of_public_data_alone(make_run, held_out) -> None:
    path = make_run()
    set_facts(path, held_out=held_out)
    change_rows(path, lambda row: row.update(by_class=BY_CLASS) if "held_out" in row else None)
    rows = class_rows(read_run(path))
    text = write_report([path]).read_text()
    if held_out in ("same", "unknown"):
        assert rows == []
        assert "Single classes are not shown: the held-out examples are of" in text
        return
    assert [(row.number, row.examples) for row in rows] == [(1, 6), (0, 4)]
    assert [row.precise for row in rows] == [3 / 5, 4 / 5]
    right = stats.binomtest(3, 6).proportion_ci(method="wilson")
    assert rows[0].right == pytest.approx((0.5, right.low, right.high), abs=1e-6)
    assert "right among its answers" in text


def test_nothing_of_single_classes_stands_in_a_csv(make_run) -> None:
    path = make_run()
    change_rows(path, lambda row: row.update(by_class=BY_CLASS))
    assert "by_class" not in render([path], "csv")


# ---------------------------------------------------------------- what is signed


@pytest.mark.parametrize("deployed", [False, True])
def test_model_ledger_and_settings_are_signed_and_what_users_bear_on_is_marked(
    make_run, deployed
) -> None:
    path = make_run(runtime={"deployment": deployed})
    tensors = {"head.bias": torch.arange(3.0), "body": torch.ones(2, 2)}
    stored = {f"parameter/{name}": tensor for name, tensor in tensors.items()}
    stored["optimizer/step"] = torch.zeros(1)
    (path / "checkpoints").mkdir(exist_ok=True)
    ledger = read_ledger(path / "ledger.jsonl")
    sealed = (len(ledger.hashes), ledger.hashes[-1])
    save_checkpoint(path / "checkpoints", Checkpoint(6, "f" * 64, stored, sealed), 1)
    (document,) = json.loads(render([path], "json"))["runs"]
    found = document["signed"]
    assert found["Model of round 6, its trained parameters"] == digest_of(tensors)
    about = found if deployed else found["simulation_only"]
    assert about["Head of the ledger"].startswith(ledger.hashes[-1])
    assert about["Configuration"] == ledger.header.fingerprint
    text = write_report([path]).read_text()
    marked = re.findall(r"<code>(\w{64})[^<]*</code> <span class=\"note\">simulation only", text)
    assert marked == ([] if deployed else [ledger.hashes[-1], ledger.header.fingerprint])
    assert ("signed as a recipe" in text) != deployed


def test_without_a_checkpoint_there_is_no_model_to_sign_for(make_run) -> None:
    assert "there is no model to sign for" in write_report([make_run()]).read_text()


@pytest.mark.parametrize("privacy", [{}, {"privacy": None}])
def test_one_is_no_several(make_run, privacy) -> None:
    one = make_run(rounds=1, evaluation={"every": 1}, attempts={1: 2}, **privacy)
    change_rows(one, lambda row: row.update(nodes_lost=1))
    text = render([one], "md") + write_report([one]).read_text()
    assert "1 round" in text
    assert (
        re.findall(r"(?<![\d.,])1 (?:rounds|users|releases|nodes|silos|\w+ examples)\b", text) == []
    )
    assert "rounds 1)" not in text
