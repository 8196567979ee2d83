"""Data as somebody brings them: a few files of each kind in a fresh folder, made from seeds."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

USERS = tuple(f"user{number:02}" for number in range(10))
CLASSES = ("cat", "dog")
HELD_OUT = "test"

#: What a small run says beside its data.
RUN: dict[str, Any] = {
    "name": "own",
    "seed": 5,
    "rounds": 2,
    "model": {"name": "vit", "dim": 8, "depth": 1, "heads": 2, "patch": 4, "mlp_ratio": 1.0},
    "local": {"epochs": 1, "batch_size": 2, "lr": 0.1},
    "privacy": {
        "delta": 1e-2,
        "noise_multiplier": 1.0,
        "sampling": {"kind": "poisson", "expected_cohort": 6},
        "clipping": {"kind": "global", "bound": 0.1},
        "accountants": ["rdp"],
    },
    "runtime": {"workers": 1, "grid": "local"},
    "evaluation": {"every": 1},
}


def pixels_of(owner: str, number: int, side: int = 12) -> np.ndarray:
    """One image of an owner, in colours."""
    drawn = np.random.default_rng([number, *owner.encode()])
    return drawn.integers(0, 256, (side, side + 4, 3), dtype=np.uint8)


def write_images(folder: Path, users: Mapping[str, int] | None = None) -> Path:
    """Write `user/class/file`, of other sizes and formats, and `test/class/file`."""
    for user, count in (users or dict.fromkeys(USERS, 3)).items():
        for number in range(count):
            suffix, mode = (("png", "RGB"), ("jpg", "L"), ("png", "RGBA"))[number % 3]
            path = folder / user / CLASSES[number % 2] / f"{number}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels_of(user, number, 10 + number)).convert(mode).save(path)
    for number in range(4):
        path = folder / HELD_OUT / CLASSES[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels_of(HELD_OUT, number)).save(path)
    return folder


def rows_of(owner: str, number: int) -> list[float]:
    """Three features of an owner's row."""
    return np.random.default_rng([7, number, *owner.encode()]).normal(size=3).round(3).tolist()


def table_rows(users: Mapping[str, int] | None = None) -> list[dict[str, Any]]:
    """The rows of users: features that say the class, and a number."""
    rows = []
    for user, count in (users or dict.fromkeys(USERS, 4)).items():
        for number in range(count):
            x = rows_of(user, number)
            label = CLASSES[int(x[0] > 0)]
            features = dict(zip(("x0", "x1", "x2"), x, strict=True))
            rows.append({"user": user, **features, "target": label, "height": x[0] + x[1]})
    return rows


def write_table(folder: Path, users: Mapping[str, int] | None = None) -> Path:
    """Write `people.csv`, and `test.csv` of people who are nobody else."""
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(table_rows(users)).to_csv(folder / "people.csv", index=False)
    others = table_rows({f"other{number}": 4 for number in range(3)})
    pd.DataFrame(others).to_csv(folder / "test.csv", index=False)
    return folder


def write_parquet(folder: Path) -> Path:
    """Write the same as Parquet."""
    write_table(folder)
    for name in ("people", "test"):
        pd.read_csv(folder / f"{name}.csv").to_parquet(folder / f"{name}.parquet")
        (folder / f"{name}.csv").unlink()
    return folder


def write_table_of_images(folder: Path, users: Mapping[str, int] | None = None) -> Path:
    """Write images and a table that names them."""
    write_images(folder / "images", users)
    rows = [
        {"who": path.parts[-3], "file": str(path.relative_to(folder)), "kind": path.parts[-2]}
        for path in sorted(folder.rglob("user*/*/*"))
    ]
    pd.DataFrame(rows).to_csv(folder / "people.tsv", index=False, sep="\t")
    return folder


def hf_rows(kind: str = "images", users: Mapping[str, int] | None = None) -> Any:
    """A data set of Hugging Face's with the images, or the rows of the table."""
    import datasets

    rows = table_rows(users)
    for number, row in enumerate(rows):
        row["image"] = Image.fromarray(pixels_of(row["user"], number))
        row["x"] = [row.pop("x0"), row.pop("x1"), row.pop("x2")]
    dropped = ["x", "height"] if kind == "images" else ["image"]
    label = datasets.ClassLabel(names=list(CLASSES)) if kind == "images" else None
    whole = datasets.Dataset.from_list(rows).remove_columns(dropped)
    whole = whole.rename_column("target", "label")
    return whole.cast_column("label", label) if label else whole


def write_hf(folder: Path, kind: str = "images", users: Mapping[str, int] | None = None) -> Path:
    """Write them with `save_to_disk`, with a part `test` of others."""
    import datasets

    others = hf_rows(kind, {f"other{number}": 4 for number in range(3)})
    datasets.DatasetDict(train=hf_rows(kind, users), test=others).save_to_disk(folder)
    return folder


def write_hf_rows(folder: Path) -> Path:
    """Write those of numbers."""
    return write_hf(folder, "rows")


def write_torch(folder: Path) -> Path:
    """Write the images, and a module beside the config with a data set of them."""
    write_images(folder)
    shutil.copy(Path(__file__).parent / "outside" / "own_pictures.py", folder.parent)
    return folder


WORDS = ("to be", "or not", "that is", "the question", "whether", "tis nobler")


def text_of(owner: str, number: int) -> str:
    """One text of an owner."""
    drawn = np.random.default_rng([11, number, *owner.encode()])
    return " ".join(drawn.choice(WORDS, 12)) + f" é{number}"


def write_texts(folder: Path, users: Mapping[str, int] | None = None) -> Path:
    """Write `user/number.txt`, held-out texts in `test`, and public ones in `public.en`."""
    everybody = {**(users or dict.fromkeys(USERS, 2)), HELD_OUT: 2}
    for user, count in everybody.items():
        (folder / user).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            path = folder / user / f"{number}.txt"
            path.write_text(text_of(user, number), encoding="utf-8")
    (folder / "public.en").write_text(" ".join(WORDS) * 20, encoding="utf-8")
    return folder


def write_texts_and_gpt2(folder: Path) -> Path:
    """Write them, and a module beside the config with Hugging Face's GPT-2."""
    shutil.copy(Path(__file__).parent / "outside" / "hf_gpt2.py", folder.parent)
    return write_texts(folder)


def write_lines(folder: Path, users: Mapping[str, int] | None = None) -> Path:
    """Write a table of them, with a text a row, and another of others."""
    folder.mkdir(parents=True, exist_ok=True)
    others = {f"other{number}": 2 for number in range(3)}
    for name, people in (("people", users or dict.fromkeys(USERS, 2)), ("test", others)):
        rows = [(u, text_of(u, n)) for u, count in people.items() for n in range(count)]
        table = pd.DataFrame(rows, columns=["role", "line"])
        table.to_csv(folder / f"{name}.csv", index=False)
    return folder


MLP = {"name": "torchvision.ops:MLP", "hidden_channels": [4, 2]}
GPT = {"name": "gpt", "dim": 8, "depth": 1, "heads": 2}
IMAGE = {"size": 8, "color": "grey"}

#: By name of a data set, what a config says of it; all lie in the folder `data`.
CASES: dict[str, dict[str, Any]] = {
    "image_folder": {
        "data": {"name": "image_folder", "path": "data", "held_out": HELD_OUT, "image": IMAGE}
    },
    "table": {
        "data": {"name": "table", "path": "data", "held_out": "test.csv", "features": "x."},
        "model": {**MLP, "in_channels": 3},
    },
    "table of numbers": {
        "data": {
            "name": "table",
            "path": "data/people.parquet",
            "held_out": "test.parquet",
            "predict": "number",
            "target": ["height", "x2"],
            "features": ["x0", "x1"],
        },
        "model": {**MLP, "in_channels": 2},
    },
    "table of images": {
        "data": {
            "name": "table",
            "path": "data/people.tsv",
            "user": "who",
            "target": "kind",
            "files": "file",
            "classes": list(CLASSES),
            "image": IMAGE,
        }
    },
    "hf": {"data": {"name": "hf", "path": "data", "held_out": "test", "image": IMAGE}},
    "hf of numbers": {
        "data": {
            "name": "hf",
            "path": "data",
            "held_out": "test",
            "input": "x",
            "target": "height",
            "predict": "number",
        },
        "model": {"name": "torchvision.ops:MLP", "hidden_channels": [4, 1], "in_channels": 3},
    },
    "torch": {
        "data": {
            "name": "torch",
            "path": "data",
            "dataset": {"name": "own_pictures:Pictures", "of": "user"},
            "held_out": {"name": "own_pictures:Pictures", "of": HELD_OUT},
            "image": IMAGE,
        }
    },
    "text": {
        "data": {
            "name": "text",
            "path": "data",
            "held_out": HELD_OUT,
            "block": 16,
            "tokenizer": {"kind": "bpe", "vocabulary": 300, "public": "public.en"},
        },
        "model": GPT,
    },
    "text for GPT-2": {
        "data": {"name": "text", "path": "data", "held_out": HELD_OUT, "block": 16},
        "model": {"name": "hf_gpt2:gpt2", "width": 4},
    },
    "text in a table": {
        "data": {
            "name": "text",
            "path": "data/people.csv",
            "held_out": "test.csv",
            "user": "role",
            "text": "line",
            "block": 16,
        },
        "model": GPT,
    },
}

WRITERS = {
    "image_folder": write_images,
    "table": write_table,
    "table of numbers": write_parquet,
    "table of images": write_table_of_images,
    "hf": write_hf,
    "hf of numbers": write_hf_rows,
    "torch": write_torch,
    "text": write_texts,
    "text for GPT-2": write_texts_and_gpt2,
    "text in a table": write_lines,
}


def document_of(case: str) -> dict[str, Any]:
    """The whole config of a case, which is all that its run needs beside its files."""
    own = CASES[case]
    return {**RUN, **own, "data": {"users": len(USERS) + 2, **own["data"]}, "run_dir": "run"}
