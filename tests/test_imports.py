"""What a process imports before it can work: its start takes seconds for nothing else."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import fedpriv
from fedpriv.imports import EXTRAS, command_for

# Each through our optimizer first; the library's own then imports the compiler.
_STEPS = """
import sys
import torch
from fedpriv.optimizers.registry import server_optimizer

def moved(make):
    parameter = torch.nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))
    optimizer = make([parameter])
    for step in range(4):
        parameter.grad = torch.full((3, 4), step - 1.5)
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.zero_grad()
    return parameter

names = ["SGD", "Adam", "AdamW", "Adagrad", "Adadelta", "RMSprop", "NAdam", "RAdam", "Rprop"]
ours = {name: moved(lambda p: server_optimizer(name, p, 0.1, {})) for name in names}
assert "torch._dynamo" not in sys.modules
assert "pytorch_optimizer" not in sys.modules
for name in names:
    assert torch.equal(ours[name], moved(lambda p: getattr(torch.optim, name)(p, lr=0.1))), name
assert all(parameter.requires_grad for parameter in ours.values())
"""


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_torchs_optimizers_step_as_they_do_and_do_not_import_the_compiler():
    run(_STEPS)


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        (
            "fedpriv.federation.client_app",
            ["scipy.special", "scipy.stats", "dp_accounting", "pytorch_optimizer"],
        ),
        ("fedpriv.preparation", ["flwr", "ray", "pytorch_optimizer", "dp_accounting"]),
        ("fedpriv.cli", ["torch", "numpy", "pydantic", "flwr"]),
        ("fedpriv", ["torch", "numpy", "pydantic", "flwr"]),
        ("fedpriv.failures", ["torch", "numpy"]),
        ("fedpriv.privacy.planning, fedpriv.reporting.budget", ["torch", "matplotlib", "flwr"]),
    ],
)
def test_nothing_is_imported_that_is_not_needed_yet(module, absent):
    run(
        f"import {module}, sys; found = set({absent}) & sys.modules.keys(); assert not found, found"
    )


def test_a_plan_of_the_budget_is_made_without_torch():
    plan = ["plan", "--population", "1000", "--cohort", "50", "--delta", "1e-5", "--rounds", "10"]
    run(
        f"from fedpriv.cli import app; import sys; app({['budget', *plan, '--epsilon', '4']}, "
        "standalone_mode=False); assert 'torch' not in sys.modules"
    )


def test_flower_and_ray_are_imported_where_the_federation_package_says():
    root = Path(fedpriv.__file__).parent
    found = {
        (path.relative_to(root).as_posix(), module)
        for path in root.rglob("*.py")
        if root / "federation" not in path.parents
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for module in _imported(node)
        if module.split(".")[0] in ("flwr", "ray")
    }
    assert found == {
        ("flower_app.py", "flwr.app"),
        ("flower_app.py", "flwr.serverapp"),
        ("audit.py", "flwr.app"),
        # For those who come with an app of Flower's own: they hand over its strategy.
        ("flower/strategy.py", "flwr.app"),
        ("flower/strategy.py", "flwr.serverapp"),
        ("flower/strategy.py", "flwr.serverapp.strategy"),
        ("flower/accountant.py", "flwr.serverapp"),
    }


def _imported(node):
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


def test_every_extra_that_a_message_names_is_one_and_brings_the_module():
    project = tomllib.loads((Path(fedpriv.__file__).parents[1] / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    for module, extra in EXTRAS.items():
        brought = [re.split(r"[<>=]", each)[0] for each in extras[extra]]
        # MLflow's client comes without its server too.
        assert {module.replace("_", "-"), f"{module}-skinny"} & set(brought)
        assert command_for(f"{module}.inner") == f"pip install 'fedpriv[{extra}]'"
    assert command_for("mine") == ""


def test_all_that_the_privacy_package_names_is_there():
    run("from fedpriv.privacy import *; RdpAccountant, clip, Ledger, PayerAccounts")
    run("import fedpriv.privacy as p; assert all(getattr(p, name) for name in p.__all__)")


def test_what_the_privacy_package_does_not_name_is_an_error():
    import fedpriv.privacy

    with pytest.raises(AttributeError, match=r"fedpriv\.privacy.*no attribute 'math'"):
        fedpriv.privacy.math  # noqa: B018
