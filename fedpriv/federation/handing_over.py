"""How a user's own code reaches the processes that train.

What is installed, or on PYTHONPATH, is imported there. What lies beside a config, in a script or in
a notebook travels as it is in memory, so that neither a folder nor a file need be shared.
"""

from __future__ import annotations

import importlib
import io
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from ray import cloudpickle

from fedpriv.components import KINDS, outside
from fedpriv.config import ExperimentConfig
from fedpriv.errors import InputError
from fedpriv.origins import modules_in


@dataclass(frozen=True)
class HandOver:
    """What another process needs for a config's components from outside.

    Attributes:
        paths: where modules are imported from here.
        pickled: the components, which are unpickled when those paths are known.
        script: the name of the script that is running here, which is part of `pickled`.
    """

    paths: tuple[str, ...]
    pickled: bytes
    script: str = ""

    @classmethod
    def of(cls, config: ExperimentConfig) -> HandOver:
        """Return what the components of `config` need; nothing where all are fedpriv's own.

        Raises:
            InputError: one of them cannot be sent.
        """
        found = list(outside(config).values())
        if not found:
            return cls((), b"")
        given = [(each.kind.key, each.name, each.make, each.origin) for each in found]
        folders = {each.origin.folder for each in found if each.origin and each.origin.folder}
        modules = [module for folder in sorted(folders) for module in modules_in(folder)]
        for module in modules:
            cloudpickle.register_pickle_by_value(module)
        try:
            pickled = _pickled(given)
        finally:
            for module in modules:
                cloudpickle.unregister_pickle_by_value(module)
        script = Path(getattr(sys.modules["__main__"], "__file__", None) or "").name
        return cls(tuple(path for path in sys.path if path), pickled, script)

    def accept(self) -> None:
        """Make the components known in this process, whatever its node may import by itself.

        Raises:
            InputError: what is imported here is other code than what the run began with: a file
                was edited since, or this machine has another one.
        """
        sys.path += [path for path in self.paths if path not in sys.path]
        if not self.pickled:
            return
        for key, name, make, origin in cloudpickle.loads(self.pickled):
            if (other := origin.unlike_here(self.script)) is not None:
                raise InputError(
                    f"{key}: {name}: {platform.node()} has {other}, which is not what the run "
                    "began with; a run continues only with the code that it began with"
                )
            # The files may be others by now, or not be there: what runs is what was handed over.
            KINDS[key].take(name, make, replace(origin, folder=None))


class _Pickler(cloudpickle.CloudPickler):
    """Sends what is imported by its name, whatever kind of object it is.

    A function that has an attribute `classes` in it, and `torch` beside it, takes torch.classes
    along, which cannot be pickled as the module that it is not.
    """

    def reducer_override(self, obj: Any) -> Any:
        """Return how an object is made there."""
        if isinstance(obj, ModuleType) and type(obj) is not ModuleType:
            name = obj.__name__
            if sys.modules.get(name) is obj:
                return importlib.import_module, (name,)
        return super().reducer_override(obj)


def _pickled(given: Sequence[tuple[str, str, Any, Any]]) -> bytes:
    """Return components by key and name as bytes.

    Raises:
        InputError: one of them cannot be sent.
    """
    for key, name, *rest in given:
        try:
            _Pickler(io.BytesIO()).dump(rest)
        except Exception as error:  # whatever its own code raises
            why = " ".join(str(error).split())
            raise InputError(
                f"{key}: {name} cannot be sent to other processes ({why}); hand over the function "
                "or class that makes it, or write runtime.grid: local"
            ) from error
    buffer = io.BytesIO()
    _Pickler(buffer).dump(given)  # together, for what they share
    return buffer.getvalue()


@dataclass(frozen=True)
class Accepting:
    """Makes a node of a process that first accepts what it is handed; it travels by pickle."""

    handed: HandOver
    node: Callable[[int, int], Any]

    def __call__(self, partition: int, partitions: int) -> Any:
        """Return the node of a partition out of so many."""
        self.handed.accept()
        return self.node(partition, partitions)
