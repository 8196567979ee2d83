"""Stage 1 of the GPU benchmark: the tests marked gpu, on the device. See gpu.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

from gpu_stage import Stage

ROOT = Path(__file__).parents[2]
_ENDING = re.compile(r"::(\S.*?) (PASSED|FAILED|ERROR|SKIPPED)")


def main() -> None:
    stage = Stage.of_arguments()
    with TemporaryDirectory() as folder:
        found = Path(folder) / "found.xml"
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "pytest",
                "-m",
                "gpu",
                "tests/gpu",
                "-vv",
                f"--junitxml={found}",
            ],
            cwd=ROOT,
            env={**os.environ, "FEDPRIV_TEST_DEVICE": stage.device.type},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        for line in process.stdout:  # what has ended is written down before the next test begins
            print(line, end="", flush=True)
            if (ending := _ENDING.search(line)) is not None:
                stage.write(test=ending[1], ended=ending[2].lower())
        code = process.wait()
        suite = ElementTree.parse(found).getroot()
    cases = list(suite.iter("testcase"))
    for case in cases:
        for kind in ("failure", "error", "skipped"):
            if (node := case.find(kind)) is not None:
                why = (node.get("message") or "").splitlines()
                stage.write(test=case.get("name"), ended=kind, why=why[0][:200] if why else "")
    bad = sum(case.find("failure") is not None or case.find("error") is not None for case in cases)
    stage.write(what="pytest -m gpu", tests=len(cases), failed=bad)
    sys.exit(code)


if __name__ == "__main__":
    main()
