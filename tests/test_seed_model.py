import dataclasses
import shutil
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from in_process import InProcessGrid, Silent, drive_on, resume_small, small_config
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_speech import SPEECH_CHANGES, TonesOptions, build_tones, tiny_speech
from typer.testing import CliRunner

from fedpriv import experiment, seed_model
from fedpriv.cli import app
from fedpriv.config import ExperimentConfig
from fedpriv.config_files import load_config
from fedpriv.data.registry import DATASETS
from fedpriv.errors import InputError, Interrupted
from fedpriv.federation.builders import build_trainer
from fedpriv.federation.messages import work_of
from fedpriv.models.parameters import parameters_of
from fedpriv.seed_model import load_seed_model, read_measures, seed_path, with_seed_model
from fedpriv.training.checkpoint import checkpoint_files, digest_of

HEAD = {"head.weight", "head.bias"}
RECIPE = {"steps": 6, "batch_size": 4, "lr": 0.01, "every": 2}


@pytest.fixture(autouse=True)
def _tones(monkeypatch, tmp_path):
    monkeypatch.setitem(DATASETS.registered, "tones", build_tones)
    monkeypatch.chdir(tmp_path)


class Watching:
    """A listener that stops the training after some step, and counts the steps."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.stop = threading.Event()
        self.stop_after = stop_after
        self.steps: list[int] = []

    def begin(self, steps: int, done: int, what: str) -> None:
        pass

    def step(self, step: int, loss: float) -> None:
        self.steps.append(step)
        if step == self.stop_after:
            self.stop.set()

    def measured(self, step: int, measures: dict[str, float]) -> None:
        pass


def config(recipe=RECIPE, path=None, sha256=None, reinitialize=(), **changes) -> ExperimentConfig:
    seed = {"pretrain": recipe, "path": path and str(path), "sha256": sha256}
    seed |= {"reinitialize": reinitialize}
    return small_config(**SPEECH_CHANGES | changes, seed_model=seed)


def found(settings: ExperimentConfig, listener: Watching | None = None) -> ExperimentConfig:
    listener = listener or Watching()
    return with_seed_model(settings, listener, listener.stop)


def refused(settings: ExperimentConfig, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        found(settings)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def made_once(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("made") / "seed.safetensors"
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(DATASETS.registered, "tones", build_tones)
        found(config(path=path))
    return path


@pytest.fixture
def made(made_once) -> Path:
    """The file of a seed model, in the working directory."""
    return Path(shutil.copy(made_once, Path.cwd() / "seed.safetensors"))


def same(one: Path, two: Path) -> bool:
    """Whether numbers and measures are equal: the order of a file's metadata is not fixed."""
    return digest_of(load_file(one)) == digest_of(load_file(two)) and read_measures(
        one
    ) == read_measures(two)


# Making it.


def test_it_is_made_where_it_is_missing_and_only_then(made):
    listener = Watching()
    settings = found(config(), listener)
    assert listener.steps == [1, 2, 3, 4, 5, 6]
    path = settings.seed_model.path
    assert path == seed_path(config()).absolute() == Path("runs/small").absolute() / path.name
    assert path.exists()
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # nothing else is left
    again = Watching()
    assert found(config(), again) == settings
    assert again.steps == []
    # An equal recipe under another name makes an equal model.
    assert digest_of(load_file(made)) == settings.seed_model.sha256


def test_path_and_digest_end_up_in_the_config(made):
    settings = found(config(recipe=None, path=made))
    assert settings.seed_model.path == made
    assert settings.seed_model.sha256 == digest_of(load_file(made))
    assert found(settings) == settings
    Path("config.yaml").write_text(settings.to_yaml())
    assert load_config(Path("config.yaml")) == settings


def test_none_is_trained_on_a_recording_that_is_said_to_be_a_users(monkeypatch):
    disputed = dataclasses.replace(tiny_speech(), disputed="one.wav is listed for two speakers")

    def build_disputed(options: TonesOptions, seed: int):
        return disputed

    monkeypatch.setitem(DATASETS.registered, "tones", build_disputed)
    refused(config(), "listed for two speakers")
    assert not seed_path(config()).exists()


def test_what_was_measured_is_kept_in_the_file(made):
    measures = read_measures(made)
    assert set(measures) == {"public_held_out", "held_out"}
    words = sum(len(one.text.split()) for one in tiny_speech().held_out)
    assert measures["held_out"]["words"] == words
    assert 0 <= measures["public_held_out"]["wer"] <= 5
    save_file(load_file(made), "foreign.safetensors")
    assert read_measures(Path("foreign.safetensors")) == {}


@pytest.mark.parametrize("stop_after", [1, 2, 5])
def test_an_interrupted_pretraining_goes_on_to_the_same_file(made, stop_after):
    path = Path("other.safetensors")
    with pytest.raises(Interrupted, match=f"after step {stop_after}"):
        found(config(path=path), Watching(stop_after))
    assert not path.exists()
    listener = Watching()
    found(config(path=path), listener)
    assert listener.steps == list(range(stop_after + 1, 7))
    assert same(path, made)
    assert not Path("other.checkpoints").exists()


def test_a_stop_at_the_last_step_keeps_the_file_and_runs_nothing_more():
    path = Path("seed.safetensors")
    with pytest.raises(Interrupted, match=r"seed\.safetensors"):
        found(config(path=path), Watching(stop_after=6))
    again = Watching()
    found(config(path=path), again)
    assert again.steps == []


def test_what_a_killed_process_left_does_not_get_in_the_way(made):
    path, folder = Path("other.safetensors"), Path("other.checkpoints")
    with pytest.raises(Interrupted):
        found(config(path=path), Watching(stop_after=3))
    (folder / "round-000004.partial").write_bytes(b"torn")
    path.with_suffix(".partial").write_bytes(b"torn")
    found(config(path=path))
    assert same(path, made)
    assert not folder.exists()


def test_files_of_others_beside_the_checkpoints_are_left_alone():
    folder = Path("seed.checkpoints")
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    found(config(path=Path("seed.safetensors")))
    assert [file.name for file in folder.iterdir()] == ["notes.txt"]


def test_checkpoints_of_another_recipe_are_refused():
    path = Path("seed.safetensors")
    with pytest.raises(Interrupted):
        found(config(path=path), Watching(stop_after=3))
    refused(config(path=path, recipe=RECIPE | {"lr": 0.02}), "belongs to another configuration")
    assert not path.exists()
    # How often it is measured is no part of the recipe.
    found(config(path=path, recipe=RECIPE | {"every": 1}))


@pytest.mark.parametrize(
    ("changes", "equal"),
    [
        ({}, True),
        ({"recipe": RECIPE | {"every": 5}}, True),
        (
            {"rounds": 9, "local__lr": 0.5, "server__lr": 0.5, "privacy__noise_multiplier": 2.0},
            True,
        ),
        ({"data__users": 20}, True),
        ({"seed": 6}, False),
        ({"recipe": RECIPE | {"steps": 7}}, False),
        ({"recipe": RECIPE | {"spec_augment": {}}}, False),
        ({"model__dim": 16}, False),
        ({"data__speech__public_speakers": 5}, False),
    ],
)
def test_its_own_name_says_all_that_it_depends_on(changes, equal):
    assert (seed_path(config(**changes)).name == seed_path(config()).name) is equal


def test_it_does_not_depend_on_the_users(made):
    path = Path("other.safetensors")
    found(config(path=path, data__users=20, rounds=9))
    assert same(path, made)


# What is refused.


def test_a_missing_file_that_nothing_says_how_to_make(tmp_path):
    refused(config(recipe=None, path=tmp_path / "none.safetensors"), r"seed_model\.path: there is")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "folder"])
@pytest.mark.parametrize("recipe", [None, RECIPE])
def test_a_corrupt_file_is_refused_and_not_made_anew(made, damage, recipe):
    whole = made.read_bytes()
    if damage == "folder":
        made.unlink()
        made.mkdir()
    else:
        made.write_bytes({"empty": b"", "text": b"hello", "cut": whole[:-7]}[damage])
        before = made.read_bytes()
    refused(config(recipe=recipe, path=made), r"seed_model\.path: cannot read .*seed\.safetensors")
    assert made.is_dir() if damage == "folder" else made.read_bytes() == before


@pytest.mark.parametrize("recipe", [None, RECIPE])
def test_another_digest_is_refused_and_nothing_overwritten(made, recipe):
    before = made.read_bytes()
    refused(config(recipe=recipe, path=made, sha256="0" * 64), r"seed_model\.sha256: .* other")
    assert made.read_bytes() == before


def test_a_file_that_changed_under_a_run_is_refused(made):
    settings = found(config(recipe=None, path=made))
    blocks = load_file(made)
    blocks["head.bias"][0] += 1.0
    save_file(blocks, made)
    with pytest.raises(InputError, match="is not the file that this run began with"):
        experiment.prepare(settings)


@pytest.mark.parametrize("change", ["shape", "missing", "additional"])
def test_a_file_of_another_shape_is_refused_in_a_line(made, change):
    blocks = load_file(made)
    if change == "shape":
        blocks["head.bias"] = torch.zeros(9)
    elif change == "missing":
        del blocks["head.bias"]
    else:
        blocks["more"] = torch.zeros(2)
    save_file(blocks, made)
    settings = found(config(recipe=None, path=made))
    with pytest.raises(InputError, match=r"seed_model\.path: .* of another shape") as error:
        experiment.prepare(settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("train", ["all", "head"])
@pytest.mark.parametrize("change", ["same", "shape", "missing"])
def test_a_new_output_layer_begins_anew(made, change, train):
    blocks = load_file(made)
    if change == "shape":
        blocks["head.bias"] = torch.zeros(9)
    elif change == "missing":
        del blocks["head.bias"], blocks["head.weight"]
    save_file(blocks, made)
    settings = found(config(recipe=None, path=made, reinitialize=["head.*"], model__train=train))
    model = experiment.prepare(settings).trainer.model
    start = {name: p.detach() for name, p in model.named_parameters()}
    before = parameters_of(build_trainer(small_config(**SPEECH_CHANGES)).model)
    assert start.keys() == before.keys()
    assert all(torch.equal(start[name], blocks[name]) for name in start.keys() - HEAD)
    # Its scale is that of any beginning, and its numbers are those of no run with this seed.
    new, old = start["head.weight"], before["head.weight"]
    assert new.std().item() == pytest.approx(old.std().item(), rel=0.2)
    assert abs(torch.corrcoef(torch.stack([new.flatten(), old.flatten()]))[0, 1]) < 0.3
    assert not start["head.bias"].any()
    again = experiment.prepare(settings).trainer.model
    assert torch.equal(dict(again.named_parameters())["head.weight"], new)


def test_the_seed_models_own_training_does_not_depend_on_what_begins_anew_later():
    whole, anew = (found(config(reinitialize=each)) for each in ([], ["head.*"]))
    digest = whole.seed_model.sha256
    whole.seed_model.path.unlink()
    assert found(config(reinitialize=["head.*"])).seed_model.sha256 == digest
    assert anew.seed_model.path == whole.seed_model.path


@pytest.mark.parametrize("change", ["shape", "missing", "additional"])
def test_all_but_the_new_layer_must_fit(made, change):
    blocks = load_file(made)
    name = next(name for name in blocks if name not in HEAD)
    if change == "shape":
        blocks[name] = torch.zeros(9, 8, 7)
    elif change == "missing":
        del blocks[name]
    else:
        name, blocks["more"] = "more", torch.zeros(2)
    save_file(blocks, made)
    settings = found(config(recipe=None, path=made, reinitialize=["head.*"]))
    with pytest.raises(InputError, match=rf"of another shape .*{name} is .*reinitialize"):
        experiment.prepare(settings)


@pytest.mark.parametrize(
    ("patterns", "words"),
    [(["haed.*"], r"no parameter matches 'haed\.\*'.*head\.bias"), (["*"], "leave seed_model out")],
)
def test_patterns_of_none_and_of_all_are_refused(made, patterns, words):
    settings = found(config(recipe=None, path=made, reinitialize=patterns))
    with pytest.raises(InputError, match=rf"seed_model\.reinitialize: .*{words}") as error:
        experiment.prepare(settings)
    assert "\n" not in str(error.value)


def test_a_pattern_of_none_is_refused_before_a_seed_model_is_trained():
    listener = Watching()
    with pytest.raises(InputError, match=r"seed_model\.reinitialize: no parameter .*'haed\.\*'"):
        found(config(reinitialize=["haed.*"]), listener)
    assert listener.steps == []
    assert not seed_path(config()).parent.exists()


def test_patterns_are_a_list():
    with pytest.raises(InputError, match=r"seed_model\.reinitialize: write a list: \[head\.\*\]"):
        config(reinitialize="head.*")


@pytest.mark.parametrize("train", ["all", "head"])
@pytest.mark.parametrize("wrong", ["missing", "digest", "shape", "pattern", "torch"])
def test_validating_a_config_says_what_a_run_would(made, wrong, train):
    patterns = []
    if wrong == "missing":
        made.unlink()
    elif wrong == "shape":
        save_file(load_file(made) | {"head.bias": torch.zeros(9)}, made)
    elif wrong == "pattern":
        patterns = ["haed.*"]
    elif wrong == "torch":
        torch.save({"head.bias": torch.zeros(3)}, made)
    sha256 = "0" * 64 if wrong == "digest" else None
    settings = config(None, made, sha256, patterns, model__train=train)
    Path("config.yaml").write_text(settings.to_yaml())
    before = sorted(Path().iterdir())
    done = CliRunner().invoke(app, ["config", "validate", "config.yaml"])
    with pytest.raises(InputError, match=r"^seed_model\.") as error:
        experiment.prepare(found(settings))
    assert str(done.exception) == str(error.value)
    assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize("path", [None, "made"])
def test_a_config_whose_seed_model_fits_or_can_be_made_is_valid(made, path):
    Path("config.yaml").write_text(config(path=path and made).to_yaml())
    done = CliRunner().invoke(app, ["config", "validate", "config.yaml"])
    assert "valid" in done.output
    assert done.exit_code == 0
    assert not Path("runs").exists()


def test_a_new_output_layer_makes_another_run(made):
    whole, anew = (
        found(config(recipe=None, path=made, reinitialize=each)) for each in ([], ["head.*"])
    )
    assert whole.fingerprint("") != anew.fingerprint("")


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_a_file_with_numbers_that_are_not_finite_is_refused(made, number):
    blocks = load_file(made)
    blocks["head.weight"][1, 2] = number
    save_file(blocks, made)
    with pytest.raises(InputError, match="holds a NaN or Inf"):
        experiment.prepare(found(config(recipe=None, path=made)))


def test_a_data_set_without_a_public_part_is_refused():
    refused(
        small_config(seed_model={"pretrain": RECIPE}),
        r"seed_model\.pretrain: digits has no public part",
    )
    refused(config(data__speech__public_speakers=0), "needs public recordings")


def test_a_place_that_cannot_be_written_is_refused():
    Path("file").write_text("not a folder")
    refused(config(path=Path("file/seed.safetensors")), r"seed_model\.path: cannot write")


def test_without_a_section_nothing_happens():
    settings = small_config()
    assert found(settings) is settings


# What is known of it.


def origin(settings):
    return seed_model.origin_of(found(settings))


def test_a_seed_model_is_known_by_recipe_data_and_numbers(made):
    def with_path(**changes):
        return config(path=made, **changes)

    assert origin(with_path()) == "pretrained"
    assert origin(with_path(recipe=RECIPE | {"every": 3})) == "pretrained"  # changes no number
    assert origin(with_path(recipe=None)) == "outside"
    assert origin(with_path(recipe=RECIPE | {"lr": 0.5})) == "outside"
    assert origin(with_path(seed=6)) == "outside"
    with safe_open(made, framework="pt") as file:
        said = file.metadata()
    blocks = load_file(made)
    save_file(blocks, made, said)
    assert origin(with_path()) == "pretrained"
    blocks["head.bias"][0] += 1.0
    save_file(blocks, made, said)
    assert origin(with_path()) == "outside"
    save_file(load_file(made), made)
    assert origin(with_path()) == "outside"


def test_a_run_records_what_is_known_of_it(made):
    prepared = experiment.prepare(found(config(path=made, run_dir="run")))
    environment = experiment.create(prepared).environment()
    assert environment["seed_model"] == {"origin": "pretrained"}
    outside = experiment.prepare(found(config(recipe=None, path=made, run_dir="other")))
    assert experiment.create(outside).environment()["seed_model"] == {"origin": "outside"}


# Starting from it.


def test_the_fingerprint_depends_on_the_numbers_and_not_on_the_place(made):
    here = found(config(recipe=None, path=made))
    moved = Path(shutil.copy(made, "moved.safetensors"))
    there = found(config(path=moved, recipe=RECIPE | {"lr": 0.5}))
    assert here.fingerprint("") == there.fingerprint("")
    blocks = load_file(made)
    blocks["head.bias"][0] += 1.0
    save_file(blocks, moved)
    assert found(config(recipe=None, path=moved)).fingerprint("") != here.fingerprint("")
    assert small_config(**SPEECH_CHANGES).fingerprint("") != here.fingerprint("")


def test_a_run_starts_from_it(made):
    prepared = experiment.prepare(found(config(recipe=None, path=made)))
    start, blocks = parameters_of(prepared.trainer.model), load_file(made)
    assert start.keys() == blocks.keys()
    assert all(torch.equal(start[name], blocks[name]) for name in start)
    expected = torch.cat([blocks[name].flatten() for name in start])
    assert torch.equal(prepared.server.parameters(), expected)
    random = parameters_of(build_trainer(small_config(**SPEECH_CHANGES)).model)
    assert not torch.equal(start["head.weight"], random["head.weight"])


def test_its_first_round_trains_from_it(made):
    """The parameters that the nodes are sent are those of the file."""
    prepared = experiment.prepare(found(config(recipe=None, path=made, run_dir="run")))
    grid = InProcessGrid(nodes=1)
    experiment.train(prepared, experiment.create(prepared), Silent(), drive_on(grid))
    first = next(m for m in grid.sent if m.metadata.message_type == "train")
    blocks = load_file(made)
    expected = torch.cat([blocks[name].flatten() for name in prepared.plan.layout.names])
    assert torch.equal(work_of(first).parameters, expected)


class Killed(Silent):
    """An observer that ends the process, so to speak, after round 2."""

    def finished(self, row):
        super().finished(row)
        if row["round"] == 2:
            raise KeyboardInterrupt


def test_a_run_goes_on_without_the_file_once_there_is_a_checkpoint(made):
    final = []
    for folder, observer in (("whole", Silent()), ("killed", Killed())):
        prepared = experiment.prepare(found(config(recipe=None, path=made, run_dir=folder)))
        directory = experiment.create(prepared)
        with suppress(KeyboardInterrupt):
            experiment.train(prepared, directory, observer, drive_on(None))
    made.unlink()
    directory, resumed = resume_small(Path("killed"))
    assert resumed.finished_rounds == 2
    assert [row["round"] for row in directory.read_metrics()] == [1, 2, 3, 4]
    for folder in ("whole", "killed"):
        newest = checkpoint_files(Path(folder) / "checkpoints")[-1]
        final.append(load_file(newest))
    assert all(torch.equal(final[0][name], block) for name, block in final[1].items())


def test_a_run_without_a_checkpoint_needs_the_file(made):
    experiment.create(experiment.prepare(found(config(recipe=None, path=made, run_dir="run"))))
    assert experiment.reopen(Path("run"))[1].finished_rounds == 0
    made.unlink()
    with pytest.raises(InputError, match=r"seed_model\.path: there is no .*seed\.safetensors; "):
        experiment.reopen(Path("run"))


def test_loading_leaves_the_model_alone_where_the_file_does_not_fit(made):
    settings = found(config(recipe=None, path=made))
    model = build_trainer(settings).model
    before = {name: block.clone() for name, block in parameters_of(model).items()}
    save_file({"head.bias": torch.zeros(3)}, made)
    with pytest.raises(InputError):
        load_seed_model(settings, model)
    assert all(torch.equal(before[name], block) for name, block in parameters_of(model).items())


def test_a_pretraining_that_fails_leaves_no_file(monkeypatch):
    def fails(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(seed_model, "write_tensors", fails)
    with pytest.raises(OSError, match="No space"):  # which the command line calls resumable
        found(config(path=Path("seed.safetensors")))
    assert not Path("seed.safetensors").exists()
