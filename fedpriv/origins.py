"""Where code from outside came from: its distribution and version, or the digests of its files."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import pickle
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from fedpriv.errors import InputError

_MAIN = "__main__"


@dataclass(frozen=True)
class Origin:
    """What was imported for a component; another origin is another component.

    Attributes:
        distributions: name and version of each installed distribution.
        files: name and SHA-256 of each file, of modules that no distribution brought.
        source: SHA-256 of the object's own text, where no file has it, as in a notebook.
        folder: the folder beside a config that the files are in; None for any other.
    """

    distributions: tuple[tuple[str, str], ...] = ()
    files: tuple[tuple[str, str], ...] = ()
    source: str = ""
    folder: Path | None = None

    @property
    def version(self) -> str:
        """A text that changes with whatever was imported; where its files lie does not count."""
        return repr((self.distributions, self.files, self.source))

    def document(self) -> dict[str, Any]:
        """Return it for a file."""
        told: dict[str, Any] = {}
        if self.distributions:
            told["distributions"] = dict(self.distributions)
        if self.files:
            told["sha256"] = dict(self.files)
        if self.source:
            told["source_sha256"] = self.source
        return told

    def told(self) -> str:
        """Return it in words."""
        parts = [f"{name} {version}" for name, version in self.distributions]
        parts += [f"{name}, SHA-256 {digest}" for name, digest in self.files]
        parts += [f"handed over, SHA-256 {self.source}"] if self.source else []
        return "; ".join(parts) or "of no file"

    def changed(self, code: Path | None) -> bool:
        """Say whether files beside a config are gone, or others by now, or another config's."""
        if self.folder is None or code is None:
            return False
        now = ((name, self.folder / name) for name, _ in self.files)
        return code != self.folder or any(
            not path.is_file() or _sha256(path) != dict(self.files)[name] for name, path in now
        )


def module_beside(name: str, code: Path | None) -> ModuleType:
    """Import a module, which is looked for in the folder `code` first.

    A file there that has changed since it was imported, or that another config has under the same
    name, is imported anew.

    Raises:
        ModuleNotFoundError: there is none of this name.
        InputError: the folder has one, and another of its name is imported already.
    """
    top = name.split(".")[0]
    if any(each.changed(code) for each in _BESIDE.values()):
        for beside in _BESIDE:
            sys.modules.pop(beside, None)
        _BESIDE.clear()
    if code is None or not ((code / f"{top}.py").is_file() or (code / top).is_dir()):
        return importlib.import_module(name)
    loaded = sys.modules.get(top)
    if loaded is not None and top not in _BESIDE and not _lies_in(loaded, code):
        raise InputError(
            f"{top} in {code} has the name of a module that is imported already "
            f"({getattr(loaded, '__file__', None) or 'built in'}); give it another"
        )
    before = set(sys.modules)
    while str(code) in sys.path:
        sys.path.remove(str(code))
    sys.path.insert(0, str(code))
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    finally:
        for each in sorted(set(sys.modules) - before):
            module = sys.modules[each]
            if each.split(".")[0] not in before and _lies_in(module, code):
                files = tuple(_digests([module], code).items())
                _BESIDE[each] = Origin(files=files, folder=code)
        # Left there, but last: functions may import when they are called.
        sys.path.remove(str(code))
        sys.path.append(str(code))


#: Modules that were imported from beside a config, by name.
_BESIDE: dict[str, Origin] = {}


def modules_in(folder: Path) -> list[ModuleType]:
    """Return the modules that were imported from beside a config in `folder`."""
    there = (sys.modules.get(name) for name in sorted(_BESIDE))
    return [module for module in there if module is not None and _lies_in(module, folder)]


def origin_of(made: Callable[..., Any], name: str, code: Path | None) -> Origin:
    """Return where a component came from that `name` names; `code` is the folder of the config."""
    of = getattr(made, "__module__", None) or type(made).__module__
    tops = {name.partition(":")[0].split(".")[0], of.split(".")[0]} if ":" in name else {of}
    distributions: dict[str, str] = {}
    files: dict[str, str] = {}
    source, folder = "", None
    for top in sorted({each.split(".")[0] for each in tops}):
        main = sys.modules.get(top)
        if top == _MAIN and getattr(main, "__file__", None) is None:
            source = _source(made)
        elif top in _BESIDE and code is not None:
            folder = code
            files |= _digests(modules_in(code), code)
        elif (found := _distribution(main)) is not None:
            distributions[found.metadata["Name"]] = found.version
        elif main is not None:
            files |= _digests(_of(top), None)
    return Origin(tuple(distributions.items()), tuple(files.items()), source, folder)


def _of(top: str) -> list[ModuleType]:
    """Return the imported modules of a package, and the package."""
    return [
        module
        for name, module in sorted(sys.modules.items())
        if (name == top or name.startswith(f"{top}.")) and module is not None
    ]


def _digests(modules: Iterable[ModuleType], folder: Path | None) -> dict[str, str]:
    """Return the SHA-256 of each module's file, by its path in `folder`, or by module."""
    found = {}
    for module in modules:
        file = getattr(module, "__file__", None)
        if file is None or not Path(file).is_file():
            continue
        path = Path(file)
        inner = Path(*module.__name__.split(".")).parent / path.name
        name = path.resolve().relative_to(folder.resolve()) if folder else inner
        found[path.name if module.__name__ == _MAIN else name.as_posix()] = _sha256(path)
    return found


def _distribution(module: ModuleType | None) -> metadata.Distribution | None:
    """Return the installed distribution that brought a module; None where none did."""
    file = getattr(module, "__file__", None)
    if module is None or file is None:
        return None
    for name in metadata.packages_distributions().get(module.__name__, ()):
        found = metadata.distribution(name)
        if Path(file).resolve().is_relative_to(Path(str(found.locate_file(""))).resolve()):
            recorded = {str(each) for each in found.files or ()}
            inner = Path(file).resolve().relative_to(Path(str(found.locate_file(""))).resolve())
            if inner.as_posix() in recorded:
                return found
    return None


def _source(made: Callable[..., Any]) -> str:
    """Return the SHA-256 of an object's text, or of its code where the text is not kept."""
    try:
        text = inspect.getsource(made).encode()
    except (OSError, TypeError):
        code = getattr(made, "__code__", None)
        text = repr((code.co_code, code.co_consts, code.co_names) if code else made).encode()
    return hashlib.sha256(text).hexdigest()


def digest_of(made: object) -> str:
    """Return the SHA-256 of an object as Python would store it, or "" where it cannot be."""
    try:
        return hashlib.sha256(pickle.dumps(made)).hexdigest()
    except Exception:  # whatever its own code raises
        return ""


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _lies_in(module: ModuleType, folder: Path) -> bool:
    file = getattr(module, "__file__", None)
    places = [Path(place) for place in ([file] if file else getattr(module, "__path__", ()))]
    # A virtual environment may lie there, whose packages are installed like any others.
    installed = any({"site-packages", "dist-packages"} & set(place.parts) for place in places)
    inside = any(place.resolve().is_relative_to(folder.resolve()) for place in places)
    return inside and not installed
