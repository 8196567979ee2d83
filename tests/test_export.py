"""What a run's model becomes for others computes the same, and says what it cost."""

import errno
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from in_process import train_small
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from tiny_speech import SPEECH_CHANGES
from typer.testing import CliRunner

import fedpriv
from fedpriv import export as exporting
from fedpriv.cli import app
from fedpriv.errors import InputError
from fedpriv.export import export
from fedpriv.models.lora import merged
from fedpriv.models.registry import build_model
from fedpriv.privacy.ledger import read_ledger
from fedpriv.reporting.reader import read_run
from fedpriv.reporting.spent import spent
from fedpriv.reporting.wording import KNOWN_SEED
from fedpriv.training.checkpoint import digest_of

OUTSIDE = str(Path(__file__).parent / "outside")
LORA = {"train": "lora", "lora": {"r": 2}}
LETTERS = {"data": {"name": "letters:alphabets", "users": 60}}
RUNS = {
    "ours": ({}, {}),
    "timm": ({"model": {"name": "pretrained:timm_vit", **LORA}}, {}),
    "hf": ({"model": {"name": "hf_vit:vit", "width": 8, **LORA}}, {}),
    "gpt2": ({"model": {"name": "pretrained:gpt2"}}, LETTERS),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Each run's folder, and the model that it left, by name."""
    found = {}
    for name, (model, changes) in RUNS.items():
        folder = tmp_path_factory.mktemp(name) / "run"
        _, prepared = train_small(
            folder, rounds=2, code=OUTSIDE, evaluation__every=1, **model, **changes
        )
        found[name] = folder, prepared
    return found


def inputs_of(prepared) -> torch.Tensor:
    return next(iter(prepared.held_out)).inputs[:3]


@torch.no_grad()
def outputs(model, x) -> torch.Tensor:
    found = model(x)
    return getattr(found, "logits", found)


def expected(prepared) -> torch.Tensor:
    return outputs(prepared.server.model.eval(), inputs_of(prepared))


def anew(prepared) -> torch.nn.Module:
    """The model as its builder makes it, without adapters and with other numbers."""
    dataset = prepared.trainer.dataset
    model = build_model(prepared.config.model.whole(), dataset.input_shape, dataset.classes, 99)
    return model.eval()


@pytest.mark.parametrize("name", sorted(RUNS))
def test_safetensors_and_plain_torch_compute_the_same(runs, name, tmp_path):
    folder, prepared = runs[name]
    inputs, told = inputs_of(prepared), expected(prepared)
    model = anew(prepared)
    assert not torch.allclose(outputs(model, inputs), told, atol=1e-3)
    load_model(model, export(folder, "safetensors", tmp_path / "st") / "model.safetensors")
    torch.testing.assert_close(outputs(model, inputs), told, rtol=0, atol=1e-5)
    model = anew(prepared)
    file = export(folder, "torch", tmp_path / "pt") / "model.pt"
    document = torch.load(file, weights_only=True)
    model.load_state_dict(document["state_dict"])
    torch.testing.assert_close(outputs(model, inputs), told, rtol=0, atol=1e-5)
    with safe_open(tmp_path / "st" / "model.safetensors", framework="pt") as stored:
        assert document["metadata"].items() <= stored.metadata().items()


def test_transformers_reads_its_own_format(runs, tmp_path):
    from transformers import AutoModelForCausalLM, AutoModelForImageClassification

    for name, kind in [("hf", AutoModelForImageClassification), ("gpt2", AutoModelForCausalLM)]:
        folder, prepared = runs[name]
        model = kind.from_pretrained(export(folder, "hf", tmp_path / name)).eval()
        told = outputs(model, inputs_of(prepared))
        torch.testing.assert_close(told, expected(prepared), rtol=0, atol=1e-5)
        with safe_open(tmp_path / name / "model.safetensors", framework="pt") as stored:
            assert stored.metadata()["epsilon"]


def test_timm_reads_its_own_format(runs, tmp_path):
    import timm

    folder, prepared = runs["timm"]
    where = export(folder, "hf", tmp_path / "timm")
    model = timm.create_model(f"local-dir:{where}", pretrained=True).eval()
    told = outputs(model, inputs_of(prepared))
    torch.testing.assert_close(told, expected(prepared), rtol=0, atol=1e-5)


BY_PATH = {"name": "timm.models:vit_tiny_patch16_224", "img_size": 8, "in_chans": 1}


@pytest.mark.parametrize(
    "options",
    [
        {"patch_size": 4, "num_heads": 6, "num_classes": 10},
        {"patch_size": 2, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 10},
    ],
)
def test_timm_reads_a_model_that_the_config_names_by_its_path(options, tmp_path):
    import timm

    # Louder than in training, so that attention is far from even, and heads matter.
    _, prepared = train_small(
        tmp_path / "run", rounds=1, model=BY_PATH | options, privacy=None, cohort=8, server__lr=0.2
    )
    where = export(tmp_path / "run", "hf")
    model = timm.create_model(f"local-dir:{where}", pretrained=True).eval()
    assert model.blocks[0].attn.num_heads == options["num_heads"]
    told = outputs(model, inputs_of(prepared))
    torch.testing.assert_close(told, expected(prepared), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["half_told:timm_vit", "half_told:hf_vit"])
def test_what_the_folders_reader_would_compute_otherwise_is_refused(name, tmp_path, capfd):
    folder = tmp_path / "run"
    data = {"name": "synthetic_images", "users": 6, "synthetic": {"side": 16}}
    free = {"privacy": None, "cohort": 4, "server__lr": 0.2}
    train_small(folder, rounds=1, code=OUTSIDE, data=data, model={"name": name}, **free)
    capfd.readouterr()
    with pytest.raises(InputError, match=r"^--to: what .* computes something else") as error:
        export(folder, "hf")
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")
    assert not [each for each in folder.iterdir() if "export" in each.name]
    export(folder, "safetensors")


@pytest.mark.parametrize("name", sorted(RUNS))
def test_onnxruntime_computes_the_same_for_any_number_of_inputs(runs, name, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    folder, prepared = runs[name]
    file = export(folder, "onnx", tmp_path / "onnx") / "model.onnx"
    session = runtime.InferenceSession(file)
    inputs = inputs_of(prepared)
    (told,) = session.run(None, {"inputs": inputs.numpy()})
    np.testing.assert_allclose(told, expected(prepared).numpy(), rtol=0, atol=1e-5)
    (alone,) = session.run(None, {"inputs": inputs[:1].numpy()})
    np.testing.assert_allclose(alone, told[:1], rtol=0, atol=1e-5)
    assert session.get_modelmeta().custom_metadata_map["epsilon"]


def test_onnxruntime_writes_what_is_said_in_sounds_of_any_length(tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    tests, named = str(Path(__file__).parent), {"data__name": "tiny_speech:build_tones"}
    _, prepared = train_small(tmp_path / "run", rounds=1, code=tests, **SPEECH_CHANGES | named)
    file = export(tmp_path / "run", "onnx", tmp_path / "onnx") / "model.onnx"
    session = runtime.InferenceSession(file)
    model = prepared.server.model.eval()
    (tones,) = prepared.trainer.dataset.evaluation()
    part = tones.take(torch.tensor([0, 1, 2]))
    noise = torch.rand(2, 1_500, generator=torch.Generator().manual_seed(0)) - 0.5
    # Tones leave most bands silent, where rounding is all there is to scale up.
    for sounds, lengths, apart in [
        (part.inputs, part.lengths, 1e-4),
        (noise, torch.tensor([1_500, 900]), 1e-5),
        (noise[:1, :700], torch.tensor([700]), 1e-5),
    ]:
        with torch.no_grad():
            expected, tokens = model(sounds, lengths)
        given = {"inputs": sounds.numpy(), "lengths": lengths.numpy()}
        told, counted = session.run(None, given)
        np.testing.assert_array_equal(counted, tokens.numpy())
        np.testing.assert_allclose(told, expected.numpy(), rtol=0, atol=apart)
    assert session.get_modelmeta().custom_metadata_map["epsilon"]


def test_the_file_says_by_itself_what_it_cost(runs, tmp_path):
    folder, prepared = runs["timm"]
    file = export(folder, "safetensors", tmp_path / "st") / "model.safetensors"
    with safe_open(file, framework="pt") as stored:
        said = stored.metadata()
    run = read_run(folder)
    assert float(said["epsilon"]) == pytest.approx(min(spent(run).epsilons.values()), rel=1e-5)
    assert said["delta"] == "0.001"
    assert (said["unit"], said["mode"], said["seed"]) == ("user", "simulation", KNOWN_SEED)
    assert said["rounds"] == said["releases"] == "2"
    assert said["trained_parameters"] == str(prepared.plan.layout.total)
    assert said["frozen_sha256"] == prepared.config.model.frozen_sha256
    # The ledger's hash is a function of private data here, and what else is has no place in it.
    assert said["simulation_only.ledger_head"] == read_ledger(folder / "ledger.jsonl").hashes[-1]
    assert "ledger_head" not in said
    private = (run.header.data, run.header.fingerprint)
    card = (file.parent / "README.md").read_text(encoding="utf-8")
    assert not any(each in card or each in str(said) for each in private)


def test_the_card_is_hugging_faces_and_holds_the_statement(runs, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    folder, prepared = runs["timm"]
    text = (export(folder, "safetensors", tmp_path / "st") / "README.md").read_text("utf-8")
    card = hub.ModelCard(text)
    assert card.data.library_name == "fedpriv"
    assert card.data.pipeline_tag == "image-classification"
    assert {"differential-privacy", "federated-learning"} <= set(card.data.tags)
    (result,) = card.data.eval_results
    assert result.metric_value == pytest.approx(read_run(folder).measured.final)
    assert isinstance(yaml.safe_load(text.split("---")[1]), dict)
    assert f"**A simulation:** {KNOWN_SEED}" in text
    assert "## Privacy statement: small" in text
    assert "ε = " in text
    assert f"{prepared.plan.layout.total:,} numbers" in text
    assert "does not speak of the data" in text


def test_without_privacy_no_epsilon_is_claimed(tmp_path):
    folder = tmp_path / "run"
    train_small(folder, rounds=1, privacy=None, cohort=8, evaluation__every=1)
    said = torch.load(export(folder, "torch") / "model.pt", weights_only=True)["metadata"]
    assert not {"epsilon", "delta"} & said.keys()
    card = (folder / "export-torch" / "README.md").read_text(encoding="utf-8")
    assert "differential-privacy" not in card.split("---")[1]
    assert said["privacy"] in card


def test_nothing_is_overwritten_and_nothing_half_is_left(runs, tmp_path, monkeypatch):
    folder, _ = runs["ours"]
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(InputError, match=r"^--out: there is .*out already"):
        export(folder, "torch", out)
    assert list(out.iterdir()) == []

    for number, expected in [(errno.EACCES, InputError), (errno.ENOSPC, OSError)]:

        def fails(*work, number=number):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(exporting.torch, "save", fails)
        with pytest.raises(expected, match=re.escape(os.strerror(number))):
            export(folder, "torch", tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("to", "told"),
    [
        ("tflite", "--to: write safetensors, torch, onnx, hf or registry, not tflite"),
        ("hf", "--to: hf is for models of transformers and timm, and this is a ViT"),
    ],
)
def test_what_does_not_go_is_told_in_a_line(runs, to, told, tmp_path):
    done = CliRunner().invoke(
        app, ["export", str(runs["ours"][0]), "--to", to, "--out", str(tmp_path / "out")]
    )
    assert isinstance(done.exception, InputError)
    assert told in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_without_onnx_the_command_is_told(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'fedpriv\[onnx\]'"):
        export(runs["ours"][0], "onnx", tmp_path / "out")


def test_a_models_file_is_a_seed_model(runs, tmp_path):
    folder, prepared = runs["ours"]
    file = fedpriv.Run.open(folder).export(out=tmp_path / "out") / "model.safetensors"
    _, again = train_small(
        tmp_path / "run", rounds=1, model__train="head", seed_model=with_digest(file)
    )
    before = dict(prepared.server.model.named_parameters())
    for name, parameter in again.server.model.named_parameters():
        assert parameter.equal(before[name]) == (not name.startswith("head."))


@pytest.mark.parametrize("name", ["gpt2", "hf", "timm"])
def test_so_it_is_of_models_from_outside_tied_or_not(runs, name, tmp_path):
    folder, prepared = runs[name]
    model, changes = RUNS[name]
    file = export(folder, "safetensors", tmp_path / "out") / "model.safetensors"
    _, again = train_small(
        tmp_path / "run",
        rounds=1,
        code=OUTSIDE,
        model=model["model"] | {"train": "head", "lora": None},
        **changes,
        seed_model={"path": str(file), "sha256": digest_of(load_file(file))},
    )
    before = dict(merged(prepared.server.model).named_parameters())
    frozen = {n: p for n, p in again.server.model.named_parameters() if not p.requires_grad}
    assert frozen
    assert all(torch.equal(parameter, before[each]) for each, parameter in frozen.items())


def with_digest(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as stored:
        return {"path": str(file), "sha256": stored.metadata()["model_sha256"]}


def test_adapters_are_merged_in_a_copy(runs):
    _, prepared = runs["hf"]
    assert any(".lora_" in name for name in merged_names(prepared.server.model))
    assert not any(".lora_" in name for name in merged_names(merged(prepared.server.model)))


def merged_names(model) -> list[str]:
    return [name for name, _ in model.named_parameters()]
