"""Other libraries stay as they are: no private module of Flower's or Ray's, nothing replaced."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from in_process import train_small

import fedpriv

ROOT = Path(fedpriv.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
PRIVATE = re.compile(r"\._(?!_)")

#: What Flower and Ray offer to those who use them.
PUBLIC = {
    "flwr.app",
    "flwr.clientapp",
    "flwr.serverapp",
    "flwr.serverapp.strategy",
    "ray",
    "ray.exceptions",
}
#: The two private parts of Flower that its public grid needs: a task's identity, a message's id.
TOUCHES = ROOT / "federation" / "grids" / "base.py"
TOUCHED = {"flwr.supercore.task_identity"}
#: Settings that libraries have for their users to set.
SETTINGS = {
    "torch.backends.cuda.matmul.allow_tf32",
    "torch.backends.cudnn.allow_tf32",
}


def imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Each name that is imported, and what it is: `(name here, module.name)`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield (
                    alias.asname or alias.name.split(".")[0],
                    (alias.name if alias.asname else alias.name.split(".")[0]),
                )
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def modules(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def dotted(node: ast.AST) -> str | None:
    """`a.b.c` for such an expression."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (owner := dotted(node.value)):
        return f"{owner}.{node.attr}"
    return None


def assigned(tree: ast.AST) -> Iterator[ast.expr]:
    """Whatever is assigned to, deleted, or handed to setattr, as the expression for it."""
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign | ast.Delete):
            targets = list(node.targets)
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        elif isinstance(node, ast.Call) and dotted(node.func) in ("setattr", "delattr"):
            key = node.args[1]
            name = key.value if isinstance(key, ast.Constant) else "?"
            targets = [ast.Attribute(node.args[0], str(name), ast.Store())]
        for target in targets:
            parts = target.elts if isinstance(target, ast.Tuple | ast.List) else [target]
            yield from (p.value if isinstance(p, ast.Subscript) else p for p in parts)


def offences(path: Path) -> set[str]:
    """What a file has of other libraries that is theirs alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {name: full for name, full in imported(tree) if not full.startswith("fedpriv")}
    allowed = PUBLIC | (TOUCHED if path == TOUCHES else set())

    def whose(node: ast.AST) -> str:
        name, _, rest = (dotted(node) or "").partition(".")
        return f"{names[name]}.{rest}" if rest and name in names else ""

    found = {m for m in modules(tree) if m.split(".")[0] in ("flwr", "ray")} - allowed
    used = {whose(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    found |= {one for one in used if one.startswith(("flwr.", "ray.")) and PRIVATE.search(one)}
    for one in filter(None, map(whose, assigned(tree))):
        touch = path == TOUCHES and ".TaskIdentity." in one
        if one.split(".")[0] not in sys.stdlib_module_names and one not in SETTINGS and not touch:
            found.add(one)
    return found


def test_nothing_of_other_libraries_is_private_or_replaced():
    assert {str(path): found for path in FILES if (found := offences(path))} == {}


def test_a_replaced_function_would_be_found():
    tree = ast.parse("from ray import x\nx.f = 1\nsetattr(x, 'g', 2)\nx.d['k'], y = 1, 2\ndel x.h")
    assert [dotted(target) for target in assigned(tree)][:2] == ["x.f", "x.d"]
    assert {"x.g", "x.h"} <= {dotted(target) for target in assigned(tree)}
    assert dict(imported(tree)) == {"x": "ray.x"}


# What every class and module of these libraries holds, before and after a run and an optimizer of
# each kind; what a library keeps there itself is found by a run without ours, and left out.
_RUN = """
import sys, types
import flwr.app, flwr.clientapp, flwr.serverapp, flwr.serverapp.strategy, ray, torch, numpy
import torch.optim, pytorch_optimizer

libraries = ("flwr", "ray", "torch", "numpy", "pytorch_optimizer")
kinds = types.FunctionType | property | staticmethod | classmethod

def kept_in(value):
    inner = getattr(value, "__wrapped__", value)
    both = (getattr(one, "__dict__", ()) for one in (value, inner))
    return set() if isinstance(value, type) else set().union(*both)

def held():
    found = {}
    for name, module in list(sys.modules.items()):
        if module is None or name.split(".")[0] not in libraries:
            continue
        for key, value in list(vars(module).items()):
            if isinstance(value, types.FunctionType | types.BuiltinFunctionType | type):
                found[name, key] = value, kept_in(value)
            if isinstance(value, type) and getattr(value, "__module__", "") == name:
                for attribute, inner in list(vars(value).items()):
                    if isinstance(inner, kinds):
                        found[name, key, attribute] = inner, kept_in(inner)
    return found

before = held()
from pathlib import Path
from in_process import train_small
from fedpriv.optimizers.registry import server_optimizer
train_small(Path(sys.argv[1]) / "run", rounds=1)
for name in ("sgd", "adam", "lamb", "muon"):
    server_optimizer(name, [torch.nn.Parameter(torch.ones(2, 2))], 0.1, {})
after = held()
# torch hooks the step of each optimizer's class when the first one is made, by itself.
changed = {key for key in before if before[key] != after.get(key) and key[2:] != ("step",)}
assert not changed, changed
"""


def test_a_run_leaves_other_libraries_as_they_were(tmp_path):
    tests = str(Path(__file__).parent)
    code = f"import sys; sys.path.insert(0, {tests!r})\n{_RUN}"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_environment_names_the_versions_of_extras_that_may_decide_numbers(tmp_path):
    directory, _ = train_small(tmp_path / "run", rounds=1)
    versions = directory.environment()["versions"]
    for name in ("peft", "timm", "transformers", "tokenizers", "torch"):
        assert versions[name] == version(name)
