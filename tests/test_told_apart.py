"""Two things that compute something else are never taken for one another: they share no noise."""

import importlib
import sys
import threading
import types

import pytest
import torch
from torch import nn

from fedpriv.data.registry import DATASETS
from fedpriv.models import MODELS
from fedpriv.origins import module_beside, origin_of, origin_of_object
from fedpriv.told_apart import digest_of


def maker(width):
    def build(input_shape, classes):
        return nn.Linear(width, classes)

    return build


class Holder:
    def __init__(self, value):
        self.value = value


def cell(code: str, name: str = "build"):
    """What a notebook's cells define."""
    namespace = {"__name__": "__main__"}
    exec(code, namespace)
    return namespace[name]


NOTEBOOK = """
WIDTH = {width}
def helper(x):
    return x {sign} 1
class Layer:
    scale = {scale}
    def forward(self, x):
        return x
def build(classes, of=Layer):
    return [helper(WIDTH) for _ in range(classes)]
"""
PLAIN = {"width": 4, "sign": "+", "scale": 1.0}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (maker(4), maker(8)),
        (maker(torch.zeros(2)), maker(torch.ones(2))),
        (Holder([1, 2]), Holder([1, 3])),
        (Holder(torch.tensor([1.0])), Holder(torch.tensor([2.0]))),
        (Holder(lambda x: x + 1), Holder(lambda x: x + 2)),
        (nn.Linear(2, 2), nn.Linear(2, 2)),
        *((cell(NOTEBOOK.format(**PLAIN)), cell(NOTEBOOK.format(**{**PLAIN, **change})))
          for change in ({"width": 5}, {"sign": "-"}, {"scale": 2.0})),
    ],
)  # fmt: skip
def test_what_differs_has_another_digest(one, other):
    assert digest_of(one)[0] != digest_of(other)[0]


@pytest.mark.parametrize(
    "made",
    [lambda: maker(4), lambda: Holder({"a": {1, 2}}), lambda: cell(NOTEBOOK.format(**PLAIN))],
)
def test_what_is_made_again_has_the_same(made):
    assert digest_of(made())[0] == digest_of(made())[0]


def test_what_cannot_be_looked_into_is_like_nothing_else():
    locked = Holder(threading.Lock())
    assert digest_of(locked)[0] != digest_of(locked)[0]


def test_functions_that_one_def_made_are_not_one_component():
    versions = {MODELS.find(MODELS.give(maker(width))).version for width in (4, 8, 4)}
    assert len(versions) == 2


HELPER, MINE = (
    "def width():\n    return 4\n",
    """
from torch import nn
class Layer(nn.Identity): ...
def build(classes):
    import {helper}
    return nn.Linear({helper}.width(), classes)
""",
)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A module `mine` and one `later` that it imports when it is called, nowhere else used."""
    names = [f"{name}_{tmp_path.name.replace('-', '_')}" for name in ("mine", "later")]
    (tmp_path / f"{names[0]}.py").write_text(MINE.format(helper=names[1]))
    (tmp_path / f"{names[1]}.py").write_text(HELPER)
    yield tmp_path, *names
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("beside", [True, False])
def test_a_file_that_is_imported_when_a_function_is_called_counts(project, beside, monkeypatch):
    folder, mine, later = project
    code = folder if beside else None
    if not beside:
        monkeypatch.syspath_prepend(str(folder))

    def origin():
        build = module_beside(mine, code).build
        return origin_of(build, f"{mine}:build", code), build

    first, build = origin()
    assert build(2).in_features == 4
    (folder / f"{later}.py").write_text(HELPER.replace("4", "5"))
    second, build = origin()
    assert second.version != first.version
    assert f"{later}.py" in second.told()
    if beside:  # and is imported anew
        assert first.changed(folder)
        assert build(2).in_features == 5


def test_what_a_script_imports_counts(project, monkeypatch):
    folder, mine, later = project
    script = types.ModuleType("__main__")
    script.__file__ = str(folder / "script.py")
    (folder / "script.py").write_text(f"import {mine}\n")
    monkeypatch.setitem(sys.modules, "__main__", script)
    monkeypatch.syspath_prepend(str(folder))
    made = cell("def build(): ...")
    script.build = made
    names = dict((*(found := origin_of(made, "__main__:build", None)).files, *found.imports))
    assert set(names) == {"script.py", f"{mine}.py", f"{later}.py"}


def test_an_object_is_known_by_the_files_of_all_classes_in_it(project, monkeypatch):
    folder, mine, _ = project
    monkeypatch.syspath_prepend(str(folder))
    model = nn.Sequential(nn.Linear(2, 2), module_beside(mine, None).Layer())
    assert f"{mine}.py" in dict(origin_of_object(model, private=False).files)


def test_a_package_is_known_by_its_own_file_whatever_else_has_that_name(tmp_path, monkeypatch):
    package = f"parcel_{tmp_path.name.replace('-', '_')}"
    for folder in (tmp_path / package, tmp_path / package / "inner"):
        folder.mkdir()
        (folder / "__init__.py").write_text(f"class Made: ...  # {folder.name}")
    (tmp_path / package / "inner" / "leaf.py").write_text("class Made: ...")
    monkeypatch.syspath_prepend(str(tmp_path))
    made = importlib.import_module(f"{package}.inner.leaf").Made()
    found = {name for name, _ in origin_of_object(made, private=False).files}
    inner = f"{package}/inner"
    assert found == {f"{package}/__init__.py", f"{inner}/__init__.py", f"{inner}/leaf.py"}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "__init__.py").write_text("another")
    monkeypatch.syspath_prepend(str(elsewhere))
    assert origin_of_object(made, private=False).unlike_here("") is None


def test_of_private_data_nothing_is_in_what_is_published():
    assert DATASETS.private
    texts = {origin_of_object(Holder(torch.rand(3)), DATASETS.private).told() for _ in range(2)}
    assert len(texts) == 1
    people = [cell(f"USERS = [{n!r}]\ndef build(seed):\n    return USERS") for n in ("ann", "bob")]
    texts = {origin_of(made, "__main__:build", None, DATASETS.private).told() for made in people}
    assert len(texts) == 1
    other = cell("USERS = [1]\ndef build(seed):\n    return USERS[1:]")
    assert origin_of(other, "__main__:build", None, True).told() not in texts
