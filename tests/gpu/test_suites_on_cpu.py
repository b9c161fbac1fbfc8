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
        ("nvshmem", ["same_bits", "throughput"]),  # where transports do not differ
    ],
)
def test_suite(suite, checks):
    done = subprocess.run(
        [sys.executable, FOLDER / f"{suite}_suite.py", *checks],
        env=os.environ | {"WIDEEP_CPU_RANKS": "2", "PYTHONPATH": str(FOLDER.parent)},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for check in checks:
        assert f"{check}: ok" in done.stdout


@pytest.mark.parametrize("suite", ["exchange", "low_latency"])
def test_processes_that_end_on_purpose(suite):
    environment = {"JAX_PLATFORMS": "cpu", "WIDEEP_CPU_RANKS": "1"}
    done = subprocess.run(
        [sys.executable, FOLDER / "launch.py", "3", FOLDER / f"{suite}_suite.py", "killed_then_masked"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert "killed_then_masked: ok" in done.stdout and "3 processes" in done.stdout
