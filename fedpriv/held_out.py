"""What a deployment's server needs of a data set, in a file: all but the users.

That is the held-out examples, the shape of an input, and what is learnt: all of it is public. With
`evaluation.held_out` the server reads this file alone, and no folder of users.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedpriv.data.content import Content
from fedpriv.data.facts import DataFacts
from fedpriv.data.federated import Batch, Examples, FederatedDataset
from fedpriv.data.text import Alphabet
from fedpriv.data.utterances import Utterances
from fedpriv.disk import has_no_room
from fedpriv.errors import InputError
from fedpriv.training.checkpoint import write_tensors

_FORMAT = "fedpriv held-out examples, 1"
_BATCHES: Mapping[str, type[Any]] = {"examples": Examples, "utterances": Utterances}


@dataclass(frozen=True)
class HeldOutFile:
    """A data set without users: see `FederatedDataset`.

    Attributes:
        path: the file.
        name: of the data set that it was written from.
        batch: what kind of batches its parts are.
        parts: of how many examples each is skipped, for each part.
        classes: number of classes.
        input_shape: shape of one input.
        task: the task that the data set is for.
        characters: what speech is written with; "" where it is no speech.
        facts: whose the held-out examples are.
    """

    path: Path
    name: str
    batch: str
    parts: tuple[int, ...]
    classes: int
    input_shape: tuple[int, ...]
    task: str
    characters: str
    facts: DataFacts
    population: ClassVar[int] = 0
    user_ids: ClassVar[tuple[str, ...]] = ()
    sizes: ClassVar[str] = ""

    @property
    def description(self) -> str:
        """One line: whose held-out examples they are."""
        return f"held-out examples of {self.name}, from a file; no users"

    @property
    def alphabet(self) -> Alphabet:
        """What speech is written with."""
        return Alphabet(self.characters)

    def user(self, index: int) -> NoReturn:
        """Raise IndexError: there is nobody."""
        raise IndexError(f"user index {index} of a data set without users")

    def evaluation(self) -> Iterator[Batch]:
        """Read the held-out examples, part by part: see `FederatedDataset`."""
        kind = _BATCHES[self.batch]
        with _opened(self.path) as file:
            for number, skipped in enumerate(self.parts):
                tensors = {name: file.get_tensor(f"{number}.{name}") for name in _tensors(kind)}
                yield kind(**tensors, skipped=skipped)

    def digest(self) -> str:
        """Return the SHA-256 of no users."""
        return Content("no users").hexdigest()


def write_held_out(dataset: FederatedDataset, name: str, path: Path) -> None:
    """Write the file of a data set that a config calls `name`; no user is built for it.

    Raises:
        InputError: it has held-out examples of a kind that no file holds, or cannot be written.
    """
    parts = list(dataset.evaluation())
    kinds = {key for key, kind in _BATCHES.items() if all(type(part) is kind for part in parts)}
    if not parts or len(kinds) != 1:
        raise InputError(
            f"data.name: the held-out examples of {name} are neither Examples nor Utterances, "
            "which are what a file of them holds"
        )
    (kind,) = kinds
    alphabet: Alphabet | None = getattr(dataset, "alphabet", None)
    about = {
        "name": name,
        "batch": kind,
        "parts": [part.skipped for part in parts],
        "classes": dataset.classes,
        "input_shape": list(dataset.input_shape),
        "task": getattr(dataset, "task", "classification"),
        "characters": alphabet.characters if alphabet else "",
        "held_out": dataset.facts.held_out,
    }
    tensors: dict[str, Tensor] = {
        f"{number}.{field}": getattr(part, field).cpu().contiguous().clone()
        for number, part in enumerate(parts)
        for field in _tensors(_BATCHES[kind])
    }
    try:
        write_tensors(path, tensors, {"format": _FORMAT, "about": json.dumps(about)})
    except (SafetensorError, OSError) as error:
        if has_no_room(error):
            raise
        raise InputError(f"{path}: cannot be written ({error})") from None


def is_held_out(path: Path) -> bool:
    """Say whether a file is one that `write_held_out` has written."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("format") == _FORMAT
    except (SafetensorError, OSError):
        return False


def read_held_out(path: Path, name: str) -> HeldOutFile:
    """Return the data set without users in a file, which a config calls `name`.

    Raises:
        InputError: it cannot be read, or is of another data set.
    """
    with _opened(path) as file:
        said = file.metadata() or {}
    if said.get("format") != _FORMAT:
        raise _unfit(path, "it holds something else")
    about = json.loads(said["about"])
    if about["name"] != name:
        raise _unfit(path, f"it is of data.name: {about['name']}, and the config's is {name}")
    facts = DataFacts.of({"held_out": about.pop("held_out")}, str(path))
    shape, parts = tuple(about.pop("input_shape")), tuple(about.pop("parts"))
    return HeldOutFile(path, parts=parts, input_shape=shape, facts=facts, **about)


def _tensors(kind: type[Any]) -> list[str]:
    return [field.name for field in fields(kind) if field.name != "skipped"]


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise _unfit(path, f"it cannot be read ({error})") from None


def _unfit(path: Path, why: str) -> InputError:
    return InputError(
        f"evaluation.held_out: {path}: {why}; write one with: fedpriv config held-out CONFIG FILE"
    )
