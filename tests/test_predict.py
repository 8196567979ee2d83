"""One input, as the run's data set reads its own, and what the run's model makes of it."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from in_process import Silent, drive_on, small_config, train_small
from own_data import document_of, write_images
from tiny_speech import RATE, SPEECH_CHANGES, build_tones
from typer.testing import CliRunner

from fedpriv import experiment
from fedpriv.cli import app
from fedpriv.config_files import parse_config
from fedpriv.data.registry import DATASETS
from fedpriv.errors import InputError
from fedpriv.experiment import train
from fedpriv.predict import _told
from fedpriv.tasks.next_token import NextToken


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder, and what it left."""
    folder = tmp_path_factory.mktemp("predict") / "run"
    return folder, train_small(folder, rounds=1)[1]


def predicted(folder: Path, what: str, *more: str) -> str:
    done = CliRunner().invoke(app, ["predict", str(folder), what, *more])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.stdout


def test_the_likeliest_classes_of_an_array_are_printed(run, tmp_path):
    folder, prepared = run
    inputs = prepared.held_out[0].inputs[:3]
    np.save(tmp_path / "three.npy", inputs.numpy())
    np.save(tmp_path / "one.npy", inputs[1].numpy())
    lines = predicted(folder, str(tmp_path / "three.npy")).splitlines()
    with torch.no_grad():
        shares = prepared.server.model.eval()(inputs).softmax(1)
    for line, row in zip(lines, shares, strict=True):
        first, share = line.split(", ")[0].split()
        assert int(first) == int(row.argmax())
        assert share == f"{100 * float(row.max()):.1f}%"
    assert predicted(folder, str(tmp_path / "one.npy")).splitlines() == lines[1:2]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("wrong.npy", r"holds float64 \(3, 3\); the model reads numbers of shape \(1, 8, 8\)"),
        ("none.npy", r"none\.npy: cannot be read"),
        ("nan.npy", r"nan\.npy: input 2 has a value that is no finite number; write numbers"),
        ("large.npy", r"large\.npy: input 1 has a value that is no finite number; write numbers"),
        ("far.npy", r"far\.npy: what the model makes of input 3 is no number; .* data\.mean"),
        ("empty.npy", r"empty\.npy holds no input; write one, or several, of shape \(1, 8, 8\)"),
        ("several.npy", r"several\.npy: cannot be read \(it is an archive\)"),
        ("torn.npy", r"torn\.npy: cannot be read"),
        ("image.png", r"of the data set digits only a \.npy file can be read"),
    ],
)
def test_what_the_model_does_not_read_is_told(run, name, told, tmp_path):
    np.save(tmp_path / "wrong.npy", np.zeros((3, 3)))
    three = np.zeros((3, 1, 8, 8))
    for number, (bad, value) in enumerate({"large": 1e300, "nan": np.nan, "far": 3e38}.items()):
        given = three.copy()
        given[number, 0, :3, :4] = value
        np.save(tmp_path / f"{bad}.npy", given)
    np.save(tmp_path / "empty.npy", three[:0])
    with (tmp_path / "several.npy").open("wb") as file:
        np.savez(file, three=three)
    (tmp_path / "torn.npy").write_bytes((tmp_path / "several.npy").read_bytes()[:99])
    with pytest.raises(InputError, match=told) as caught:
        predicted(run[0], str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_an_image_is_read_as_the_data_sets_own_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "data")
    prepared = experiment.prepare(parse_config({**document_of("image_folder"), "run_dir": "run"}))
    train(prepared, experiment.create(prepared), Silent(), drive_on(None))
    line = predicted(Path("run"), "data/test/dog/1.png").strip()
    first = prepared.held_out[0].inputs
    with torch.no_grad():
        shares = prepared.server.model.eval()(first).softmax(1)
    told = ["cat" if row[0] > row[1] else "dog" for row in shares]
    texts = [
        f"{name} {100 * float(row.max()):.1f}%" for name, row in zip(told, shares, strict=True)
    ]
    assert line.split(", ")[0] in texts
    assert "cat" in line
    assert "dog" in line


def test_a_sound_is_transcribed(tmp_path, monkeypatch):
    monkeypatch.setitem(DATASETS.registered, "tones", build_tones)
    directory, prepared = train_small(tmp_path / "run", rounds=1, **SPEECH_CHANGES)
    recording = prepared.trainer.dataset.held_out[0]
    wave = recording.read(RATE, 20.0)
    soundfile.write(tmp_path / "one.wav", wave, RATE, subtype="FLOAT")
    task, model = prepared.trainer.task, prepared.server.model.eval()
    part = prepared.held_out[0].take(torch.tensor([0]))
    with torch.no_grad():
        (characters,) = task.decode(*model(part.inputs, part.lengths))
    expected = task.alphabet.decode(characters)
    assert predicted(directory.path, str(tmp_path / "one.wav")).strip() == expected.strip()
    # As a recording in training is, which is left out then.
    gap = np.where(np.arange(len(wave)) == 9, np.nan, wave)
    for name, bad in {"empty": wave[:0], "silent": 0 * wave, "gap": gap}.items():
        soundfile.write(tmp_path / f"{name}.wav", bad, RATE, subtype="FLOAT")
        with pytest.raises(InputError, match=rf"{name}\.wav") as caught:
            predicted(directory.path, str(tmp_path / f"{name}.wav"))
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="nothing"):
        predicted(directory.path, str(tmp_path / "nothing.wav"))


class Letters:
    """Tokens of the small letters."""

    def encode(self, text: str) -> list[int]:
        return [ord(each) - ord("a") for each in text]

    def decode(self, tokens: list[int]) -> str:
        return "".join(chr(ord("a") + each) for each in tokens)


class Next(torch.nn.Module):
    """Sees after each letter the next one, of five places at once."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        assert tokens.shape == (1, 5)
        return torch.nn.functional.one_hot((tokens + 1) % 26, 26).float()


def test_a_text_goes_on_with_the_likeliest_tokens():
    dataset = SimpleNamespace(records=SimpleNamespace(tokens=Letters()), input_shape=(5,))
    trainer = SimpleNamespace(task=NextToken(), dataset=dataset, device=torch.device("cpu"))
    prepared = SimpleNamespace(trainer=trainer, config=small_config())
    assert list(_told(prepared, Next(), "xy", 6)) == ["xyzabcde"]
    with pytest.raises(InputError, match="write some text"):
        list(_told(prepared, Next(), "", 6))
    with pytest.raises(InputError, match="INPUT: the text is not UTF-8"):
        list(_told(prepared, Next(), "x\udce9", 6))
    dataset.records = None
    with pytest.raises(InputError, match="digits does not say which text its tokens are of"):
        list(_told(prepared, Next(), "xy", 6))
