"""examples/train_lm.py over several processes: the same losses whatever the layout, also after a failure."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import two_hosts

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
TIMEOUT_S = 300
STEPS, CHECKPOINT_EVERY, KILLED_AT = 10, 4, 7

# Ends process 1 by SIGKILL in its step KILLED_AT, when the checkpoint before it is written.
KILLED_PROGRAM = f"""
import os, pathlib, signal, sys, time
sys.path.insert(0, {str(EXAMPLES)!r})
import jax, train_lm, tyro
from lm import training

options = tyro.cli(train_lm.Options)
train_step, calls = training.train_step, []

def killed_train_step(*arguments):
    calls.append(None)
    if len(calls) == {KILLED_AT} and jax.process_index() == 1:
        while not (options.run / "checkpoint" / "{CHECKPOINT_EVERY}").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    return train_step(*arguments)

training.train_step = killed_train_step
train_lm.start_processes(options)
train_lm.train(options)
"""


def environment(**more):
    # Compiling is most of a short run's time.
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}",
        **more,
    }
    env.pop("NPROC", None)  # the program's own business
    return env


def launch(processes, devices_each, program, *arguments):
    counts = ["--processes", processes, "--devices-per-process", devices_each]
    return subprocess.run(
        [sys.executable, "-m", "jax_wideep.launch", *map(str, (*counts, program, *arguments))],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def train(processes, devices_each, *options):
    done = launch(processes, devices_each, EXAMPLES / "train_lm.py", *options)
    assert done.returncode == 0, done.stdout
    return done.stdout


def losses(run):
    """Of each step, in the order of the file."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, len(steps) + 1))
    assert list(records[0]) == ["run"] and sum("run" in record for record in records) == 1
    return [record["loss"] for record in steps]


@pytest.fixture
def options(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(60):
        (folder / f"file{i}.txt").write_text(f"the quick brown fox {i:02d} jumps over the lazy dog. " * 100)
    sizes = ["--layers", 1, "--hidden", 32, "--heads", 2, "--ffn", 32, "--experts", 8]
    steps = ["--steps", STEPS, "--batch", 8, "--seq", 16, "--eval-every", 100, "--learning-rate", 0.01]
    return [*sizes, *steps, "--checkpoint-every", CHECKPOINT_EVERY, "--data", folder, "--pattern", "*.txt"]


def check_killed_run(run, options, want):
    """A run whose process 1 is killed: the launcher says so, and until then it has the same bits."""
    program = run.with_suffix(".py")
    program.write_text(KILLED_PROGRAM)
    done = launch(2, 4, program, *options, "--run", run)
    assert done.returncode == 128 + signal.SIGKILL, done.stdout
    assert "[launch] first failure: process 1 of 2 was ended by SIGKILL" in done.stdout
    before = losses(run)
    assert CHECKPOINT_EVERY < len(before) < KILLED_AT
    assert before == want[: len(before)]


# One test, since each run is compared with the same one, and takes long: six jobs.
@pytest.mark.timeout(4 * TIMEOUT_S)
def test_layouts_and_restarts_have_the_same_losses(options, tmp_path):
    output = train(2, 4, *options, "--run", tmp_path / "two")
    assert "[0] 8 cpu devices" in output and "2 processes" in output
    assert f"[0] step {STEPS}/{STEPS}" in output and "[1] step" not in output  # process 0 speaks for all
    want = losses(tmp_path / "two")
    assert len(want) == STEPS and want[-1] < want[0] - 0.3  # it learns

    train(1, 8, *options, "--run", tmp_path / "one")
    np.testing.assert_allclose(losses(tmp_path / "one"), want, rtol=1e-5)

    killed = tmp_path / "killed"
    check_killed_run(killed, options, want)
    copies = {processes: tmp_path / f"killed_copy{processes}" for processes in (4, 8)}
    for copy in copies.values():
        shutil.copytree(killed, copy)

    output = train(2, 4, *options, "--run", killed)
    assert f"Going on from step {CHECKPOINT_EVERY}," in output
    assert losses(killed) == want

    for processes, copy in copies.items():
        output = train(processes, 8 // processes, *options, "--run", copy)
        assert f"Going on from step {CHECKPOINT_EVERY}," in output and f"{processes} processes" in output
        assert losses(copy)[:CHECKPOINT_EVERY] == want[:CHECKPOINT_EVERY]
        np.testing.assert_allclose(losses(copy), want, rtol=1e-5)
        settings = json.loads((copy / "metrics.jsonl").read_text().splitlines()[0])["run"]
        assert settings["processes"] == processes and settings["ranks"] == 8


def test_signal_to_one_process_stops_all_after_the_same_step(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(f"""
        import os, signal, sys
        sys.path.insert(0, {str(EXAMPLES)!r})
        import jax
        from jax_wideep import launch
        from lm.stopping import StopRequest

        launch.initialize()
        with StopRequest(jax.make_mesh((jax.device_count(),), ("data",))) as stop:
            for step in range(100):
                if step == 3 and jax.process_index() == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                if number := stop.agreed():
                    print("stopped at", step, "by", number)
                    break
        """)
    )
    done = launch(2, 1, program)
    assert done.returncode == 0, done.stdout
    assert re.findall(r"stopped at (\d+) by (\d+)", done.stdout) == [("3", "15")] * 2, done.stdout


def test_two_hosts(options, tmp_path):
    if reason := two_hosts.unavailable():
        pytest.skip(reason)
    command = [sys.executable, EXAMPLES / "train_lm.py", *options, "--steps", 20, "--run", tmp_path / "run"]
    env = environment(JAX_NUM_CPU_DEVICES="2")
    first, second = two_hosts.run(list(map(str, command)), timeout_s=TIMEOUT_S, env=env)
    assert first[0] == second[0] == 0, (first, second)
    assert "backend 'xla', 2 processes" in first[1] and "step 20/20" in first[1]
    assert len(losses(tmp_path / "run")) == 20
