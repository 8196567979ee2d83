"""Where code from outside came from: its distribution and version, or the digests of its files."""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from fedpriv.errors import InputError
from fedpriv.imports import imported_files
from fedpriv.told_apart import digest_of

_MAIN = "__main__"


@dataclass(frozen=True)
class Origin:
    """What was imported for a component; another origin is another component.

    Attributes:
        distributions: name and version of each installed distribution.
        files: name and SHA-256 of each file, of modules that no distribution brought.
        imports: the same of files elsewhere that these import, or will when they are called.
        source: SHA-256 of the object's own text, where no file has it, as in a notebook.
        folder: the folder beside a config that the files are in; None for any other.
    """

    distributions: tuple[tuple[str, str], ...] = ()
    files: tuple[tuple[str, str], ...] = ()
    source: str = ""
    folder: Path | None = None
    imports: tuple[tuple[str, str], ...] = ()

    @property
    def version(self) -> str:
        """A text that changes with whatever was imported; where its files lie does not count."""
        return repr((self.distributions, self.files, self.imports, self.source))

    def document(self) -> dict[str, Any]:
        """Return it for a file."""
        told: dict[str, Any] = {}
        if self.distributions:
            told["distributions"] = dict(self.distributions)
        if self.files or self.imports:
            told["sha256"] = dict((*self.files, *self.imports))
        if self.source:
            told["source_sha256"] = self.source
        return told

    def told(self) -> str:
        """Return it in words."""
        parts = [f"{name} {version}" for name, version in self.distributions]
        parts += [f"{name}, SHA-256 {digest}" for name, digest in (*self.files, *self.imports)]
        parts += [f"handed over, SHA-256 {self.source}"] if self.source else []
        return "; ".join(parts) or "of no file"

    def unlike_here(self, by_value: str) -> str | None:
        """Return what this process would import in another version; None where all is the same.

        What lay beside a config, and the script called `by_value`, travels as it was in memory.
        """
        for name, version in self.distributions:
            with suppress(metadata.PackageNotFoundError):  # importing it will tell
                if (here := metadata.version(name)) != version:
                    return f"{name} {here}"
        for name, digest in (*(() if self.folder else self.files), *self.imports):
            places = (Path(place) / name for place in sys.path if name != by_value)
            found = next((place for place in places if place.is_file()), None)
            if found is not None and _sha256(found) != digest:
                return f"another {found}"
        return None

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
        for beside in {*_BESIDE, *_imported_later()}:
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
    _BEFORE.setdefault(code, before)
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
                files = {**_digests([module], code), **_imported([module], code)[0]}
                _BESIDE[each] = Origin(files=tuple(files.items()), folder=code)
        # Left there, but last: functions may import when they are called.
        sys.path.remove(str(code))
        sys.path.append(str(code))


#: Modules that were imported from beside a config, by name.
_BESIDE: dict[str, Origin] = {}
#: By folder, what was imported already when the first was imported from there.
_BEFORE: dict[Path, set[str]] = {}


def _imported_later() -> list[str]:
    """Return the modules from beside a config that its functions imported when they were called."""
    folders = {each.folder for each in _BESIDE.values() if each.folder is not None}
    return [
        name
        for name, module in list(sys.modules.items())
        if module is not None
        and any(name not in _BEFORE.get(each, ()) and _lies_in(module, each) for each in folders)
    ]


def modules_in(folder: Path) -> list[ModuleType]:
    """Return the modules that were imported from beside a config in `folder`."""
    there = (sys.modules.get(name) for name in sorted(_BESIDE))
    return [module for module in there if module is not None and _lies_in(module, folder)]


def origin_of(
    made: Callable[..., Any], name: str, code: Path | None, private: bool = False
) -> Origin:
    """Return where a component came from that `name` names; `code` is the folder of the config.

    `private`: the values that it has are private data, and are not looked at.
    """
    of = getattr(made, "__module__", None) or type(made).__module__
    told = {name.partition(":")[0], of} if ":" in name else {of}
    source, modules = "", frozenset[str]()
    if not isinstance(made, type) or of == _MAIN:
        digest, modules = digest_of(made, private)
        plain = modules <= {of} and _named(of, getattr(made, "__qualname__", "")) is made
        source = "" if plain else digest
    return _origin(told | modules, code, source)


def origin_of_object(made: object, private: bool) -> Origin:
    """Return where an object that is made already came from, with what tells it from others."""
    digest, modules = digest_of(type(made), True) if private else digest_of(made)
    return _origin({type(made).__module__, *modules}, None, digest)


def _origin(told: Iterable[str], code: Path | None, source: str) -> Origin:
    """Return the origin of what takes code from the modules `told`."""
    distributions: dict[str, str] = {}
    files: dict[str, str] = {}
    imports: dict[str, str] = {}
    folder = None
    for top in sorted({each.split(".")[0] for each in told}):
        main = sys.modules.get(top)
        if top in sys.stdlib_module_names or main is None:
            continue
        if top in _BESIDE and code is not None:
            folder, modules = code, modules_in(code)
            files |= _digests(modules, code)
        elif top != _MAIN and (found := _distribution(main)) is not None:
            distributions[found.metadata["Name"]] = found.version
            continue
        else:
            modules = _of(top)
            files |= _digests(modules, None)
        within, elsewhere = _imported(modules, folder)
        files, imports = {**within, **files}, {**imports, **elsewhere}
    imports = {each: digest for each, digest in imports.items() if each not in files}
    return Origin(
        tuple(distributions.items()),
        tuple(sorted(files.items())),
        source,
        folder,
        tuple(sorted(imports.items())),
    )


def _imported(
    modules: Iterable[ModuleType], folder: Path | None
) -> tuple[dict[str, str], dict[str, str]]:
    """Return name and SHA-256 of the files that modules import: within `folder`, and elsewhere."""
    files = [(each.__name__, Path(getattr(each, "__file__", None) or "")) for each in modules]
    own = [(name, path) for name, path in files if path.is_file()]
    within, elsewhere = dict[str, str](), dict[str, str]()
    for name, path in imported_files(own, folder).items():
        if folder and path.resolve().is_relative_to(folder.resolve()):
            within[path.resolve().relative_to(folder.resolve()).as_posix()] = _sha256(path)
        else:
            inner = Path(*name.split("."))
            whole = inner / path.name if path.name == "__init__.py" else inner.with_suffix(".py")
            elsewhere[whole.as_posix()] = _sha256(path)
    return within, elsewhere


def _named(module: str, path: str) -> Any:
    """Return what a module has at a dotted path; None for nothing."""
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    return found if getattr(sys.modules.get(module), "__file__", None) else None


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
        inner = Path(*module.__name__.split("."))
        inner = (inner if path.name == "__init__.py" else inner.parent) / path.name
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


@lru_cache(maxsize=64)
def file_digest(path: Path, changed: int, size: int) -> str:
    """Return the SHA-256 of a file that may be large, taken again when time or size differ."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _lies_in(module: ModuleType, folder: Path) -> bool:
    file = getattr(module, "__file__", None)
    places = [Path(place) for place in ([file] if file else getattr(module, "__path__", ()))]
    # A virtual environment may lie there, whose packages are installed like any others.
    installed = any({"site-packages", "dist-packages"} & set(place.parts) for place in places)
    inside = any(place.resolve().is_relative_to(folder.resolve()) for place in places)
    return inside and not installed
