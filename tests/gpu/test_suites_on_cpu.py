"""The suites for GPUs run on CPU devices: that they can, before a GPU is there."""

import os
import pathlib
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parent


@pytest.mark.parametrize(
    "suite, checks",
    [
        ("moe", ["repeats"]),
        ("placement", ["replicas"]),
        ("families", ["gpt_oss"]),
        ("exchange", ["values", "one_token", "tail", "fp8", "masked"]),
    ],
)
def test_suite(suite, checks):
    done = subprocess.run(
        [sys.executable, FOLDER / f"{suite}_suite.py", *checks],
        env=os.environ | {"WIDEEP_CPU_RANKS": "2", "PYTHONPATH": str(FOLDER.parent)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for check in checks:
        assert f"{check}: ok" in done.stdout
