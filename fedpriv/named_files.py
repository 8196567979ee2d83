"""The files that options of components from outside name: what they hold is part of a run."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from fedpriv.components import Options, Slot
from fedpriv.origins import file_digest
from fedpriv.sections import NO_BEARING


def files_named(section: BaseModel, prefix: str = "") -> dict[str, str]:
    """Return the SHA-256 of each file that an option of a component from outside names, by key.

    Not those of data sets, which have a digest of their own that is private.
    """
    found: dict[str, str] = {}
    for name, about in type(section).model_fields.items():
        value = getattr(section, name)
        if NO_BEARING in about.metadata:
            continue
        mark = next((each for each in about.metadata if isinstance(each, Slot)), None)
        if mark is None and isinstance(value, BaseModel):
            found |= files_named(value, f"{prefix}{name}.")
        elif mark is not None and isinstance(value, Options) and not mark.kind.private:
            own = {each: getattr(value, each) for each in type(value).model_fields}
            for key, path in {**own, **(value.model_extra or {})}.items():
                if isinstance(path, Path) and path.is_file() and mark.kind.of(value).origin:
                    status = path.stat()
                    digest = file_digest(path, status.st_mtime_ns, status.st_size)
                    found[f"{prefix}{name}.{key}"] = digest
    return found
