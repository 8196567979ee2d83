"""What a run's model makes of one input: a file, read as the run's data set reads its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor, nn

from fedpriv.data.audio import read_audio
from fedpriv.data.files import is_clean
from fedpriv.data.images import SUFFIXES, ImageForm
from fedpriv.data.speech import FederatedSpeech
from fedpriv.data.utterances import Utterances
from fedpriv.errors import InputError
from fedpriv.experiment import Experiment, Which, reopen_model
from fedpriv.tasks.base import outputs_of
from fedpriv.tasks.next_token import NextToken
from fedpriv.tasks.recognition import Recognition
from fedpriv.tasks.regression import Regression

# Of so many classes the likeliest are told.
_LIKELIEST = 5


def predict(path: Path, what: str, tokens: int = 32, which: Which | None = None) -> list[str]:
    """Return, in lines, what a model of the run at `path` makes of an input: see `reopen_model`.

    `what` is the path of an image, a sound, or a .npy file of one input or several as the model
    reads them; where text is learnt it may be text, to which `tokens` are added.

    Raises:
        InputError: there is no model, or it does not read that.
    """
    prepared = reopen_model(path, which)
    return list(_told(prepared, prepared.server.model.eval(), what, tokens))


@torch.no_grad()
def _told(prepared: Experiment, model: nn.Module, what: str, tokens: int) -> Iterator[str]:
    task = prepared.trainer.task
    if isinstance(task, Recognition):
        yield _transcript(prepared, model, Path(what))
    elif isinstance(task, NextToken):
        yield _continued(prepared, model, what, tokens)
    else:
        inputs = _inputs(prepared, Path(what)).to(prepared.trainer.device)
        _require_finite(inputs, f"{what}:", "has a value that is no finite number; write numbers")
        outputs = outputs_of(model, inputs).cpu()
        scale = "is no number; scale it as the run's data are, by data.mean and data.std, say"
        _require_finite(outputs, f"{what}: what the model makes of", scale)
        for row in outputs:
            yield _numbers(row) if isinstance(task, Regression) else _classes(prepared, row)


def _numbers(row: Tensor) -> str:
    return ", ".join(f"{value:.6g}" for value in row.flatten().tolist())


def _classes(prepared: Experiment, row: Tensor) -> str:
    named = getattr(prepared.trainer.dataset, "class_names", ())
    shares, classes = row.softmax(0).topk(min(_LIKELIEST, len(row)))
    return ", ".join(
        f"{named[each] if each < len(named) else each} {100 * share:.1f}%"
        for share, each in zip(shares.tolist(), classes.tolist(), strict=True)
    )


def _inputs(prepared: Experiment, path: Path) -> Tensor:
    """Return what is in a file as the model reads it: `[n, ...]`."""
    dataset, options = prepared.trainer.dataset, prepared.config.data
    shape = tuple(dataset.input_shape)
    if path.suffix.lower() == ".npy":
        return _array(path, shape)
    form = getattr(options, "image", None)
    if path.suffix.lower() in SUFFIXES and isinstance(form, ImageForm):
        return form.read(path)[None]
    known = "an image file or a .npy file" if isinstance(form, ImageForm) else "a .npy file"
    raise InputError(
        f"INPUT: {path}: of the data set {options.name} only {known} can be read, with numbers "
        f"of shape {shape} as its examples have them"
    )


def _require_finite(rows: Tensor, before: str, after: str) -> None:
    """Check that all is finite that is read, or told, of each input.

    Raises:
        InputError: it is not, with the first input of which it is not.
    """
    finite = rows.flatten(1).isfinite().all(1)
    if not finite.all():
        raise InputError(f"INPUT: {before} input {int(finite.int().argmin()) + 1} {after}")


def _array(path: Path, shape: tuple[int, ...]) -> Tensor:
    try:
        found = np.load(path, allow_pickle=False)
        if not isinstance(found, np.ndarray):  # whatever the name says
            raise ValueError("it is an archive")
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise InputError(f"INPUT: {path}: cannot be read ({error})") from None
    if found.shape == shape:
        found = found[None]
    if found.shape[1:] != shape or found.dtype.kind not in "fiu":
        raise InputError(
            f"INPUT: {path} holds {found.dtype} {found.shape}; the model reads numbers of shape "
            f"{shape}, or several of them"
        )
    if not len(found):
        raise InputError(f"INPUT: {path} holds no input; write one, or several, of shape {shape}")
    with np.errstate(over="ignore"):  # told as what is not finite
        return torch.from_numpy(found.astype(np.float32))


def _transcript(prepared: Experiment, model: Any, path: Path) -> str:
    dataset, task = prepared.trainer.dataset, prepared.trainer.task
    assert isinstance(dataset, FederatedSpeech)
    assert isinstance(task, Recognition)
    rate = dataset.input_shape[0]
    wave = torch.from_numpy(read_audio(path, rate, dataset.speech.max_seconds))
    if not len(wave) or wave.min() == wave.max():  # no recording, in training either
        raise InputError(f"INPUT: {path}: is empty or silent; name a sound with speech in it")
    # Whatever one character is: a sound that has room for none is left out, as in training.
    sound = Utterances.pack([wave], [torch.ones(1, dtype=torch.int64)])
    features = task.prepare(model, sound).to(prepared.trainer.device)
    if len(features) == 0:
        raise InputError(f"INPUT: {path}: is too short for this model")
    log_probs, lengths = model(features.inputs, features.lengths)
    (characters,) = task.decode(log_probs.cpu(), lengths.cpu())
    return task.alphabet.decode(characters)


def _continued(prepared: Experiment, model: nn.Module, text: str, tokens: int) -> str:
    """Return a text with the likeliest token after it, and the likeliest after that, and so on."""
    known = getattr(getattr(prepared.trainer.dataset, "records", None), "tokens", None)
    if known is None:
        raise InputError(
            f"INPUT: the data set {prepared.config.data.name} does not say which text its tokens "
            "are of"
        )
    if not is_clean(text):
        raise InputError("INPUT: the text is not UTF-8; write it in UTF-8")
    found = [int(each) for each in known.encode(text)]
    if not found:
        raise InputError("INPUT: write some text")
    (block,), device = prepared.trainer.dataset.input_shape, prepared.trainer.device
    for _ in range(tokens):
        part = found[-block:]
        # Of a whole block: models may have learnt positions, and see nothing behind a token.
        padded = torch.tensor([part + [0] * (block - len(part))], device=device)
        found.append(int(outputs_of(model, padded)[0, len(part) - 1].argmax()))
    return str(known.decode(found))
