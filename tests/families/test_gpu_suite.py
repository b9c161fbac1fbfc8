"""tests/gpu/families_suite.py, which is for GPUs, on CPU devices."""

import os
import pathlib
import subprocess
import sys

SUITE = pathlib.Path(__file__).parents[1] / "gpu" / "families_suite.py"


def test_one_family_on_two_ranks():
    environment = os.environ | {"WIDEEP_CPU_RANKS": "2", "PYTHONPATH": str(SUITE.parents[1])}
    done = subprocess.run(
        [sys.executable, SUITE, "gpt_oss"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "gpt_oss: ok" in done.stdout
