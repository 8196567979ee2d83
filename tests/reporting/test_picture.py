import json
from pathlib import Path

import pytest
from PIL import Image

from fedpriv.reporting.picture import write_picture

RED = (176, 0, 32)


def colours_of(path: Path) -> set[tuple[int, ...]]:
    with Image.open(path) as picture:
        return {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}


def test_the_picture_is_drawn_with_and_without_privacy(make_run) -> None:
    for folder, changes in {"private": {}, "open": {"privacy": None}}.items():
        path = write_picture(make_run(folder, **changes))
        with Image.open(path) as picture:
            width, height = picture.size
        assert width > height > 300
        assert (0, 114, 178) in colours_of(path)


@pytest.mark.parametrize("file", ["ledger.jsonl", "metrics.jsonl"])
def test_no_epsilon_is_drawn_that_the_ledger_does_not_come_to(make_run, file) -> None:
    directory = make_run("run")
    assert RED not in colours_of(write_picture(directory))
    path = directory / file
    if file == "ledger.jsonl":
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    else:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows[-1]["epsilon"]["rdp"] /= 2
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert RED in colours_of(write_picture(directory))
