"""Runs a script or a module as several processes of one JAX job on this host; see world.py for the script's side.

    python tests/gpu/launch.py 8 tests/gpu/exchange_suite.py [arguments]
    python tests/gpu/launch.py 8 jax_wideep.bench decode [arguments]        a module

All processes see the GPUs of --devices, by default the first one only: ranks then share it, for which MPS has to run
(run.sh starts it). On a machine of several GPUs also: --devices=each, or one process with --devices=0,1. Memory pools
are preallocated and fit beside each other, so that a pool is one region that peers can map.

Prints process 0's output. If a process fails, or time is up, ends the others and prints the end of the first failing
process's output, then that of the others; where each one stood is part of it.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time

sys.path.append(str(pathlib.Path(__file__).parents[1]))
import leaving

# What a script's process ends with when it means to die.
PLANNED_DEATH = 99


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(
    arguments: argparse.Namespace, process: int, port: int, scratch: pathlib.Path
) -> dict[str, str]:
    root = pathlib.Path(__file__).parents[2]
    paths = [
        # Beside its sources lies the module for GPUs; for CPU devices it is installed.
        "" if "WIDEEP_CPU_RANKS" in os.environ else str(root),
        str(root / "tests"),
        str(pathlib.Path(__file__).parent),
        os.environ.get("PYTHONPATH", ""),
    ]
    fraction = min(0.75, 0.8 / (1 if arguments.devices == "each" else arguments.processes))
    flags = [os.environ.get("XLA_FLAGS", ""), *arguments.xla_flag]
    if arguments.dump:
        flags += [f"--xla_dump_to={scratch}/dump{process}", f"--xla_dump_hlo_module_re={arguments.dump}"]
    defaults = {
        "CUDA_VISIBLE_DEVICES": str(process) if arguments.devices == "each" else arguments.devices,
        "JAX_PLATFORMS": "cuda",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "true",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{fraction:.3f}",
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    return {
        **defaults,
        **os.environ,
        "XLA_FLAGS": " ".join(filter(None, flags)),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",  # where a process stood when it crashed or was aborted
        "JAX_PROCESS_ID": str(process),
        "JAX_NUM_PROCESSES": str(arguments.processes),
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "WIDEEP_PROCESS": str(process),
        "WIDEEP_NUM_PROCESSES": str(arguments.processes),
        "WIDEEP_COORDINATOR": f"127.0.0.1:{port}",
        "WIDEEP_SCRATCH": str(scratch),
    }


def wait(processes: list[subprocess.Popen], timeout_s: float) -> tuple[int | None, str]:
    """Until all have ended well, or one has not: (which one, why)."""
    deadline = time.monotonic() + timeout_s
    while True:
        codes = [process.poll() for process in processes]
        for number, code in enumerate(codes):
            if code not in (None, 0, PLANNED_DEATH):
                return number, f"ended with status {code}"
        if None not in codes:
            return None, ""
        if None not in codes[1:]:
            leaving.let_first_leave(processes)
        if time.monotonic() > deadline:
            return codes.index(None), f"was still running after {timeout_s:g} s"
        time.sleep(0.05)


def end(processes: list[subprocess.Popen]) -> None:
    """Aborts those that still run, which tells where they stood; kills what does not end by that."""
    for number in (signal.SIGABRT, signal.SIGKILL):
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline and any(process.poll() is None for process in processes):
            time.sleep(0.05)
    for process in processes:
        process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("processes", type=int)
    parser.add_argument("--timeout", type=float, default=120, help="seconds for the whole job")
    parser.add_argument(
        "--devices", default="0", help="CUDA_VISIBLE_DEVICES of every process; 'each': a GPU of its own"
    )
    parser.add_argument("--xla-flag", action="append", default=[], help="added to XLA_FLAGS")
    parser.add_argument(
        "--dump", default="", help="regular expression of module names: XLA dumps them to scratch"
    )
    parser.add_argument("script", help="a file, or the name of a module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()

    began = time.monotonic()
    program = [arguments.script] if arguments.script.endswith(".py") else ["-m", arguments.script]
    with tempfile.TemporaryDirectory(prefix="wideep-") as name:
        scratch = pathlib.Path(name)
        port = free_port()
        processes, logs = [], []
        for number in range(arguments.processes):
            logs.append(scratch / f"log{number}")
            with open(logs[-1], "wb") as log:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, *program, *arguments.arguments],
                        env=environment(arguments, number, port, scratch),
                        stdin=leaving.stdin_of(number),
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )
        try:
            failed, why = wait(processes, arguments.timeout)
        finally:
            end(processes)
        print(logs[0].read_text(errors="replace"), end="")
        if failed is not None:
            print(f"-- process {failed} of {arguments.processes} {why}; the end of its output:")
            print(logs[failed].read_text(errors="replace")[-4000:])
            for number, log in enumerate(logs):
                if number not in (0, failed):
                    print(f"-- process {number}:\n{log.read_text(errors='replace')[-1500:]}")
    print(
        f"-- {arguments.processes} processes, {time.monotonic() - began:.1f} s, {'failed' if why else 'ok'}"
    )
    return 1 if why else 0


if __name__ == "__main__":
    sys.exit(main())
