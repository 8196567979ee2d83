"""The files that a module's code imports, read from its text: those that no distribution brought.

Some are imported only when a function is called, when a run has its identity already.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from functools import lru_cache
from importlib.machinery import PathFinder
from pathlib import Path

_INSTALLED = {"site-packages", "dist-packages"}

#: What fedpriv can do without, by module: the extra that brings it.
EXTRAS = {
    "datasets": "hf",
    "flwr_datasets": "flwr-datasets",
    "mlflow": "mlflow",
    "onnx": "onnx",
    "onnxscript": "onnx",
    "peft": "peft",
    "pyarrow": "parquet",
    "tensorboard": "tensorboard",
    "timm": "timm",
    "tokenizers": "text",
    "torchvision": "torchvision",
    "transformers": "hf",
    "wandb": "wandb",
}


def command_for(module: str) -> str:
    """Return the command that installs a module; "" where no extra brings it."""
    extra = EXTRAS.get(module.partition(".")[0])
    return f"pip install 'fedpriv[{extra}]'" if extra else ""


def imported_files(files: Iterable[tuple[str, Path]], folder: Path | None) -> dict[str, Path]:
    """Return, by module, the files that `files` (name of the module, path) import, and they again.

    Modules are looked for in `folder` first, and then where Python would. Those of Python itself,
    of distributions and of fedpriv are left out.
    """
    waiting, found = list(files), dict[str, Path]()
    while waiting:
        module, path = waiting.pop()
        for name in sorted(_imports(module, path)):
            for each, file in _files_of(name, folder):
                if each not in found:
                    found[each] = file
                    waiting.append((each, file))
    return found


def _imports(module: str, path: Path) -> set[str]:
    """Return all that may be a module among what a file imports."""
    try:
        status = path.stat()
        return set(_read(module, path, status.st_mtime_ns, status.st_size))
    except OSError:
        return set()


@lru_cache(maxsize=256)
def _read(module: str, path: Path, changed: int, size: int) -> frozenset[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return frozenset()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            beside = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*beside, *(node.module or "").split(".")]) if node.level else ""
            base = base.strip(".") or node.module or ""
            found |= {base, *(f"{base}.{alias.name}".strip(".") for alias in node.names)}
    return frozenset(found)


def _files_of(name: str, folder: Path | None) -> Iterator[tuple[str, Path]]:
    """Yield the files that are run when a module is imported: packages' first, with their names."""
    parts = name.split(".")
    if parts[0] in sys.stdlib_module_names or parts[0] in ("fedpriv", "__main__", ""):
        return
    places = [] if folder is None else [str(folder)]
    where: list[str] | None = [*places, *sys.path]
    for number in range(1, len(parts) + 1):
        try:
            spec = PathFinder.find_spec(".".join(parts[:number]), where)
        except (ImportError, ValueError):
            return
        if spec is None:
            return
        if spec.origin is not None:
            file = Path(spec.origin)
            if _INSTALLED & set(file.parts) or file.suffix != ".py":
                return
            yield ".".join(parts[:number]), file
        where = list(spec.submodule_search_locations or ())
        if not where:
            return
