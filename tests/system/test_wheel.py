"""The wheel and the archive: whole, and installed where the repository is not."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import fedpriv

ROOT = Path(fedpriv.__file__).parents[1]


def done(*command: str | Path, **options) -> str:
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with both, built from what is in the repository alone."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    source.mkdir()
    tracked = done("git", "ls-files", "-co", "--exclude-standard", "-z", cwd=ROOT).split("\0")
    for name in filter(None, tracked):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    for kind in ("sdist", "wheel"):
        build = f"from setuptools import build_meta; build_meta.build_{kind}({str(folder)!r})"
        done(sys.executable, "-c", build, cwd=source)
    return folder


@pytest.fixture(scope="module")
def installed(built) -> Path:
    """The programs of an environment with the wheel, and its dependencies from this one."""
    home = built / "environment"
    venv.create(home, with_pip=True)
    done(home / "bin" / "pip", "install", "--no-deps", "--no-index", *built.glob("*.whl"))
    (site,) = home.glob("lib/python*/site-packages")
    # A folder that a .pth file names is searched last, and its own .pth files are not read: the
    # editable fedpriv of this environment stays out.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return home / "bin"


def test_the_wheel_holds_every_file_of_the_package(built):
    (wheel,) = built.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("fedpriv/")}
    own = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fedpriv").rglob("*")
           if path.is_file() and "__pycache__" not in path.parts}  # fmt: skip
    assert held == own
    assert wheel.stat().st_size < 1e6


def test_the_archive_builds_what_the_repository_builds(built, tmp_path):
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    assert not (source / "tests").exists()
    build = "from setuptools import build_meta as b; b.build_wheel('.')"
    done(sys.executable, "-c", build, cwd=source)
    names = [sorted(zipfile.ZipFile(next(f.glob("*.whl"))).namelist()) for f in (source, built)]
    assert names[0] == names[1]


def test_its_metadata_say_what_it_is(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(built / "unpacked")
    (info,) = (built / "unpacked").glob("*.dist-info")
    metadata = PathDistribution(info).metadata
    assert (metadata["Name"], metadata["Version"]) == ("fedpriv", fedpriv.__version__)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_payload().startswith("# fedpriv")
    needed = [Requirement(each) for each in metadata.get_all("Requires-Dist")]
    assert all(each.specifier for each in needed if each.name != "types-PyYAML")
    assert {"hf", "timm", "peft", "opacus", "docs"} <= set(metadata.get_all("Provides-Extra"))


def test_it_trains_and_reports_where_the_repository_is_not(installed, tmp_path):
    outside = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    outside["RAY_TMPDIR"] = outside["TMPDIR"] = str(tmp_path)
    where = {"cwd": tmp_path, "env": outside, "timeout": 240}
    found = "import fedpriv; print(fedpriv.__file__)"
    assert done(installed / "python", "-c", found, **where).startswith(str(installed.parent))
    program = installed / "fedpriv"
    assert done(program, "--version", **where) == f"fedpriv {fedpriv.__version__}\n"
    done(program, "init", **where)
    small = [
        "rounds=1",
        "runtime.grid=local",
        "data.users=40",
        "privacy.sampling.expected_cohort=8",
    ]
    settings = [part for each in small for part in ("--set", each)]
    done(program, "run", "digits.yaml", *settings, "--set", "run_dir=run", **where)
    assert "ε" in (tmp_path / "run" / "report.html").read_text()
    done(program, "ledger", "verify", "run", **where)
    assert "correlated" in done(program, "methods", "mechanism", **where)
