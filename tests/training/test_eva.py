"""Adapters begin with the directions of public examples, and all that follows knows of it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from in_process import Silent, drive_on, small_config, train_small
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from tiny_speech import RATE
from torch import nn

from fedpriv import experiment, preparation
from fedpriv.data.facts import DataFacts
from fedpriv.data.federated import Examples
from fedpriv.errors import InputError
from fedpriv.federation.builders import build_trainer
from fedpriv.models.lora import adapters_of, merged
from fedpriv.models.registry import build_model
from fedpriv.reporting.data_statement import start_sentences
from fedpriv.reporting.reader import read_run
from fedpriv.training.eva import begin_with_public

OUTSIDE = str(Path(__file__).parent.parent / "outside")
EVA = {"train": "lora", "lora": {"r": 3, "variant": "eva"}}
OURS = {f"model__{key}": value for key, value in EVA.items()}
TIMM = {"code": OUTSIDE, "model": {"name": "pretrained:timm_vit", **EVA}}


def begun(**changes):
    trainer = build_trainer(small_config(**changes))
    begin_with_public(trainer, 500, 5)
    return trainer


def held_out(trainer) -> torch.Tensor:
    return torch.cat([part.inputs for part in trainer.dataset.evaluation()])


def test_it_is_what_peft_itself_makes_of_the_same_model_and_examples():
    trainer = begun(**TIMM)
    options = small_config(**TIMM).model.whole()
    plain = build_model(options, trainer.dataset.input_shape, trainer.dataset.classes, 5)
    wanted = LoraConfig(
        r=3,
        target_modules=["qkv", "attn.proj", "fc1", "fc2"],
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=1.0),
    )
    theirs = get_peft_model(plain, wanted)
    initialize_lora_eva_weights(
        theirs,
        list(held_out(trainer).split(500)),
        forward_fn=lambda model, batch: model(batch),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    expected = dict(adapters_of(theirs.get_base_model()))
    ours = adapters_of(trainer.model)
    assert {path for path, _ in ours} == expected.keys()
    for path, layer in ours:
        assert not layer.lora_B["default"].weight.any()
        torch.testing.assert_close(
            layer.lora_A["default"].weight, expected[path].lora_A["default"].weight
        )


@torch.no_grad()
def test_a_maps_directions_are_the_principal_ones_of_what_it_reads():
    trainer = begun(**OURS, evaluation__batch_size=10_000)
    read = []
    whole = merged(trainer.model)
    whole.embed.register_forward_hook(lambda layer, inputs, output: read.append(inputs[0]))
    whole(held_out(trainer))
    rows = read[0].flatten(0, -2).double()
    _, _, principal = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    found = dict(adapters_of(trainer.model))["embed"].lora_A["default"].weight.double()
    alike = (found @ principal[:3].T).abs()
    torch.testing.assert_close(alike, torch.eye(3, dtype=torch.float64), rtol=0, atol=0.05)


def test_targets_have_no_part_in_it(monkeypatch):
    one = begun(**OURS)
    parts = [
        replace(part, targets=1 - part.targets.clamp(max=1)) for part in one.dataset.evaluation()
    ]
    monkeypatch.setattr(type(one.dataset), "evaluation", lambda self: iter(parts))
    other = dict(adapters_of(begun(**OURS).model))
    for path, layer in adapters_of(one.model):
        assert layer.lora_A["default"].weight.equal(other[path].lora_A["default"].weight)


@torch.no_grad()
def test_the_model_computes_what_it_did_before():
    trainer, before = begun(**OURS), build_trainer(small_config(**OURS))
    x = held_out(trainer)[:5]
    assert trainer.model(x).equal(before.model(x))
    moved = [
        not one.equal(other)
        for (name, one), other in zip(
            trainer.model.named_parameters(), before.model.parameters(), strict=True
        )
        if "lora_A" in name
    ]
    assert moved
    assert all(moved)


def test_speech_and_tokens_too():
    speech = begun(
        data={
            "name": "tiny_speech:build_tones",
            "speech": {"sample_rate": RATE, "public_speakers": 4},
        },
        code=str(Path(__file__).parent.parent),
        model={"name": "speech", "dim": 8, "depth": 1, "heads": 2, "mels": 8, **EVA},
    )
    letters = {"data": {"name": "letters:alphabets", "users": 60}, "code": OUTSIDE}
    gpt2 = begun(model={"name": "pretrained:gpt2", **EVA}, **letters)
    for trainer in (speech, gpt2):
        for _, layer in adapters_of(trainer.model):
            rows = layer.lora_A["default"].weight
            torch.testing.assert_close(rows @ rows.T, torch.eye(3), rtol=0, atol=1e-4)


# A run: the server begins so, nodes read no data for it, and other data are another run.


def test_nodes_read_nothing_for_it_and_a_run_goes_on_without_it(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    prepared = experiment.prepare(small_config(run_dir=str(folder), rounds=2, **OURS))
    directory = experiment.create(prepared)

    def fail(*work):
        raise AssertionError("a node has read examples")

    monkeypatch.setattr("fedpriv.training.eva.begin_with_public", fail)
    experiment.train(prepared, directory, Silent(), drive_on(None))
    assert len(directory.read_metrics()) == 2
    after = experiment.reopen(folder)[1].server.model
    for name, parameter in prepared.server.model.named_parameters():
        assert dict(after.named_parameters())[name].equal(parameter)
    assert directory.config().model.start_sha256 is not None


def test_runs_that_begin_with_what_others_show_share_no_noise(monkeypatch):
    config = small_config(**OURS)
    one, again = experiment.prepare(config).plan, experiment.prepare(config).plan
    dataset = build_trainer(config).dataset
    parts = [replace(part, inputs=part.inputs.flip(-1)) for part in dataset.evaluation()]
    monkeypatch.setattr(type(dataset), "evaluation", lambda self: iter(parts))
    other = experiment.prepare(config).plan
    assert one.fingerprint == again.fingerprint != other.fingerprint
    told = r"^model\.start_sha256: vit begins with other numbers .* the same examples, or"
    with pytest.raises(InputError, match=told):
        experiment.prepare(one.config)


@pytest.mark.parametrize(("whose", "why"), [("same", "users themselves"), ("unknown", "facts")])
def test_examples_of_users_begin_no_private_run(whose, why, monkeypatch):
    def of(*given, **named):
        trainer = build_trainer(*given, **named)
        facts = DataFacts(held_out=whose)
        return replace(trainer, dataset=replace(trainer.dataset, facts=facts))

    monkeypatch.setattr(preparation, "build_trainer", of)
    with pytest.raises(InputError, match=rf"^model\.lora\.variant: eva: .*{why}") as caught:
        experiment.prepare(small_config(**OURS))
    assert "\n" not in str(caught.value)
    experiment.prepare(small_config(**OURS, privacy=None, cohort=8))


def flat(input_shape, classes: int) -> nn.Module:
    """Return two maps, each of which reads one row an example."""
    return nn.Sequential(nn.Flatten(1), nn.Linear(64, 6), nn.Linear(6, classes))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {**OURS, "model__lora": {"r": 17, "variant": "eva"}},
            r"^model\.lora\.r: embed reads 16 numbers, .* write at most 16, or",
        ),
        (
            {
                "code": OUTSIDE,
                "model": {
                    "name": "pretrained:timm_vit",
                    "train": "lora",
                    "lora": {"r": 2, "variant": "eva", "target_modules": ["patch_embed.proj"]},
                },
            },
            r"^model\.lora\.variant: eva is for linear maps, and patch_embed\.proj is a Conv2d",
        ),
    ],
)
def test_what_has_no_directions_is_told_in_a_line(changes, told):
    with pytest.raises(InputError, match=told) as caught:
        experiment.prepare(small_config(**changes))
    assert "\n" not in str(caught.value)


def test_too_few_examples_end_in_a_line_and_not_in_a_loop(monkeypatch, capsys):
    alone = {"r": 3, "variant": "eva", "head": False}
    model = {"name": "test_eva:flat", "train": "lora", "lora": alone}
    trainer = build_trainer(small_config(code=str(Path(__file__).parent), model=model))
    few = Examples(torch.rand(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64))
    told = {
        few: r"^model\.lora\.r: eva finds no 3 directions .* pissa",
        few.take(torch.arange(0)): "reads held-out examples, and there are none",
    }
    for part, sentence in told.items():
        parts = [part]
        monkeypatch.setattr(type(trainer.dataset), "evaluation", lambda self, p=parts: iter(p))
        with pytest.raises(InputError, match=sentence) as caught:
            begin_with_public(trainer, 500, 5)
        assert "\n" not in str(caught.value)
    assert not capsys.readouterr().out  # of peft's, which prints


def test_the_statement_says_what_the_start_has_seen(tmp_path):
    train_small(tmp_path / "eva", rounds=1, **OURS)
    (random, eva) = start_sentences(read_run(tmp_path / "eva"))
    assert "depend on the seed alone" in random
    assert "held-out examples' inputs (EVA)" in eva
    train_small(tmp_path / "timm", rounds=1, **{**TIMM, "model": {"name": "pretrained:timm_vit"}})
    (own,) = start_sentences(read_run(tmp_path / "timm"))
    assert "of whose training fedpriv knows nothing" in own
