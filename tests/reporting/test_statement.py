"""What a privacy statement must say."""

import csv
import hashlib
import json
import math
from dataclasses import replace

import dp_accounting
import dp_accounting.rdp
import pytest

from fedpriv.errors import InputError
from fedpriv.reporting.reader import read_run
from fedpriv.reporting.report import render, write_report
from fedpriv.reporting.run_directory import RunDirectory
from fedpriv.reporting.spent import spent
from fedpriv.reporting.statement import (
    NO_PRIVACY,
    Statement,
    privacy_statement,
    release_groups,
    to_markdown,
)
from fedpriv.reporting.summary import summary_table
from fedpriv.reporting.wording import KNOWN_SEED

FIXED_SIZE = {
    "delta": 1e-5,
    "noise_multiplier": 2.0,
    "sampling": {"kind": "fixed_size", "expected_cohort": 100},
    "clipping": {"kind": "global", "bound": 0.5},
}

ZERO_OUT = {
    "delta": 1e-5,
    "noise_multiplier": 2.0,
    "adjacency": "zero_out",
    "sampling": {"kind": "poisson", "expected_cohort": 100},
    "clipping": {"kind": "global", "bound": 0.5},
}


def statement_of(path) -> Statement:
    run = read_run(path)
    return privacy_statement(run, spent(run))


def text_of(statement: Statement, key: str) -> str:
    return " ".join(next(s for s in statement.sections if s.key == key).sentences)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("unit", "One user"),
        ("adjacency", "Add or remove one"),
        ("trust", "trusted aggregator"),
        ("mechanism", "Gaussian noise"),
        ("sampling", "probability q = 100/2,000 = 0.05"),
        ("releases", "6 releases"),
        ("accounting", "dp-accounting 0."),
        ("delta", "0.02 times 1/N"),
        ("tuning", "Not counted"),
        ("randomness", "fixed seed 0"),
        ("floating-point", "PCG64"),
        ("logged", "simulation_only"),
        ("verification", "SHA-256"),
    ],
)
def test_every_question_is_answered(make_run, key: str, words: str) -> None:
    assert words in text_of(statement_of(make_run()), key)


def test_the_guarantees_name_accountant_and_attacker(make_run) -> None:
    statement = statement_of(make_run())
    assert [each.accountant for each in statement.guarantees] == ["pld", "rdp"]
    best = min(each.epsilon for each in statement.guarantees)
    assert f"({next(e.shown for e in statement.guarantees if e.epsilon == best)}, 1e-05)" in (
        statement.headline
    )
    for each in statement.guarantees:
        assert float(each.shown) >= each.epsilon
        assert "1% false alarms" in each.meaning
        assert "dp-accounting" in each.method


def test_equal_releases_are_one_group(make_run) -> None:
    (group,) = statement_of(make_run()).releases
    assert (group.rounds, group.count, group.counts) == ("1–6", 6, "none")
    assert (group.bound, group.sensitivity, group.stddev) == ("0.5", "0.5", "0.55")


def test_bounds_that_adapt_are_one_group_with_their_range(make_run) -> None:
    first = read_run(make_run()).releases[0]
    counted = replace(first, counts=1, count_stddev=20.0)
    (group,) = release_groups([counted, replace(counted, round=2, bound=0.7, stddev=0.77)])
    assert (group.rounds, group.bound, group.stddev) == ("1–2", "0.5–0.7", "0.55–0.77")
    assert group.counts == "1, noise σ 20"


def test_adaptive_clipping_says_that_its_counts_are_paid_for(make_run) -> None:
    adaptive = FIXED_SIZE | {"clipping": {"kind": "adaptive", "bound": 0.5}}
    run = read_run(make_run(privacy=adaptive))
    counted = replace(run, releases=(replace(run.releases[0], counts=1, count_stddev=20.0),))
    mechanism = text_of(privacy_statement(counted, spent(counted)), "mechanism")
    assert "0.5 quantile" in mechanism
    assert "the counts are paid for" in mechanism


def test_fixed_size_sampling_is_replace_one_with_twice_the_bound(make_run) -> None:
    statement = statement_of(make_run(privacy=FIXED_SIZE))
    assert "Replace one" in text_of(statement, "adjacency")
    assert statement.releases[0].sensitivity == "1"
    (guarantee,) = statement.guarantees
    assert "which of two given users" in guarantee.meaning


def test_zero_out_is_said(make_run) -> None:
    statement = statement_of(make_run(privacy=ZERO_OUT))
    assert "Zero out" in text_of(statement, "adjacency")
    assert statement.guarantees[0].meaning


def test_a_repeated_round_is_said(make_run) -> None:
    statement = statement_of(make_run(attempts={2: 2}))
    assert "charged before: 1 (round 2)" in text_of(statement, "releases")
    assert statement.releases[0].count == 7


def test_a_deployment_says_where_its_seed_came_from(make_run) -> None:
    statement = statement_of(make_run(runtime={"deployment": True}))
    assert "operating system" in text_of(statement, "randomness")
    assert "fixed seed" not in text_of(statement, "randomness")


def test_a_run_without_privacy_claims_nothing(make_run) -> None:
    statement = statement_of(make_run(privacy=None))
    assert (statement.private, statement.headline, statement.guarantees) == (False, NO_PRIVACY, ())
    assert "ε =" not in to_markdown(statement, "tiny")


def test_markdown_holds_every_section(make_run) -> None:
    statement = statement_of(make_run())
    text = to_markdown(statement, "tiny")
    assert text.startswith("# Privacy statement: tiny")
    for section in statement.sections:
        assert f"## {section.label}\n" in text
    assert "| 1–6 | 6 | Poisson 100 of 2,000 | 0.5 | 0.5 | 0.55 | none | 1.1 |" in text


# ---------------------------------------------------------------- who is covered


def test_a_node_is_covered_where_each_user_has_a_coin_of_its_own(make_run) -> None:
    trust = text_of(statement_of(make_run()), "trust")
    assert "ε holds against a node too: it knows which of its own users were drawn" in trust
    assert "the nodes among them" not in trust


def test_of_a_fixed_cohort_nodes_get_a_figure_of_their_own(make_run) -> None:
    """A node of 990 users of 1,000 that sees none of its own drawn knows the other ten were."""
    run = read_run(make_run(privacy=FIXED_SIZE))
    statement = privacy_statement(run, spent(run))
    # Without sampling: six Gaussians of multiplier z/2 = 1.
    accountant = dp_accounting.rdp.RdpAccountant()
    accountant.compose(dp_accounting.GaussianDpEvent(1.0), 6)
    right = accountant.get_epsilon(1e-5)
    assert spent(run).adversaries["node"] == pytest.approx(right, rel=1e-3)
    (guarantee,) = statement.guarantees
    assert guarantee.epsilon < right
    trust = text_of(statement, "trust")
    assert "Nodes are NOT covered by this ε" in trust
    assert f"ε = {math.ceil(spent(run).adversaries['node'] * 1000) / 1000:.3f} by RDP" in trust
    assert "not even of one user" in text_of(statement, "sampling")


def test_an_attacker_who_must_not_know_the_cohort_is_said_to_not_know_it(make_run) -> None:
    everybody = ZERO_OUT | {"sampling": {"kind": "all"}}
    sampled, whole = statement_of(make_run()), statement_of(make_run("all", privacy=everybody))
    assert "but not who was drawn" in sampled.guarantees[0].meaning
    assert "drawn" not in whole.guarantees[0].meaning


# ---------------------------------------------------------------- the known seed


def test_a_simulations_seed_stands_beside_every_epsilon(make_run) -> None:
    """In each line of each format that has the number in it."""
    run = make_run()
    statement = statement_of(run)
    shown = [each.shown for each in statement.guarantees]
    assert KNOWN_SEED in statement.headline
    lines = to_markdown(statement, "tiny").splitlines()[:8]
    with_number = [line for line in lines if any(number in line for number in shown)]
    assert len(with_number) == 3
    assert all(KNOWN_SEED in line for line in with_number)
    (document,) = json.loads(render([run], "json"))["runs"]
    assert document["randomness"] == KNOWN_SEED
    rows = list(csv.DictReader(render([run], "csv").splitlines()))
    assert {row["randomness"] for row in rows} == {KNOWN_SEED}
    page = write_report([run]).read_text()
    assert page.count(KNOWN_SEED) >= 2 + 2 + 1  # cards, guarantees, headline
    assert KNOWN_SEED in str(summary_table([run]).caption)
    page = write_report([run, make_run("other")], run / "both.html").read_text()
    assert page.count(f'<td data-label="randomness" class="number">{KNOWN_SEED}</td>') == 2


def test_a_deployment_has_none(make_run) -> None:
    run = make_run(runtime={"deployment": True})
    for text in (render([run], "md"), render([run], "csv"), write_report([run]).read_text()):
        assert KNOWN_SEED not in text
    assert summary_table([run]).caption is None


def test_a_config_cannot_make_a_deployment_of_a_simulation(make_run) -> None:
    """The ledger says which it was."""
    path = make_run()
    config = RunDirectory.open(path).config()
    runtime = config.runtime.model_copy(update={"deployment": True})
    (path / "config.yaml").write_text(config.model_copy(update={"runtime": runtime}).to_yaml())
    text = render([path], "md")
    assert text.count(KNOWN_SEED) > 1
    assert "fixed seed" in text
    assert "A deployment: sampling and noise were seeded" not in text


# ---------------------------------------------------------------- what was checked


@pytest.mark.parametrize(
    ("facts", "unit", "held_out"),
    [
        ({}, "was not checked", "was not checked whose they are"),
        (
            {"users": "dealt", "held_out": "unnamed"},
            "NOT the people whom they are of",
            "the data set does not say",
        ),
        ({"users": "share", "held_out": "same"}, "NOT the person", "THE SAME PEOPLE"),
        ({"users": "person", "held_out": "others"}, "names as a person", "none of whom is a user"),
        ({"users": "made_up", "held_out": "made_up"}, "no person is among them", "are made up"),
    ],
)
def test_of_the_data_is_said_what_was_checked(make_run, facts, unit, held_out) -> None:
    path = make_run()
    environment = json.loads((path / "environment.json").read_text())
    (path / "environment.json").write_text(json.dumps(environment | {"data_facts": facts}))
    statement = statement_of(path)
    assert unit in text_of(statement, "unit")
    assert held_out in text_of(statement, "logged")


def test_a_fact_that_is_not_understood_is_not_signed(make_run) -> None:
    path = make_run()
    environment = json.loads((path / "environment.json").read_text())
    said = environment | {"data_facts": {"users": "clones"}}
    (path / "environment.json").write_text(json.dumps(said))
    with pytest.raises(InputError, match="users: clones is not a fact"):
        statement_of(path)


@pytest.mark.parametrize(
    ("origin", "words"),
    [
        ("pretrained", "pre-trained by fedpriv, as seed_model.pretrain says"),
        ("outside", "of whose training fedpriv knows nothing"),
        (None, "of whose training nothing is recorded"),
    ],
)
def test_of_a_seed_model_is_said_what_was_recorded(make_run, origin, words) -> None:
    path = make_run(seed_model={"path": "seed.safetensors", "pretrain": {"steps": 1}})
    environment = json.loads((path / "environment.json").read_text())
    if origin:
        environment["seed_model"] = {"origin": origin}
    (path / "environment.json").write_text(json.dumps(environment))
    start = text_of(statement_of(path), "start")
    assert words in start
    assert ("without privacy" in start) == (origin == "pretrained")
    assert "are not of it" not in start


def test_the_statement_names_what_is_not_of_the_seed_model(make_run) -> None:
    seed = {"path": "seed.safetensors", "reinitialize": ["head.*", "embed"]}
    start = text_of(statement_of(make_run(seed_model=seed)), "start")
    assert "Parameters that match head.* or embed are not of it: they began anew." in start


# ---------------------------------------------------------------- unknown kinds


@pytest.mark.parametrize(
    "line",
    [
        ("unit", "household"),
        ("noise_by", "somebody"),
        ("adjacency", "replace_two"),
        ("sampling", "shuffled"),
        ("noise_shape", "square"),
        ("version", 99),
    ],
)
def test_a_ledger_of_unknown_kind_is_not_signed(make_run, line) -> None:
    path, (name, value) = make_run(), line
    last, lines = "", []
    for text in (path / "ledger.jsonl").read_text().splitlines():
        body = json.loads(text)
        if name in body or (name == "noise_by" and body["kind"] == "header"):
            body[name] = value
        body = {k: v for k, v in body.items() if k != "hash"} | {"previous": last}
        last = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        lines.append(json.dumps({**body, "hash": last}))
    (path / "ledger.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match=rf"{name} is .*{value}.*does not know"):
        statement_of(path)


def test_a_clipping_of_unknown_kind_is_not_signed(make_run) -> None:
    run = read_run(make_run())
    for kind in ("soft", "by_hope"):
        clipping = run.config.privacy.clipping.model_copy(update={"kind": kind})
        privacy = run.config.privacy.model_copy(update={"clipping": clipping})
        odd = replace(run, config=run.config.model_copy(update={"privacy": privacy}))
        with pytest.raises(ValueError, match=kind):
            privacy_statement(odd, spent(run))
