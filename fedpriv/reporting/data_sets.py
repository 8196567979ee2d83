"""Data sets for people: which are known, with their options, and what is in one."""

from __future__ import annotations

import inspect
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel
from rich.table import Table
from rich.text import Text

from fedpriv.components import Kind
from fedpriv.counting import in_words, numbered
from fedpriv.data.describe import Description
from fedpriv.errors import InputError
from fedpriv.reporting.own_files import picture_mark, require_replaceable
from fedpriv.reporting.run_directory import write_whole

PRIVATE = "PRIVATE: functions of users' data, which no mechanism released; do not publish them"
_BARS = 8
_WIDTH = 40
# Users whose classes are drawn.
_DRAWN = 60


def known(kind: Kind) -> list[dict[str, Any]]:
    """Return the data sets that are known by name, each with one line and its options."""
    return [_known(kind, name) for name in kind.names()]


def _known(kind: Kind, name: str) -> dict[str, Any]:
    component = kind.find(name)
    text = " ".join((inspect.getdoc(component.make) or "").split("\n\n")[0].split())
    options = {
        key: {"default": default, "description": description}
        for key, default, description in _options(component.options)
    }
    return {"name": name, "does": text, "options": options}


def _options(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Yield each option's key, default and description; those of sections by dotted keys."""
    for key, about in section.model_fields.items():
        if key == "name":
            continue
        default = about.get_default(call_default_factory=True)
        if isinstance(default, BaseModel):
            yield from _options(type(default), f"{prefix}{key}.")
        else:
            plain = default if isinstance(default, int | float | str | None) else str(default)
            plain = "(needed)" if about.is_required() else plain
            yield f"{prefix}{key}", plain, about.description or ""


def known_table(found: list[dict[str, Any]]) -> Table:
    """Return the data sets with the names of their options."""
    table = Table(box=None, pad_edge=False)
    for column in ("data set", "what it does", "options"):
        table.add_column(column, overflow="fold")
    for each in found:
        keys = dict.fromkeys(key.split(".")[0] for key in each["options"])
        table.add_row(each["name"], Text(each["does"]), Text(", ".join(keys)))
    return table


def document(description: Description) -> dict[str, Any]:
    """Return a description for JSON, what is public apart from what is private."""
    dataset, sizes, skew = description.dataset, description.sizes, description.skew
    private: dict[str, Any] = {
        "note": PRIVATE,
        "population": description.population,
        "looked_at": description.looked_at,
        "examples": {
            "min": int(sizes.min()),
            "median": float(np.median(sizes)),
            "max": int(sizes.max()),
            "sum": int(sizes.sum()),
        },
        "skipped": description.skipped,
    }
    if description.reason:
        private["first_skipped"] = description.reason
    if description.notes:
        private["notes"] = list(description.notes)
    if dataset.sizes:
        private["sizes"] = dataset.sizes
    if skew is not None:
        private["classes"] = skew.counts.tolist()
        private["largest_class_share"] = skew.largest
        private["label_distance"] = skew.distance
    return {
        "public": {
            "description": dataset.description,
            "classes": dataset.classes,
            "input_shape": list(dataset.input_shape),
            "class_names": list(getattr(dataset, "class_names", ())),
            "held_out": description.held_out,
            "facts": dataset.facts.document(),
        },
        "private": private,
    }


def lines(description: Description) -> list[str]:
    """Return a description in lines, with bars."""
    found = document(description)
    public, private = found["public"], found["private"]
    facts = ", ".join(f"{key}: {value}" for key, value in public["facts"].items())
    shape = " x ".join(map(str, public["input_shape"]))
    sizes, reason = private["examples"], description.reason
    fewer = private["looked_at"] < private["population"]
    some = f"{numbered(private['population'], 'user')}, of whom were read: " if fewer else ""
    kind = public["facts"]["example"]
    noun = "example" if kind in ("unknown", "joined") else kind
    said = [
        public["description"],
        f"public: {numbered(public['classes'], 'class', 'classes')}, inputs {shape}, "
        f"{numbered(public['held_out'], 'held-out example')}; {facts}",
        PRIVATE,
        f"{some}{in_words(description.sizes.tolist(), noun)}, {sizes['median']:g} in the "
        f"median; {private['skipped']} skipped" + (f", first: {reason}" if reason else ""),
        *(f"note: {note}" for note in description.notes),
        "users by number of examples",
        *_bars(*_histogram(description.sizes)),
    ]
    if (skew := description.skew) is not None:
        names = public["class_names"] or [str(label) for label in range(len(skew.counts))]
        said += [
            f"a user's most frequent class has {skew.largest:.0%} of its examples (median); "
            f"users' classes are {skew.distance:.2f} from those of all (0 alike, 1 apart)",
            "examples by class",
            *_bars(names[: 2 * _BARS], skew.counts[: 2 * _BARS]),
        ]
    return said


def _histogram(sizes: NDArray[np.int64]) -> tuple[list[str], NDArray[np.int64]]:
    """Return ranges of numbers of examples, and how many users are in each."""
    low, high = int(sizes.min()), int(sizes.max())
    edges = np.unique(np.linspace(low, high + 1, min(_BARS, high - low + 1) + 1).astype(np.int64))
    counts, _ = np.histogram(sizes, edges)
    pairs = zip(edges[:-1], edges[1:] - 1, strict=True)
    return [str(a) if a == b else f"{a}-{b}" for a, b in pairs], counts


def _bars(names: list[str], counts: NDArray[np.int64]) -> list[str]:
    widest, most = max(map(len, names)), max(1, int(counts.max()))
    return [
        f"  {name:>{widest}} {'█' * round(_WIDTH * int(count) / most)} {count}"
        for name, count in zip(names, counts, strict=True)
    ]


def check_picture_path(path: Path) -> None:
    """Raise InputError unless `path` names a PNG or SVG file in a folder that exists.

    So it does for a picture that fedpriv did not draw.
    """
    if path.suffix.lower() not in (".png", ".svg"):
        raise InputError(f"--out: write a file that ends with .png or .svg, got {path}")
    if not path.parent.is_dir():
        raise InputError(f"--out: there is no folder {path.parent}; make it, or name another")
    require_replaceable(path, "--out")


def write_picture(description: Description, path: Path) -> None:
    """Draw users by their number of examples, and what classes they have.

    Raises:
        InputError: it cannot be written.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    skew = description.skew
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        figure = Figure(figsize=(8 if skew else 4, 3.2), layout="constrained")
        axes = figure.subplots(1, 2 if skew else 1, squeeze=False)[0]
        names, counts = _histogram(description.sizes)
        axes[0].bar(names, counts, color="#0072B2")
        axes[0].set_xlabel("examples of a user")
        axes[0].set_ylabel("users")
        if skew is not None:
            left = np.zeros(len(shares := skew.shares[:_DRAWN]))
            for label, share in enumerate(shares.T):
                color = mpl.colormaps["viridis"](label / max(1, shares.shape[1] - 1))
                axes[1].bar(range(len(shares)), share, 1.0, bottom=left, color=color)
                left += share
            axes[1].set_xlabel(f"user (the first {len(shares)} that were read)")
            axes[1].set_ylabel("share of each class")
        figure.suptitle("private: not for publication", x=0.01, ha="left", fontweight="bold")
        drawn = io.BytesIO()
        kind = path.suffix[1:].lower()
        figure.savefig(drawn, dpi=150, format=kind, metadata=picture_mark(path))
    write_whole(path, drawn.getvalue(), "picture")
