"""A run's model for others: a folder with its numbers, and a card that says what they cost."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
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
from fedpriv.imports import command_for
from fedpriv.models.lora import merged
from fedpriv.reporting.model_card import Exported, metadata_of, model_card
from fedpriv.reporting.reader import read_run
from fedpriv.reporting.registry import left_open, registry_entry
from fedpriv.reporting.strict_json import to_json
from fedpriv.tasks.base import outputs_of
from fedpriv.training.checkpoint import digest_of

_CPU = torch.device("cpu")


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
    if _library(model) == "transformers":
        # In one file, where its metadata are found.
        model.save_pretrained(folder, max_shard_size="1000GB")  # type: ignore[operator]
    else:
        from timm.models import save_for_hf

        save_for_hf(model, str(folder), safe_serialization=True)
    file = folder / "model.safetensors"
    save_file(load_file(file), file, dict(metadata))


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
