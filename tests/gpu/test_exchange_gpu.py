"""exchange_suite.py under pytest; run.sh runs it at more sizes and keeps the logs.

pytest -m gpu tests/gpu/test_exchange_gpu.py          ranks that share a GPU need MPS: CUDA_MPS_PIPE_DIRECTORY
"""

import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.gpu

FOLDER = pathlib.Path(__file__).parent


@pytest.mark.parametrize("processes", [1, 2, 8])
def test_suite(processes):
    if processes > 1 and "CUDA_MPS_PIPE_DIRECTORY" not in os.environ:
        pytest.skip("ranks that share a GPU need MPS, or wait for each other in time slices")
    environment = {key: value for key, value in os.environ.items() if key not in ("JAX_PLATFORMS", "NPROC")}
    flags = ["--xla-flag=--xla_gpu_graph_min_graph_size=1", "--dump=captured_step", "--timeout=110"]
    done = subprocess.run(
        [sys.executable, FOLDER / "launch.py", *flags, str(processes), FOLDER / "exchange_suite.py"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
