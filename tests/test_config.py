import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from in_process import SMALL, small_config
from pydantic import BaseModel
from schema import sections_of
from torch import nn

from fedpriv import yaml_text
from fedpriv.config import ExperimentConfig
from fedpriv.config_files import load_config, parse_config
from fedpriv.errors import InputError
from fedpriv.optimizers.registry import server_optimizer

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
        (
            {"privacy__clipping__normalize": True, "privacy__clipping__kind": "global"},
            "it goes with kind: per_layer",
        ),
        (
            {"privacy__sampling__kind": "all"},
            "it goes with kind: fixed_size or min_separation or poisson",
        ),
        (
            {"privacy__sampling": {"kind": "poisson"}},
            r"^privacy\.sampling\.expected_cohort: this key is needed",
        ),
        ({"privacy__sampling": {"kind": "fixed_size", "expected_cohort": 2.5}}, "whole number"),
        ({"privacy__accountants": ["pld"]}, "accountants must include rdp"),
        ({"privacy__adjacency": "replace_one"}, "replace_one has no proof with poisson sampling"),
        ({"privacy__noise": "per_block", "privacy__clipping__kind": "global"}, "per_block has no"),
        ({"privacy__clipping__quantile": 0.7}, "quantile: unknown key; it goes with kind: ada"),
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


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"privacy": "privac"}, r"^privac: unknown key; did you mean privacy\?$"),
        ({"model": "modle"}, r"^modle: unknown key; did you mean model\?$"),
        ({"privacy": "privac", "model": "modle"}, r"did you mean \w+\? \(and 1 more\)$"),
        ({"privacy": "secrecy"}, r"^privacy: this key is needed.* \(and 1 more\)$"),
    ],
)
def test_a_misspelt_key_is_told_before_that_its_right_name_is_missing(changes, line):
    document = small_config().model_dump(mode="json")
    renamed = {changes.get(key, key): value for key, value in document.items()}
    with pytest.raises(InputError, match=line):
        parse_config(renamed)


def test_a_misspelt_key_within_a_section_is_told_first():
    document = small_config().model_dump(mode="json")
    sampling = document["privacy"]["sampling"]
    sampling["expected_cohrt"] = sampling.pop("expected_cohort")
    with pytest.raises(InputError, match=r"expected_cohrt: unknown key; did you mean .*cohort\?$"):
        parse_config(document)


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


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("-3", -3),
        ("1e-6", 1e-6),
        ("1.5", 1.5),
        (".5", 0.5),
        ("true", True),
        ("null", None),
        ("~", None),
        ("", None),
        ("yes", "yes"),
        ("on", "on"),
        ("off", "off"),
        ("n", "n"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("0b11", "0b11"),
        ("2001-12-14", "2001-12-14"),
        ("2001-99-99", "2001-99-99"),
    ],
)
def test_values_are_read_as_yaml_1_2_has_them_and_written_back_the_same(text, value):
    read = yaml_text.load(f"key: {text}")["key"]
    assert read == value
    assert type(read) is type(value)
    again = yaml_text.load(yaml_text.dump({"key": value}))["key"]
    assert again == value
    assert type(again) is type(value)


@pytest.mark.parametrize("text", ["1e-6", "yes", "1_000", "012", "1:30", "0o7", ".inf", "2001-1-1"])
def test_text_that_looks_like_a_number_survives_readers_of_both_versions(text):
    written = yaml_text.dump({"key": text})
    assert yaml_text.load(written) == yaml.safe_load(written) == {"key": text}


# A number of each kind: required, optional, bounded, in a list, in a union with a word, of a data
# set, of a model, of a schedule.
NUMBERS = [
    "rounds",
    "seed",
    "local.steps",
    "local.lr",
    "local.batch_seconds",
    "privacy.noise_multiplier",
    "privacy.delta",
    "privacy.sampling.expected_cohort",
    "privacy.clipping.bound",
    "privacy.budget.epsilon",
    "runtime.stack",
    "runtime.gpus_per_worker",
    "data.users",
    "data.partition.alpha",
    "data.speech.max_seconds",
    "data.synthetic.sizes.median",
    "model.dim",
    "model.dropout",
    "server.schedule.warmup_rounds",
]


@pytest.mark.parametrize("value", ["yes", "on", "true", "1:30", "2001-12-14", ".inf", ".nan"])
@pytest.mark.parametrize("key", NUMBERS)
def test_no_number_is_taken_from_what_is_none(tmp_path, key, value):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    with pytest.raises(InputError, match=rf"^{key}[.:]") as caught:
        load_config(path, [*has(key), f"{key}={value}"])
    assert "\n" not in str(caught.value)


def has(key: str) -> list[str]:
    """Overrides that go with such a key: a data set that has it, or a deployment."""
    if key == "evaluation.held_out":
        return ["runtime.deployment=true"]
    if key == "tracker.folder":
        return ["tracker={name: tensorboard}"]
    names = {"speech": "synthetic_speech", "synthetic": "synthetic_images", "path": "idx_images"}
    section, name = ([*key.split("."), ""])[:2]
    return (
        [f"data={{name: {names[name]}, users: 60}}"] if section == "data" and name in names else []
    )


@pytest.mark.parametrize("options", [{"betas": [True, 0.9]}, {"eps": True}, {"eps": float("nan")}])
def test_no_number_of_an_optimizer_is_taken_from_a_truth_value(options):
    (name,) = options
    with pytest.raises(InputError, match=rf"^server\.options\.{name}: "):
        server_optimizer("adam", [nn.Parameter(torch.ones(2))], 0.1, options)
    server_optimizer("adam", [nn.Parameter(torch.ones(2))], 0.1, {"amsgrad": True})


def test_words_for_true_and_false_are_read_where_they_are_wanted():
    assert parse_config({**SMALL, "runtime": {"fast_products": "yes"}}).runtime.fast_products


def test_a_leading_zero_makes_no_octal_number(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(SMALL).replace("rounds: 4", "rounds: 010"))
    assert load_config(path).rounds == 10
    assert load_config(path, ["rounds=012"]).rounds == 12


@pytest.mark.parametrize("value", ["no", "off", "false", "none", "3"])
def test_a_word_in_the_place_of_a_section_is_told_what_to_write(tmp_path, value):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    with pytest.raises(InputError, match=r"^privacy: write a section of keys, or privacy: null"):
        load_config(path, [f"privacy={value}"])
    with pytest.raises(InputError, match=r"^runtime: write a section of keys, got "):
        load_config(path, [f"runtime={value}"])


PATHS = [
    "run_dir",
    "code",
    "seed_model.path",
    "data.path",
    "data.speech.alphabet",
    "data.speech.cache",
    "evaluation.held_out",
    "tracker.folder",
]


def test_every_path_of_a_config_is_here():
    def paths(section: type[BaseModel], prefix: str = "") -> set[str]:
        found = set()
        for name, field in section.model_fields.items():
            inner = [paths(each, f"{prefix}{name}.") for each in sections_of(field)]
            found |= set().union(*inner)
            if "Path" in repr(field.annotation):
                found.add(prefix + name)
        return found

    assert paths(ExperimentConfig) == set(PATHS)


@pytest.mark.parametrize("key", PATHS)
def test_a_tilde_is_the_home_in_every_path(tmp_path, monkeypatch, key):
    monkeypatch.setenv("HOME", "/home/of/me")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    value: Any = load_config(path, [*has(key), f"{key}=~/a b[c]"])
    for part in key.split("."):
        value = getattr(value, part)
    assert str(value) == "/home/of/me/a b[c]"
    for impossible in ("~nobody-has-this-name/x", '"a\\0b"'):
        with pytest.raises(InputError, match=rf"^{key}: "):
            load_config(path, [*has(key), f"{key}={impossible}"])


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
    with pytest.raises(InputError, match=r"^privacy: this key is needed: null trains without"):
        parse_config(document)
