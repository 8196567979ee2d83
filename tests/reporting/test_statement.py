"""What a privacy statement must say."""

from dataclasses import replace

import pytest

from fedpriv.reporting.reader import read_run
from fedpriv.reporting.spent import spent
from fedpriv.reporting.statement import (
    NO_PRIVACY,
    Statement,
    privacy_statement,
    release_groups,
    to_markdown,
)

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
    assert [each.accountant for each in statement.guarantees] == ["rdp", "pld"]
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
    assert "1 of them repeat" in text_of(statement, "releases")
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
