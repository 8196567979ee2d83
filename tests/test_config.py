import json
from pathlib import Path

import pytest
import yaml
from in_process import SMALL, small_config
from pydantic import BaseModel

from fedpriv.config import ExperimentConfig, load_config, parse_config
from fedpriv.errors import InputError

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_is_valid_and_survives_a_round_trip(path, tmp_path):
    config = load_config(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(config.to_yaml())
    assert load_config(copy) == config
    assert load_config(copy).fingerprint("") == config.fingerprint("")


def test_overrides_change_nested_keys_with_yaml_values(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    changed = load_config(
        path,
        [
            "privacy.delta=1e-6",
            "privacy.clipping.kind=global",
            "local.steps=3",
            "privacy.accountants=[rdp, pld]",
            "server.options.betas=[0.9, 0.99]",
            "name=with-e-in-it",
        ],
    )
    assert changed.privacy.delta == 1e-6
    assert changed.privacy.clipping.kind == "global"
    assert changed.local.steps == 3
    assert changed.privacy.accountants == ("rdp", "pld")
    assert changed.server.options == {"betas": [0.9, 0.99]}
    assert load_config(path, ["privacy=null", "cohort=7"]).privacy is None


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"privacy__detla": 1}, r"^privacy\.detla: unknown key; did you mean delta\?$"),
        ({"privacy__clipping__xyz": 1}, r"^privacy\.clipping\.xyz: unknown key; known keys here: "),
        ({"qqqq": "red"}, r"^qqqq: unknown key; known keys here: name, seed"),
        ({"privacy__delta": 1.0}, r"^privacy\.delta: .*less than 1, got 1\.0"),
        ({"privacy__noise_multiplier": -1}, r"^privacy\.noise_multiplier: .*greater than or equal"),
        ({"privacy__noise_multiplier": float("inf")}, r"^privacy\.noise_multiplier: .*finite"),
        ({"privacy__noise_multiplier": 1e-153}, "must be 0 .no privacy. or from 1e-6 to 1e6"),
        ({"privacy__target_epsilon": 3}, r"^privacy: write exactly one of noise_multiplier"),
        ({"privacy__clipping__bound": 0}, r"^privacy\.clipping\.bound: "),
        ({"privacy__clipping__normalize": True, "privacy__clipping__kind": "global"}, "per_layer"),
        ({"privacy__sampling__kind": "all"}, "expected_cohort does not go with kind: all"),
        ({"privacy__sampling": {"kind": "poisson"}}, "expected_cohort is needed"),
        ({"privacy__sampling": {"kind": "fixed_size", "expected_cohort": 2.5}}, "whole number"),
        (
            {
                "privacy__sampling": {"kind": "fixed_size", "expected_cohort": 5},
                "privacy__accountants": ["rdp", "pld"],
            },
            r"pld has no proof .* write \[rdp\]",
        ),
        ({"privacy__accountants": ["pld"]}, "accountants must include rdp"),
        ({"privacy__adjacency": "replace_one"}, "replace_one has no proof with poisson sampling"),
        ({"privacy__noise": "per_block", "privacy__clipping__kind": "global"}, "per_block has no"),
        ({"privacy__clipping__quantile": 0.7}, "quantile goes with kind: adaptive only"),
        ({"data__examples_per_user": 3}, r"local\.batch_size is 4, but data\.examples_per_user"),
        ({"rounds": 0}, r"^rounds: "),
        ({"local__batch_size": 0}, r"^local\.batch_size: "),
        ({"runtime__device": "tpu"}, r"^runtime\.device: "),
        ({"cohort": 5}, "cohort is for privacy: null"),
        ({"name": "../escape"}, r"^name: "),
    ],
)
def test_impossible_configs_are_refused_in_one_line(changes, line):
    with pytest.raises(InputError, match=line) as caught:
        small_config(**changes)
    assert "\n" not in str(caught.value)


def test_checks_that_need_the_population():
    with pytest.raises(InputError, match=r"privacy\.delta must be below 1/population \(0\.001 "):
        small_config(privacy__delta=0.002).check_population(1000)
    with pytest.raises(InputError, match=r"expected_cohort must be at most the population of 7"):
        small_config().check_population(7)
    with pytest.raises(InputError, match=r"^cohort must be at most"):
        small_config(privacy=None, cohort=8).check_population(7)
    small_config().check_population(60)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("rounds: [", "not valid YAML"),
        ("just words", "a config is a mapping"),
        ("", "a config is a mapping"),
        ("rounds: 3\nrounds: 4", "the key rounds is written twice"),
        ("name: 2001-99-99", "not valid YAML"),
        ("[" * 3000, "not valid YAML"),
    ],
)
def test_files_that_are_no_configs(tmp_path, text, line):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=line):
        load_config(path)
    with pytest.raises(InputError, match="cannot read the config"):
        load_config(tmp_path / "missing.yaml")


@pytest.mark.parametrize("override", ["rounds", "=3", "name.x=1", "rounds=["])
def test_overrides_that_make_no_sense(tmp_path, override):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    with pytest.raises(InputError, match="--set"):
        load_config(path, [override])


def test_the_fingerprint_ignores_what_bears_on_speed_and_sees_the_rest():
    base = small_config().fingerprint("")
    assert (
        small_config(runtime__workers=7, run_dir="elsewhere", name="other").fingerprint("") == base
    )
    for changes in (
        {"seed": 6},
        {"rounds": 5},
        {"privacy__noise_multiplier": 1.01},
        {"runtime__deployment": True},
        {"runtime__engine": "sequential"},
        {"runtime__stack": 3},
        {"data__users": 61},
        {"local__lr": 0.11},
    ):
        assert small_config(**changes).fingerprint("") != base


def test_every_key_says_what_it_means():
    def undocumented(section: type[BaseModel], prefix: str = "") -> list[str]:
        missing = []
        for name, field in section.model_fields.items():
            inner = [
                part
                for part in (field.annotation, *getattr(field.annotation, "__args__", ()))
                if isinstance(part, type) and issubclass(part, BaseModel)
            ]
            if inner:
                missing += undocumented(inner[0], f"{prefix}{name}.")
            elif not field.description:
                missing.append(prefix + name)
        return missing

    assert undocumented(ExperimentConfig) == []
    json.dumps(ExperimentConfig.model_json_schema())


def test_a_missing_section_is_named():
    document = {k: v for k, v in SMALL.items() if k != "privacy"}
    with pytest.raises(InputError, match=r"^privacy: this key is needed$"):
        parse_config(document)
