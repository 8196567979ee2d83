"""Stage 1 of the GPU benchmark: the tests marked gpu, on the device. See gpu.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

from gpu_stage import Stage

ROOT = Path(__file__).parents[2]


def main() -> None:
    stage = Stage.of_arguments()
    with TemporaryDirectory() as folder:
        found = Path(folder) / "found.xml"
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu", f"--junitxml={found}"],
            cwd=ROOT,
            env={**os.environ, "FEDPRIV_TEST_DEVICE": stage.device.type},
        )
        suite = ElementTree.parse(found).getroot()
    cases = list(suite.iter("testcase"))
    for case in cases:
        for ending in ("failure", "error", "skipped"):
            if (node := case.find(ending)) is not None:
                why = (node.get("message") or "").splitlines()
                stage.write(test=case.get("name"), ended=ending, why=why[0][:200] if why else "")
    bad = sum(case.find("failure") is not None or case.find("error") is not None for case in cases)
    stage.write(what="pytest -m gpu", tests=len(cases), failed=bad)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
