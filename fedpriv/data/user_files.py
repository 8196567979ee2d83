"""Users as files: one folder for everybody, or one for each node, with a file a user.

    facts.json                what is public of them: classes, shape of an input, description
    held_out.safetensors      for a simulation: the examples that no user holds, likewise
    users/<id>.safetensors    `inputs` float32 [n, *input_shape] and `targets` int64 [n]

The id is percent-encoded in the name. A node needs no held-out examples, and a server nothing of
this but them: it has the file of `evaluation.held_out`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, unquote

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fedpriv.data.content import Content, Files
from fedpriv.data.facts import DataFacts
from fedpriv.data.federated import Examples, FederatedDataset
from fedpriv.data.files import failure, is_hidden, unreachable
from fedpriv.data.options import DataOptions
from fedpriv.data.parts import named_path, require_folder
from fedpriv.errors import InputError
from fedpriv.sections import NO_BEARING, KeptPath

FACTS, HELD_OUT, USERS, SUFFIX = "facts.json", "held_out.safetensors", "users", ".safetensors"
# What a file system lets a name have.
_LONGEST_NAME = 255
# What data.path should be.
_WHOLE = f"the folder that has {FACTS} and {USERS}/, as fedpriv deploy prepare writes it"


class UserFilesOptions(DataOptions):
    """Where the users' files are."""

    path: Annotated[KeptPath | None, NO_BEARING] = Field(
        default=None, description="folder with facts.json, users/ and held_out.safetensors"
    )


class _Public(BaseModel):
    """What `facts.json` says; `facts` as in `DataFacts`."""

    model_config = ConfigDict(extra="forbid")

    classes: Annotated[int, Field(ge=1)]
    input_shape: tuple[Annotated[int, Field(ge=1)], ...]
    description: str
    facts: dict[str, str] = {}


@dataclass(frozen=True, eq=False)
class UserFiles:
    """The users of a folder, each read when it is trained: see `FederatedDataset`."""

    path: Path
    user_ids: Sequence[str]
    classes: int
    input_shape: tuple[int, ...]
    description: str
    facts: DataFacts
    sizes: str = ""

    @property
    def population(self) -> int:
        """Number of users N."""
        return len(self.user_ids)

    def user(self, index: int) -> Examples:
        """Read one user's examples: see `FederatedDataset.user`."""
        if not 0 <= index < self.population:
            raise IndexError(f"user index {index} is outside 0..{self.population - 1}")
        examples = self._read(_file_of(self.path, self.user_ids[index]))
        if not len(examples):
            raise InputError(f"empty user: {self.user_ids[index]} has no examples")
        return examples

    def evaluation(self) -> Iterator[Examples]:
        """Read the held-out examples, where they are: see `FederatedDataset.evaluation`."""
        if (self.path / HELD_OUT).exists():
            yield self._read(self.path / HELD_OUT)

    def digest(self) -> str:
        """Return the SHA-256 of the users' ids and of their files."""
        content = Content(f"user files {self.classes} {self.input_shape}")
        paths = [_file_of(self.path, user_id) for user_id in self.user_ids]
        with Files(len(paths)) as files:
            for user_id, digest in zip(self.user_ids, files.digests(paths), strict=True):
                content.add_user(user_id, 0)
                content.add(digest)
        return content.hexdigest()

    def _read(self, file: Path) -> Examples:
        """Return the examples of a file; those with impossible targets are left out and counted.

        Raises:
            InputError: it is not what the module's text says.
        """
        try:
            found = load_file(file)
        except OSError as error:
            raise failure(file, error) from None
        except (SafetensorError, ValueError, KeyError) as error:
            raise InputError(f"{file}: cannot be read ({' '.join(str(error).split())})") from None
        inputs, targets = found.get("inputs"), found.get("targets")
        if inputs is None or targets is None or targets.dtype != torch.int64:
            raise InputError(f"{file}: wants tensors inputs (float32) and targets (int64)")
        shape = (len(targets), *self.input_shape)
        if targets.dim() != 1 or inputs.shape != shape or inputs.dtype != torch.float32:
            raise InputError(
                f"{file}: inputs are {inputs.dtype} {tuple(inputs.shape)}, and with "
                f"{targets.numel()} targets must be torch.float32 {shape}"
            )
        known = (targets >= 0) & (targets < self.classes)
        known &= inputs.flatten(1).isfinite().all(1)
        return Examples(inputs[known], targets[known], int((~known).sum()))


def build_user_files(options: UserFilesOptions, seed: int) -> UserFiles:
    """Find the users of `options.path`; nothing of theirs is read yet.

    Raises:
        InputError: there is no such folder, or its facts.json is none.
    """
    path = named_path(options.path, _WHOLE)
    require_folder(path, _WHOLE)
    public, users = _public(path / FACTS), path / USERS
    try:
        names = sorted(file.name for file in users.iterdir()) if users.is_dir() else []
    except OSError as error:
        raise unreachable(str(users), error) from None
    found = [name for name in names if name.endswith(SUFFIX) and not is_hidden(name)]
    return UserFiles(
        path=path,
        user_ids=tuple(unquote(name.removesuffix(SUFFIX)) for name in found),
        classes=public.classes,
        input_shape=public.input_shape,
        description=public.description,
        facts=DataFacts.of(public.facts, str(path / FACTS)),
    )


def _public(file: Path) -> _Public:
    try:
        return _Public.model_validate_json(file.read_bytes())
    except FileNotFoundError as error:
        raise InputError(
            f"data.path: {file} cannot be read ({error.strerror}); fedpriv deploy prepare writes it"
        ) from None
    except OSError as error:
        raise unreachable(file, error) from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "it"
        raise InputError(f"{file}: {key}: {first['msg']}") from None


def _file_of(folder: Path, user_id: str) -> Path:
    name = quote(user_id, safe=" ")
    if is_hidden(name):
        name = f"%{ord(name[0]):02X}{name[1:]}"
    return folder / USERS / f"{name}{SUFFIX}"


def write_users(dataset: FederatedDataset, users: Iterable[int], folder: Path) -> None:
    """Write a folder with a file for each of the `users`; who has no example gets none.

    Raises:
        InputError: an example is no tensor of one shape with a class, or an id is too long for a
            file's name.
    """
    (folder / USERS).mkdir(parents=True)
    document: dict[str, Any] = {
        "classes": dataset.classes,
        "input_shape": list(dataset.input_shape),
        "description": dataset.description,
        "facts": dataset.facts.document(),
    }
    (folder / FACTS).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    for user in users:
        file = _file_of(folder, dataset.user_ids[user])
        if len(file.name) > _LONGEST_NAME:
            raise InputError(f"{file.name:.40}...: the user's id is too long for a file's name")
        examples = _of_one_shape(dataset.user(user))
        tensors = {"inputs": examples.inputs, "targets": examples.targets}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


def _of_one_shape(batch: Any) -> Examples:
    if not isinstance(batch, Examples):
        raise InputError(
            "data: users' files hold examples of one shape, and these are "
            f"{type(batch).__name__}; give each node a folder of this data set with its own users"
        )
    return batch
