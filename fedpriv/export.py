"""A run's model for others: a folder with its numbers, and a card that says what they cost."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor, nn

from fedpriv.data.federated import Batch, Examples
from fedpriv.data.utterances import Utterances
from fedpriv.disk import has_no_room
from fedpriv.errors import InputError
from fedpriv.experiment import Experiment, Which, reopen_model
from fedpriv.failures import failure_of
from fedpriv.imports import command_for
from fedpriv.models.lora import merged
from fedpriv.models.options import ModelOptions
from fedpriv.models.registry import MODELS
from fedpriv.reporting.model_card import Exported, metadata_of, model_card
from fedpriv.reporting.reader import read_run
from fedpriv.reporting.registry import left_open, registry_entry
from fedpriv.reporting.strict_json import to_json
from fedpriv.tasks.base import outputs_of
from fedpriv.training.checkpoint import digest_of

_CPU = torch.device("cpu")

#: By how much outputs of equal models may differ, as a part of the largest.
_ROUNDING = 1e-5


def export(path: Path, to: str, out: Path | None = None, which: Which | None = None) -> Path:
    """Write a model of the run at `path` as `to`, one of `FORMATS`, and return the folder.

    As `registry` it is no model, but an entry for the DP Deployments Registry.

    `out` is the new folder, None for one in the run's; `which` model as for `reopen_model`.
    Adapters are merged. Nothing is overwritten, and what cannot be finished leaves nothing.

    Raises:
        InputError: there is no such format or no checkpoint, something is at `out`, or the model
            does not go into the format.
    """
    if to not in (*FORMATS, "registry"):
        raise InputError(f"--to: write {', '.join(FORMATS)} or registry, not {to}")
    folder = path / f"export-{to}" if out is None else out
    if folder.exists() or folder.is_symlink():
        raise InputError(f"--out: there is {folder} already; name a folder that is not there")
    run = read_run(path)
    if to == "registry":
        _in_new(folder, partial(_as_entry, registry_entry(run)))
        return folder
    prepared = reopen_model(path, which)
    model = merged(prepared.server.model).cpu().eval().requires_grad_(False)
    exported = Exported(
        run=run,
        round=prepared.finished_rounds,
        task=type(prepared.trainer.task).__name__,
        library=_library(model) if to == "hf" else "fedpriv",
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        trained=prepared.plan.layout.total,
        sha256=digest_of(_tensors(model)),
    )

    def write(scratch: Path) -> None:
        FORMATS[to](model, prepared, metadata_of(exported), scratch)
        (scratch / "README.md").write_text(model_card(exported), encoding="utf-8")

    _in_new(folder, write)
    return folder


def _in_new(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a new folder, which is there whole or not at all.

    Raises:
        InputError: it cannot be written.
    """
    scratch = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        write(scratch)
        scratch.rename(folder)
    except (OSError, SafetensorError) as error:
        if has_no_room(error):
            raise
        said = getattr(error, "strerror", None) or error
        raise InputError(f"--out: cannot write {folder} ({said})") from None
    finally:
        with suppress(OSError):
            shutil.rmtree(scratch)


def _as_entry(entry: dict[str, Any], folder: Path) -> None:
    (folder / "entry.json").write_text(to_json(entry), encoding="utf-8")
    fields = "\n".join(f"- `{field}`" for field in left_open(entry))
    (folder / "README.md").write_text(
        "# An entry for the Differential Privacy Deployments Registry\n\n"
        "`entry.json` says what the run's ledger proves. Whoever signs it has to fill in these "
        "fields, which are null, and to read all others; YAML, in which the registry keeps "
        f"entries, contains JSON.\n\n{fields}\n",
        encoding="utf-8",
    )


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}


def _as_safetensors(
    model: nn.Module, prepared: Experiment, metadata: Mapping[str, str], folder: Path
) -> None:
    # Of weights that are tied one name is kept, and the file says which are the others.
    save_model(model, str(folder / "model.safetensors"), dict(metadata))


def _as_torch(
    model: nn.Module, prepared: Experiment, metadata: Mapping[str, str], folder: Path
) -> None:
    document = {"state_dict": dict(model.state_dict()), "metadata": dict(metadata)}
    torch.save(document, folder / "model.pt")


class _Outputs(nn.Module):
    """A model that returns a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the model's outputs, or the logits of what it returns."""
        return outputs_of(self.model, inputs)


def _program(model: nn.Module, prepared: Experiment, rows: Batch) -> Any:
    """Return the model as a program that reads any number of rows, and any length of sounds.

    Of speech that is a waveform, and how many samples of each are real, whatever is read in
    training: features are part of the program.
    """
    free, named = torch.export.Dim.DYNAMIC, dict[str, Any]()
    if isinstance(rows, Utterances):
        second = int(prepared.trainer.dataset.input_shape[0])
        sounds = torch.randn(2, second, generator=torch.Generator().manual_seed(0))
        inputs: tuple[Tensor, ...] = (sounds, torch.tensor([second, second // 2]))
        named = {"input_names": ["inputs", "lengths"], "output_names": ["outputs", "tokens"]}
        shapes: tuple[dict[int, Any], ...] = ({0: free, 1: free}, {0: free})
    elif isinstance(rows, Examples):
        model, inputs, shapes = _Outputs(model).eval(), (rows.inputs,), ({0: free},)
        named = {"input_names": ["inputs"], "output_names": ["outputs"]}
    else:
        raise InputError(
            "--to: onnx is for models that read one tensor, or sounds; write safetensors"
        )
    return torch.onnx.export(
        model, inputs, **named, dynamic_shapes=shapes, dynamo=True, verbose=False
    )


def _as_onnx(
    model: nn.Module, prepared: Experiment, metadata: Mapping[str, str], folder: Path
) -> None:
    if missing := [name for name in ("onnx", "onnxscript") if find_spec(name) is None]:
        raise InputError(f"--to: onnx needs {' and '.join(missing)}: {command_for(missing[0])}")
    examples = next(part for part in prepared.held_out if len(part))
    rows = torch.arange(2) % len(examples)
    try:
        program = _program(model, prepared, examples.take(rows).to(_CPU))
    except InputError:
        raise
    except Exception as error:  # whatever its own code, or torch's exporter, raises
        said = " ".join(str(error).split())[:200]
        raise InputError(f"--to: this model cannot be written as onnx: {said}") from error
    program.model.metadata_props.update(metadata)
    program.save(str(folder / "model.onnx"))


def _as_hf(
    model: nn.Module, prepared: Experiment, metadata: Mapping[str, str], folder: Path
) -> None:
    if prepared.config.model.convert is not None:
        raise InputError(
            "--to: hf builds the model anew as its library does, without model.convert; write "
            "safetensors"
        )
    library = _library(model)
    try:
        with _silent(library):
            if library == "transformers":
                # In one file, where its metadata are found.
                model.save_pretrained(folder, max_shard_size="1000GB")  # type: ignore[operator]
            else:
                from timm.models import save_for_hf

                given = _options_of_timm(prepared.config.model)
                save_for_hf(model, str(folder), model_args=given, safe_serialization=True)
            same = _computes_as(model, _read_again(model, library, folder), prepared)
    except OSError:
        raise
    except Exception as error:  # whatever the library, or code of the model's own, raises
        raise InputError(
            f"--to: {library} cannot write this model as hf and read it again "
            f"({failure_of(error)[:200]}); write safetensors"
        ) from error
    if not same:
        raise InputError(
            f"--to: what {library} reads of this model as hf computes something else, since the "
            f"format does not hold all that {prepared.config.model.name} makes of it; write "
            "safetensors"
        )
    file = folder / "model.safetensors"
    save_file(load_file(file), file, dict(metadata))


@contextmanager
def _silent(library: str) -> Iterator[None]:
    """Keep a library's bars and warnings to itself: what matters is said in a line of ours."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        if library == "timm":
            yield
            return
        from transformers.utils import logging as bars

        shown = bars.is_progress_bar_enabled()
        bars.disable_progress_bar()
        try:
            yield
        finally:
            if shown:
                bars.enable_progress_bar()
    finally:
        logging.disable(before)


def _options_of_timm(options: ModelOptions) -> dict[str, Any]:
    """Return what a function of timm was called with: only `timm.create_model` takes note of it."""
    own = getattr(MODELS.of(options).make, "__module__", "").startswith("timm.")
    return dict(options.model_extra or {}) if own else {}


def _read_again(model: nn.Module, library: str, folder: Path) -> nn.Module:
    """Return the model that whoever has the folder, and the library alone, reads of it."""
    if library == "timm":
        import timm

        return timm.create_model(f"local-dir:{folder.absolute()}", pretrained=True).eval()
    # A class derived from one of the library's is known to its author alone.
    known = next(kind for kind in type(model).__mro__ if kind.__module__.startswith("transformers"))
    read: nn.Module = known.from_pretrained(folder).eval()  # type: ignore[attr-defined]
    return read


def _computes_as(model: nn.Module, read: nn.Module, prepared: Experiment) -> bool:
    """Say whether two models give the same for some held-out examples."""
    examples = next(part for part in prepared.held_out if len(part))
    few = examples.take(torch.arange(min(8, len(examples)))).to(_CPU)
    with torch.no_grad():
        if isinstance(few, Examples):
            told, wanted = (outputs_of(each, few.inputs) for each in (read, model))
        else:
            task = prepared.trainer.task
            told, wanted = (task.losses(each, few) for each in (read, model))
    # The two may round differently, as where their attention is not of one kind.
    room = _ROUNDING * float(wanted.abs().max())
    return told.shape == wanted.shape and torch.allclose(told, wanted, rtol=0, atol=room)


def _library(model: nn.Module) -> str:
    """Return which of Hugging Face's libraries reads a model's folder.

    Raises:
        InputError: none does.
    """
    for kind in type(model).__mro__:
        if kind.__module__ == "transformers.modeling_utils":
            return "transformers"
    if type(model).__module__.startswith("timm.") and getattr(model, "pretrained_cfg", None):
        return "timm"
    raise InputError(
        f"--to: hf is for models of transformers and timm, and this is a {type(model).__name__}; "
        "write safetensors"
    )


#: How a model is written into a folder, by the name of the format.
FORMATS: dict[str, Callable[[nn.Module, Experiment, Mapping[str, str], Path], None]] = {
    "safetensors": _as_safetensors,
    "torch": _as_torch,
    "onnx": _as_onnx,
    "hf": _as_hf,
}
