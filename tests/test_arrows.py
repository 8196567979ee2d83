"""The rooms of the house, and which may import which: arrows point one way."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedpriv

ROOT = Path(fedpriv.__file__).parent

#: From the ground to the roof: a room imports those of lower floors, and itself.
FLOORS: tuple[set[str], ...] = (
    {
        "errors",
        "caches",
        "counting",
        "draws",
        "imports",
        "threads",
        "told_apart",
        "transfer",
        "yaml_text",
        "__version__",
    },
    {"sections", "disk", "origins", "failures"},
    {"signatures"},
    {"components", "runtime"},
    {"privacy", "models", "named_files"},
    {"data", "optimizers", "algorithms", "trackers"},
    {"tasks"},
    {"training"},
    {"config"},
    {"config_files"},
    {"federation"},
    {"canaries", "seed_model", "held_out", "selection"},
    {"preparation"},
    {"reporting", "deploy"},
    {"recorder"},
    {"experiment"},
    {"audit", "export", "flower_app", "opacus", "predict"},
    # For those who come with an app of Flower's own: what runs it is put together here.
    {"api", "flower"},
    {"tuning"},
    {"cli"},
    {"__init__"},
    {"__main__"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

#: What may be known about privacy where nothing else is: neither models, nor Flower, nor Ray.
PURE = {"errors", "failures", "sections", "disk", "components", "privacy"}


def imported(path: Path) -> Iterator[str]:
    """The rooms that a file imports from when it runs, wherever in it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    annotations = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, _, rest = name.partition(".")
            if package == "fedpriv" and id(node) not in annotations:
                yield rest.partition(".")[0] or "__init__"


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


FILES = sorted(ROOT.rglob("*.py"))


def test_every_room_has_a_floor():
    assert {room(path) for path in FILES} | {"__version__"} == set(FLOOR)


@pytest.mark.parametrize("name", sorted(FLOOR))
def test_a_room_imports_only_what_stands_below_it(name):
    wrong = {
        f"{path.relative_to(ROOT)} imports {other}"
        for path in FILES
        if room(path) == name
        for other in imported(path)
        if other != name and FLOOR[other] >= FLOOR[name]
    }
    assert not wrong


def test_privacy_knows_of_nothing_else():
    known = {other for path in FILES if room(path) == "privacy" for other in imported(path)}
    assert known <= PURE


def test_the_round_stands_on_one_page():
    page = (ROOT / "federation" / "strategy.py").read_text(encoding="utf-8").splitlines()
    assert len(page) <= 200


def test_no_module_is_a_book():
    longest = max(FILES, key=lambda path: len(path.read_text(encoding="utf-8").splitlines()))
    assert len(longest.read_text(encoding="utf-8").splitlines()) <= 600, longest
