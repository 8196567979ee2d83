"""Components by name, by module, by entry point and as objects, each with options of its own."""

import json
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
import yaml
from in_process import SMALL, small_config
from pydantic import ValidationError
from torch import nn

from fedpriv import components
from fedpriv.components import KINDS, LookUp, slots
from fedpriv.config import ExperimentConfig
from fedpriv.config_files import load_config, parse_config
from fedpriv.errors import InputError
from fedpriv.models import MODELS, ViTOptions, build_model

CODE = """
from torch import nn
from helping import width_of

def cnn(input_shape, classes, width: int = 4, drop: float = 0.0):
    channels, height, side = input_shape
    return nn.Sequential(
        nn.Conv2d(channels, width_of(width), 3, padding=1), nn.GroupNorm(1, width), nn.ReLU(),
        nn.Flatten(), nn.Dropout(drop), nn.Linear(width * height * side, classes))

def named(name, classes): ...
def loose(input_shape, classes, **more):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, more.get("out", classes)))
def failing(classes):
    raise ValueError("no width")
nothing = 3
"""


@pytest.fixture
def mine(tmp_path) -> Path:
    """A config beside which `mine.py` is, and a module that it imports."""
    return written(tmp_path / "project", CODE)


def written(folder: Path, code: str, **model) -> Path:
    folder.mkdir()
    (folder / "mine.py").write_text(code)
    (folder / "helping.py").write_text("def width_of(width):\n    return width\n")
    document = {**SMALL, "model": {"name": "mine:cnn", **model}}
    (folder / "mine.yaml").write_text(yaml.safe_dump(document))
    return folder / "mine.yaml"


def built(config: ExperimentConfig, seed: int = 1) -> nn.Module:
    return build_model(config.model, (1, 8, 8), 10, seed)


def test_a_file_beside_the_config_is_a_model_with_options_of_its_own(mine):
    config = load_config(mine, ["model.width=3"])
    assert built(config)[0].out_channels == 3
    of_any_model = {"initialise": "own", "train": "all", "lora": None}
    of_any_model |= {"convert": None, "frozen_sha256": None, "start_sha256": None}
    assert config.model.model_dump() == {
        "name": "mine:cnn",
        **of_any_model,
        "width": 3,
        "drop": 0.0,
    }


def test_a_run_elsewhere_finds_the_same_file_again(mine, tmp_path):
    config = load_config(mine)
    (tmp_path / "copy.yaml").write_text(config.to_yaml())
    again = load_config(tmp_path / "copy.yaml")
    assert again.code == mine.parent
    assert again == config
    assert again.fingerprint("") == config.fingerprint("")


@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        (
            "vitt",
            {},
            r"^model\.name: unknown model 'vitt', known are gpt, speech, vit; did you mean v",
        ),
        ("zzz", {}, r"^model\.name: unknown model 'zzz', .*; write package\.module:object for"),
        ("mime:cnn", {}, r"^model\.name: there is no module mime: .* or as a file in /"),
        ("mine:cmn", {}, r"^model\.name: the module mine has no cmn; did you mean mine:cnn\?"),
        ("mine:", {}, r"^model\.name: write package\.module:object, such as mine:cnn, got 'mine:'"),
        ("mine:nothing", {}, r"^model\.name: mine:nothing is neither a function nor a class"),
        ("mine:named", {}, r"^model\.name: mine:named has an argument name, .*; wrap it"),
        ("mine:cnn", {"widht": 3}, r"^model\.widht: unknown key; did you mean width\?$"),
        ("mine:cnn", {"width": "wide"}, r"^model\.width: .*integer.*, got 'wide'"),
        ("mine:cnn", {"width": True}, r"^model\.width: true and false are no numbers"),
        ("vit", {"width": 3}, r"^model\.width: unknown key; did you mean depth"),
        ("speech", {"patch": 2}, r"^model\.patch: unknown key"),
        ("__main__:cnn", {}, r"handed over by a script or a notebook"),
        (3, {}, r"^model\.name: write the name of a model, got 3"),
    ],
)
def test_what_cannot_be_found_or_taken_is_told_in_a_line(mine, name, options, line):
    mine.write_text(yaml.safe_dump({**SMALL, "model": {"name": name, **options}}))
    with pytest.raises(InputError, match=line) as refused:
        load_config(mine)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("import not_there_at_all", "mine needs not_there_at_all, which is not installed"),
        (
            "raise ModuleNotFoundError(name='peft')",
            r"mine:cnn needs peft: pip install 'fedpriv\[peft\]'",
        ),
        ("x = (", r"mine cannot be imported: .*\(mine.py, line 1\)"),
        ("1 / 0", r"mine cannot be imported: division by zero \(mine.py, line 1\)"),
        ("raise SystemExit('bye')", r"mine cannot be imported: it ends the program \(bye\)"),
    ],
)
def test_a_module_that_cannot_be_imported_says_why(mine, code, line):
    (mine.parent / "mine.py").write_text(code)
    with pytest.raises(InputError, match=line) as refused:
        load_config(mine)
    assert "\n" not in str(refused.value)


# What nobody can check: Nowhere is known to type checkers alone, and so is what is made of it.
UNKNOWN = """
from dataclasses import dataclass
from torch import nn

@dataclass
class Half:
    kind: "Nowhere"

def needs(input_shape, classes, shape: Half): ...
def open_too(input_shape, classes, shape: Half, **more): ...
def may_have(input_shape, classes, shape: "Half | str | None" = None, width: int = 1):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
def in_words(input_shape, classes, shape: "a word", over: "1 / 0" = None, width: int = 1):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
"""


@pytest.mark.parametrize("name", ["mine:needs", "mine:open_too"])
@pytest.mark.parametrize("options", [{}, {"shape": {"kind": 1}}])
def test_an_object_that_no_config_can_hold_is_told_in_a_line(tmp_path, name, options):
    path = written(tmp_path / "project", UNKNOWN, name=name, **options)
    with pytest.raises(InputError, match=r"model\.name: .* needs shape, a Half, .*a function"):
        load_config(path)


def test_a_class_of_transformers_asks_for_a_function():
    wanted = r"^model\.name: .*ViTForImageClassification needs config, a ViTConfig, .*extending"
    with pytest.raises(InputError, match=wanted) as error:
        small_config(model={"name": "transformers:ViTForImageClassification"})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["mine:may_have", "mine:in_words"])
def test_an_annotation_that_nobody_knows_leaves_the_other_options_checked(tmp_path, name):
    path = written(tmp_path / "project", UNKNOWN, name=name, shape="round")
    config = load_config(path)
    assert config.model.shape == "round"
    assert built(config)(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    with pytest.raises(InputError, match=r"model\.width"):
        load_config(path, ["model.width=wide"])


def test_a_builder_that_fails_says_so_in_a_line(mine):
    config = load_config(mine, ["model={name: mine:failing}"])
    with pytest.raises(InputError, match=r"model\.name: mine:failing fails: no width .mine.py, "):
        built(config)


def test_a_name_alone_is_a_section(mine):
    assert load_config(mine, ["model=mine:cnn"]) == load_config(mine)
    assert small_config(model="vit").model.dim == ViTOptions().dim


def test_keyword_arguments_without_names_are_options_too(mine):
    config = load_config(mine, ["model={name: mine:loose, out: 7}"])
    assert built(config)[1].out_features == 7
    assert parse_config(json.loads(config.model_dump_json())) == config


def test_a_builder_keeps_its_own_weights_unless_ours_are_asked_for(mine):
    config, ours = load_config(mine), load_config(mine, ["model.initialise=fedpriv"])
    torch.manual_seed(99)
    first, again, other = built(config), built(config), built(config, seed=2)
    assert torch.equal(first[5].weight, again[5].weight)
    assert not torch.equal(first[5].weight, other[5].weight)
    assert first[5].bias.abs().sum() > 0
    assert built(ours)[5].bias.abs().sum() == 0
    # A layer that we do not know is left as it was built.
    assert torch.equal(built(ours)[0].weight, first[0].weight)


def test_what_came_from_outside_is_in_the_fingerprint(mine, tmp_path):
    before = load_config(mine)
    ((_, component),) = [slot for slot in slots(before) if slot[1].origin]
    assert set(dict(component.origin.files)) == {"mine.py", "helping.py"}
    # A copy elsewhere is the same; a comment makes another, in the module and in what it imports.
    copy = written(tmp_path / "copy", CODE)
    assert load_config(copy).fingerprint("") == before.fingerprint("")
    seen = {before.fingerprint("")}
    for file in ("mine.py", "helping.py"):
        path = copy.parent / file
        path.write_text(path.read_text() + "# another\n")
        seen.add(load_config(copy).fingerprint(""))
    assert len(seen) == 3


def test_two_configs_may_each_have_a_module_of_the_same_name(mine, tmp_path):
    here = load_config(mine)
    other = CODE.replace("nn.ReLU()", "nn.Tanh()")
    there = load_config(written(tmp_path / "there", other))
    assert isinstance(built(there)[2], nn.Tanh)
    assert isinstance(built(here)[2], nn.ReLU)
    assert isinstance(built(load_config(mine))[2], nn.ReLU)


def test_a_module_that_is_edited_is_imported_again(mine):
    load_config(mine)
    (mine.parent / "mine.py").write_text(CODE.replace("nn.ReLU()", "nn.GELU()"))
    assert isinstance(built(load_config(mine))[2], nn.GELU)


def test_a_file_that_hides_an_imported_module_is_refused(mine):
    (mine.parent / "json.py").write_text("cnn = int")
    with pytest.raises(InputError, match=r"json in .* has the name of a module that is imported"):
        load_config(mine, ["model=json:cnn"])


def test_an_object_from_python_is_a_component(mine):
    def flat(input_shape, classes, gain: float = 1.0):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))

    config = small_config(model={"name": flat, "gain": 2.0})
    assert config.model.gain == 2.0
    assert built(config)[1].out_features == 10
    with pytest.raises(InputError, match=r"^model\.gian: unknown key; did you mean gain\?"):
        small_config(model={"name": flat, "gian": 2.0})
    # In the process that has it, a message's config finds it again.
    sent = parse_config(json.loads(config.model_dump_json()), LookUp(allowed=()))
    assert built(sent)[1].out_features == 10


def test_a_model_that_is_made_already_is_copied(mine):
    made = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    config = small_config(model=made)
    first, second = built(config), built(config)
    assert torch.equal(first[1].weight, made[1].weight)
    assert first[1].weight.data_ptr() != second[1].weight.data_ptr() != made[1].weight.data_ptr()
    other = small_config(model=nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    assert config.fingerprint("") != other.fingerprint("")


def test_an_entry_point_is_a_name(monkeypatch, mine):
    load_config(mine)  # so that its module is there
    entry = EntryPoint("lenet", "mine:cnn", "fedpriv.models")

    def entries(group, name="lenet"):
        return [entry] if (group, name) == ("fedpriv.models", "lenet") else []

    monkeypatch.setattr(components, "entry_points", entries)
    assert built(small_config(model={"name": "lenet", "width": 2}))[0].out_channels == 2
    assert set(MODELS.names()) == {"lenet", *MODELS.registered}
    with pytest.raises(InputError, match="did you mean lenet"):
        small_config(model={"name": "lenett"})


def test_a_node_imports_only_what_it_allows(mine, tmp_path):
    config = load_config(mine)
    document = json.loads(config.model_dump_json())
    name = "tests_outside_marker"
    (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')")
    document["model"] = {"name": f"{name}:cnn"}
    document["code"] = str(tmp_path)
    with pytest.raises(InputError, match=r"^model\.name: this node does not import") as refused:
        parse_config(document, LookUp(allowed=("other:cnn",)))
    assert "\n" not in str(refused.value)
    assert name not in sys.modules
    with pytest.raises(InputError, match=r"it ends the program \(imported\)"):
        parse_config(document, LookUp(tmp_path, allowed=(f"{name}:cnn",)))


def test_the_schema_has_each_models_own_options():
    section = ExperimentConfig.model_json_schema()["properties"]["model"]["anyOf"]
    keys = [set(each["properties"]) for each in section]
    vit, speech = (keys[sorted(MODELS.registered).index(name)] for name in ("vit", "speech"))
    assert {"patch", "pooling"} <= vit
    assert "mels" in speech - vit


def test_a_sampling_from_outside_is_refused_with_the_reason(mine):
    (mine.parent / "mine.py").write_text("raise SystemExit('imported')")
    with pytest.raises(InputError, match=r"^privacy\.sampling\.kind: .* no proof: who is dra"):
        load_config(mine, ["model=vit", "privacy.sampling.kind=mine:cnn"])


def test_a_file_that_an_option_names_is_part_of_the_run(tmp_path):
    code = """
from pathlib import Path
from torch import nn
def read(input_shape, classes, weights: Path, more: Path | None = None):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, int(weights.read_text())))
"""
    weights, found = tmp_path / "weights", []
    mine = written(tmp_path / "project", code)
    for text in ("10", "12", "10"):
        weights.write_text(text)
        changes = [f"model={{name: 'mine:read', weights: {weights}}}"]
        found.append(load_config(mine, changes).fingerprint(""))
    assert found[0] == found[2] != found[1]


def test_what_a_config_says_bears_on_a_run_as_it_does_when_it_is_read_again():
    """A default may be a tuple, of which YAML makes a list."""
    tried = 0
    for kind in KINDS.values():
        for name in kind.registered:
            try:
                options = kind.parse(name)
            except ValidationError:
                continue  # it has options that it cannot be without
            again = kind.parse(yaml.safe_load(yaml.safe_dump(options.model_dump(mode="json"))))
            assert again.bearing() == options.bearing(), (kind.key, name)
            tried += 1
    assert tried > 30
