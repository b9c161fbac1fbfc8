"""Two processes: each reads the experts that it hosts and no others, and both write one checkpoint."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest
from checkpoints import draw_checkpoint
from safetensors.numpy import save_file
from test_weights import as_read, read

HERE = pathlib.Path(__file__).parent


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])  # experts apart, and stacked
def test_two_processes(tmp_path, family):
    tensors, params = draw_checkpoint(family)
    (tmp_path / "theirs").mkdir()
    save_file(tensors, tmp_path / "theirs" / "model.safetensors")
    coordinator = f"localhost:{free_port()}"
    processes = [
        subprocess.Popen(
            [sys.executable, HERE / "load_and_save.py", tmp_path, family, str(process), coordinator],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=HERE,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        for process in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    of_experts = sum(tensor.nbytes for name, tensor in tensors.items() if ".experts." in name)
    whole = sum(tensor.nbytes for tensor in tensors.values()) - of_experts
    for process, (output, _) in enumerate(outputs):
        bytes_read, sums, written = json.loads(output.splitlines()[-1])
        assert bytes_read == of_experts // 2 + whole
        experts = range(4 * process, 4 * process + 4, 2)  # two on each of its devices
        assert sums == {str(first): params["wo"][first : first + 2].sum() for first in experts}
        # Under its name, a file is complete, whichever process returns first.
        assert written[-1] == "model.safetensors.index.json" and not any(".part" in name for name in written)
    assert read(tmp_path / "ours") == as_read(tensors)
