"""What a model of speech from outside needs, and is told where it lacks it."""

import pytest
import torch
from in_process import small_config, train_small
from tiny_speech import RATE, SPEECH_CHANGES, build_tones
from torch import nn

from fedpriv.data.registry import DATASETS
from fedpriv.errors import InputError
from fedpriv.federation.builders import build_trainer

HOP = 400


class Waves(nn.Module):
    """Reads waveforms: a token for each 50 ms."""

    def __init__(self, classes: int = 4, told: int = 0) -> None:
        super().__init__()
        self.head, self.told = nn.Linear(HOP, classes), told

    def tokens(self, lengths: torch.Tensor) -> torch.Tensor:
        return lengths // HOP + self.told

    def forward(self, waves: torch.Tensor, lengths: torch.Tensor):
        return self.head(waves.unfold(1, HOP, HOP)).log_softmax(-1), lengths // HOP


class Scores(Waves):
    """Gives no lengths."""

    def forward(self, waves, lengths):
        return super().forward(waves, lengths)[0]


@pytest.fixture(autouse=True)
def _known(monkeypatch):
    monkeypatch.setitem(DATASETS.registered, "tones", build_tones)


def test_it_is_trained_on_waveforms(tmp_path):
    changes = {**SPEECH_CHANGES, "model": Waves(), "rounds": 2}
    _, prepared = train_small(tmp_path / "run", **changes)
    user = prepared.trainer.prepared(3)
    assert user.inputs.dim() == 2
    assert user.lengths.tolist() == [RATE // 10 * int(n) for n in user.target_lengths]


@pytest.mark.parametrize(("model", "seconds"), [(Waves(), RATE), (SPEECH_CHANGES["model"], 100)])
def test_a_batch_has_so_many_seconds_whatever_a_model_reads(model, seconds):
    changes = {**SPEECH_CHANGES, "model": model, "local__batch_seconds": 0.5}
    assert build_trainer(small_config(**changes)).recipe.batch_sizes == 0.5 * seconds


@pytest.mark.parametrize(
    ("model", "changes", "told"),
    [
        (Waves(classes=9), {}, "a score for each character and the blank"),
        (Waves(told=1), {}, "other numbers of tokens than its method `tokens` says"),
        (Scores(), {}, "returns a Tensor; for speech it must return log-probabilities"),
        (nn.Linear(1, 1), {}, r"a model of speech needs a method tokens\(lengths\)"),
        (Waves(), {"local__spec_augment": {}}, "write local.spec_augment: null"),
    ],
)
def test_what_it_lacks_is_told_in_a_line(model, changes, told, tmp_path):
    with pytest.raises(InputError, match=told) as caught:
        train_small(tmp_path / "run", **{**SPEECH_CHANGES, "model": model, **changes})
    assert str(caught.value).startswith("model.name: ")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
