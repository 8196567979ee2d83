"""Settings beside the defaults and between runs, and what seeds make of a measure."""

import statistics

import pytest

from fedpriv.reporting.own_files import MARKDOWN
from fedpriv.reporting.reader import read_run
from fedpriv.reporting.report import render, write_report
from fedpriv.reporting.settings import beside_defaults, between_runs, over_seeds

PRIVACY = {
    "delta": 1e-5,
    "noise_multiplier": 1.1,
    "sampling": {"kind": "poisson", "expected_cohort": 100},
    "clipping": {"kind": "adaptive", "bound": 0.5},
}


def settings_of(path) -> dict[str, tuple[str, str]]:
    return {one.key: (one.value, one.default) for one in beside_defaults(read_run(path).config)}


def test_what_a_config_says_is_shown_beside_the_default_and_nothing_else(make_run) -> None:
    assert settings_of(make_run(seed=3, local={"optimizer": {"name": "adamw"}})) == {
        "seed": ("3", "0"),
        "rounds": ("6", ""),
        "data.users": ("2000", "null"),
        "local.optimizer.name": ("adamw", "sgd"),
        "privacy.delta": ("1e-05", ""),
        "privacy.noise_multiplier": ("1.1", "null"),
        "privacy.sampling.expected_cohort": ("100.0", ""),
        "privacy.clipping.bound": ("0.5", ""),
        "evaluation.every": ("2", "5"),
    }


def test_a_component_that_is_not_the_usual_one_is_named(make_run) -> None:
    assert settings_of(make_run(privacy=PRIVACY))["privacy.clipping.kind"] == ("adaptive", "")


def test_no_privacy_is_a_setting(make_run) -> None:
    assert settings_of(make_run(privacy=None))["privacy"] == ("null", "")


def test_between_runs_only_what_they_do_not_agree_on_is_shown(make_run) -> None:
    paths = [make_run("a"), make_run("b", seed=1), make_run("c", privacy=None, rounds=3)]
    found = dict(between_runs([read_run(path).config for path in paths]))
    assert found["seed"] == ("0", "1", "0")
    assert found["rounds"] == ("6", "6", "3")
    assert found["privacy.delta"] == ("1e-05", "1e-05", "–")
    # Of a section that one lacks, defaults are no difference; nor are names.
    assert not {"privacy.noise_by", "privacy.unit", "name", "run_dir"} & set(found)
    assert between_runs([read_run(paths[0]).config] * 2) == []


def measured(path, accuracy: float):
    metrics = path / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"accuracy": 0.8}', f'"accuracy": {accuracy}}}'))
    return path


def test_mean_and_spread_are_of_runs_that_differ_in_the_seed_alone(make_run) -> None:
    values = [0.8, 0.7, 0.75]
    paths = [measured(make_run(f"{n}", seed=n), value) for n, value in enumerate(values)]
    others = [make_run("again", seed=0), make_run("other", seed=9, rounds=4)]
    (found,) = over_seeds([read_run(path) for path in [*paths, *others]])
    assert found.runs == (0, 1, 2)
    assert found.mean == f"{statistics.fmean(values):.1%}"
    assert found.deviation == f"{statistics.stdev(values):.1%}"
    assert (found.least, found.most) == ("70.0%", "80.0%")
    said = "A, B, C differ in the seed alone: accuracy 75.0% on average, from 70.0% to 80.0%"
    assert said in render([*paths, *others], "md")
    assert said in write_report([*paths, *others], paths[0] / "all.html").read_text()


@pytest.mark.parametrize("seeds", [(0, 0), (0,)])
def test_one_seed_has_no_spread(make_run, seeds) -> None:
    runs = [read_run(make_run(f"{place}", seed=seed)) for place, seed in enumerate(seeds)]
    assert over_seeds(runs) == []


def test_a_deployment_has_a_seed_of_its_own_which_nobody_knows(make_run) -> None:
    runs = [read_run(make_run(name, runtime={"deployment": True})) for name in "ab"]
    (found,) = over_seeds(runs)
    assert found.runs == (0, 1)
    assert over_seeds([runs[0], read_run(make_run("c"))]) == []


def test_of_several_runs_the_comparison_comes_first(make_run, tmp_path) -> None:
    runs = [make_run("a"), make_run("b", rounds=4)]
    text = render(runs, "md")
    assert text.startswith(f"{MARKDOWN}\n# 2 runs compared")
    assert text.index("| rounds | 6 | 4 |") < text.index("# Privacy statement")
    page = write_report(runs, tmp_path / "both.html").read_text()
    assert page.index('id="differences"') < page.index('id="run-A"')
    assert page.index('id="run-B"') < page.index('<figure id="throughput"')
