"""Runs a script as the processes of one JAX job, and says how each of them ended.

On CPU devices, or with WIDEEP_PLATFORM=cuda on GPUs, one for each process: those that CUDA_VISIBLE_DEVICES lists, which
processes share under MPS where there are too few.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

HERE = pathlib.Path(__file__).parent
sys.path.append(str(HERE.parent))  # where no pytest has
import leaving  # noqa: E402

PLATFORM = os.environ.get("WIDEEP_PLATFORM", "cpu")
# For jobs that take a tenth of it on a machine that does nothing else. GPU machines do nothing else, and cost more.
TIMEOUT_S = 300.0 if PLATFORM == "cpu" else 75.0


@dataclasses.dataclass
class Outcome:
    status: int  # as of subprocess: negative for a signal
    output: str
    seconds: float


class Job:
    """The processes; a context manager that leaves none behind."""

    def __init__(
        self,
        scratch: pathlib.Path,
        processes: int,
        devices: int,
        script: str,
        arguments: Sequence[str] = (),
        environment: Callable[[int], Mapping[str, str | None]] = lambda process: {},
    ):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        paths = (str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", ""))
        self._logs = [scratch / f"log{process}" for process in range(processes)]
        self._began = time.monotonic()
        self.processes = []
        for process, log in enumerate(self._logs):
            job = {
                "JAX_PLATFORMS": PLATFORM,
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(process),
                "WIDEEP_DEVICES": str(devices),
                "WIDEEP_SCRATCH": str(scratch),
                "PYTHONPATH": os.pathsep.join(filter(None, paths)),
                "PYTHONUNBUFFERED": "1",
                **(_gpu(process) if PLATFORM == "cuda" else {}),
            }
            wanted = {**os.environ, "NPROC": None, **job, **environment(process)}
            with open(log, "wb") as file:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, str(HERE / script), *arguments],
                        env={name: value for name, value in wanted.items() if value is not None},
                        stdin=leaving.stdin_of(process),
                        stdout=file,
                        stderr=subprocess.STDOUT,
                    )
                )

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()
        leaving.let_first_leave(self.processes)

    def output(self, process: int) -> str:
        return self._logs[process].read_text(errors="replace")

    def wait(self, timeout_s: float = TIMEOUT_S, among: Sequence[int] | None = None) -> dict[int, Outcome]:
        """Until the processes have ended, or those `among` them; fails the test where they do not in time."""
        outcomes: dict[int, Outcome] = {}
        waiting = set(range(len(self.processes)) if among is None else among)
        while waiting:
            for number in sorted(waiting):
                status = self.processes[number].poll()
                if status is not None:
                    seconds = time.monotonic() - self._began
                    outcomes[number] = Outcome(status, self.output(number), seconds)
                    waiting.remove(number)
            if not waiting - {0}:
                leaving.let_first_leave(self.processes)
            if time.monotonic() - self._began > timeout_s:
                texts = [f"-- process {n}:\n{self.output(n)[-3000:]}" for n in range(len(self.processes))]
                raise AssertionError(
                    f"processes {sorted(waiting)} still run after {timeout_s:g} s\n" + "\n".join(texts)
                )
            time.sleep(0.02)
        return outcomes


def _gpu(process: int) -> dict[str, str]:
    """Environment of a process with a GPU, or a part of one; its memory pool is one region, which peers can map."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")
    flags = (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_gpu_autotune_level=0",
        "--xla_gpu_enable_command_buffer=",
    )
    return {
        "CUDA_VISIBLE_DEVICES": visible[process % len(visible)],
        "XLA_PYTHON_CLIENT_PREALLOCATE": "true",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.02",
        "XLA_FLAGS": " ".join(filter(None, flags)),
    }


def run(
    scratch: pathlib.Path,
    processes: int,
    devices: int,
    script: str,
    *arguments: str,
    timeout_s: float = TIMEOUT_S,
    **more: Any,
) -> list[str]:
    """Outputs of a job all of whose processes must end well."""
    with Job(scratch, processes, devices, script, arguments, **more) as job:
        outcomes = job.wait(timeout_s)
    for number, outcome in outcomes.items():
        assert outcome.status == 0, (
            f"process {number} ended with status {outcome.status}\n{outcome.output[-4000:]}"
        )
    return [outcomes[number].output for number in range(processes)]
