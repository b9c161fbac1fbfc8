"""Runs a program as several processes of one JAX job on this host; and `initialize`, for the program's side.

    python -m jax_wideep.launch --processes 4 --devices-per-process 2 examples/train_lm.py --steps 100
    python -m jax_wideep.launch --processes 8 --gpu-each package.module

Every line of output gets the number of its process in front. When a process fails, the others are ended (SIGTERM, and
SIGKILL for what is left after --grace seconds), the first failure is reported with the end of its output, and its
status is the launcher's. Ctrl-C, SIGTERM and SIGHUP are passed on, so that the program can save its state; the second
Ctrl-C gives it --grace seconds, the third none. No process is left behind, even if the launcher is killed.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import dataclasses
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import IO, Any

_ADDRESS, _COUNT, _NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"

# What JAX's own detection of a cluster wants to see.
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_OPEN_MPI_4 = "OMPI_MCA_orte_hnp_uri"
_KUBERNETES = ("KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX")

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LAST_LINES = 20
# Of what JAX's client says before it aborts its process: process 0, which runs the coordination service, has ended.
_SERVICE_GONE = "JAX distributed service detected fatal errors"
_PR_SET_PDEATHSIG = 1


# ---- in the program ----


def initialize(**settings: Any) -> bool:
    """`jax.distributed.initialize`, where this process is one of several; nothing where it is alone.

    Call it before JAX starts a backend. The processes are found, in this order,

    - by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, as the launcher sets them;
    - by JAX's own detection under SLURM (`srun`), Open MPI (`mpirun`) or Kubernetes (an Indexed Job). Open MPI 5 does
      not tell where process 0 is: give JAX_COORDINATOR_ADDRESS there (`mpirun -x`).

    With several processes an uncaught exception ends this one as soon as its traceback is printed: JAX would wait at
    exit for the others, which wait for this one.

    Args:
      **settings: further arguments of `jax.distributed.initialize`.

    Returns:
      Whether there are several processes.

    Raises:
      ValueError: the environment names only a part of what is needed.
    """
    arguments = _find_processes()
    if arguments is None:
        return False
    import jax  # here, since the launcher itself does without

    jax.distributed.initialize(**arguments, **settings)
    _exit_on_uncaught_exceptions()
    return True


def _find_processes() -> dict[str, Any] | None:
    """Arguments of `jax.distributed.initialize`, those left out being its to find; None for a lone process."""
    env = os.environ
    address, count, number = (env.get(name) for name in (_ADDRESS, _COUNT, _NUMBER))
    if address is not None and count is None and number is None:
        count, number = env.get("OMPI_COMM_WORLD_SIZE"), env.get("OMPI_COMM_WORLD_RANK")
    if count is not None or number is not None:
        missing = [
            name for name, value in ((_ADDRESS, address), (_COUNT, count), (_NUMBER, number)) if value is None
        ]
        if missing:
            raise ValueError(
                f"initialize: expected {_ADDRESS}, {_COUNT} and {_NUMBER} in the environment, got none of "
                f"{missing}; set them, or none of the three"
            )
        assert count is not None and number is not None  # for the type checker: nothing is missing
        if int(count) == 1:
            return None
        # Detection would add the GPU that a surrounding job step gives to its own process.
        return {
            "coordinator_address": address,
            "num_processes": int(count),
            "process_id": int(number),
            "cluster_detection_method": "deactivate",
        }
    if all(name in env for name in _SLURM):
        return {} if int(env["SLURM_NTASKS"]) > 1 else None
    if int(env.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        if _OPEN_MPI_4 not in env:
            raise ValueError(
                f"initialize: {_ADDRESS}: expected host:port of process 0, which this version of Open MPI does not "
                f"tell, got nothing; add -x {_ADDRESS}=HOST:PORT to mpirun"
            )
        return {}
    return {} if all(name in env for name in _KUBERNETES) else None


def _exit_on_uncaught_exceptions() -> None:
    show = sys.excepthook

    def show_and_exit(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        show(kind, error, trace)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(128 + signal.SIGINT if issubclass(kind, KeyboardInterrupt) else 1)

    sys.excepthook = show_and_exit


# ---- the launcher ----


@dataclasses.dataclass(eq=False)
class _Process:
    """One process of the job.

    Attributes:
      number: its JAX_PROCESS_ID.
      popen: the running program, leader of a process group of its own.
      prefix: of its lines.
      rest: output after the last line break.
      last_lines: the end of its output.
      status: how it ended: 0, an exit status, or minus the number of a signal; None while it runs.
    """

    number: int
    popen: subprocess.Popen[bytes]
    prefix: str
    rest: bytes = b""
    last_lines: collections.deque[str] = dataclasses.field(
        default_factory=lambda: collections.deque(maxlen=_LAST_LINES)
    )
    status: int | None = None

    @property
    def output(self) -> IO[bytes]:
        assert self.popen.stdout is not None
        return self.popen.stdout

    def signal_group(self, number: int) -> None:
        """To the process and whatever it started. It is not reaped before the end, so its id stays its own."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, number)

    def has_ended(self) -> bool:
        """Whether it has ended, which `status` then tells; it stays a zombie."""
        if self.status is None:
            info = os.waitid(os.P_PID, self.popen.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if info is not None:
                self.status = info.si_status if info.si_code == os.CLD_EXITED else -info.si_status
        return self.status is not None


class Job:
    """The processes of one program.

    Args:
      command: what each process runs.
      environments: of each process, by number.
      grace_s: seconds between SIGTERM and SIGKILL.
      out: where their lines go.
      log: where the launcher's own lines go.
    """

    def __init__(
        self,
        command: Sequence[str],
        environments: Sequence[dict[str, str]],
        *,
        grace_s: float,
        out: IO[bytes],
        log: IO[bytes],
    ):
        self._command = command
        self._environments = environments
        self._grace_s = grace_s
        self._out, self._log = out, log
        self._processes: list[_Process] = []
        self._selector = selectors.DefaultSelector()
        self._signals: list[int] = []
        self._deadline: float | None = None
        self._first: _Process | None = None

    def run(self) -> int:
        """Until all processes have ended; returns the first failure's status, or 0."""
        with self._note_signals():
            try:
                self._start()
                self._watch()
                self._drain()
            finally:
                self._end()
        if self._first is None:
            return 0
        if not self._was_told(self._first):
            self._report(self._first)
        return _exit_status(self._first)

    def _start(self) -> None:
        width = len(str(len(self._environments) - 1))
        for number, environment in enumerate(self._environments):
            popen = subprocess.Popen(
                self._command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                process_group=0,
                preexec_fn=_die_with_parent(),
            )
            process = _Process(number, popen, f"[{number:{width}}] ")
            self._processes.append(process)
            os.set_blocking(process.output.fileno(), False)
            self._selector.register(process.output, selectors.EVENT_READ, lambda p=process: self._read(p))
            # Wakes the loop up when the process ends, so that the first failure is seen first.
            self._selector.register(os.pidfd_open(popen.pid), selectors.EVENT_READ, None)

    def _watch(self) -> None:
        forwarded = 0
        while running := [process for process in self._processes if process.status is None]:
            for key, _ in self._selector.select(timeout=0.1):
                if key.data is not None:
                    key.data()
                else:
                    self._selector.unregister(key.fileobj)
                    os.close(key.fd)
            ended = [process for process in running if process.has_ended()]
            for process in ended:
                self._read(process)
            for process in sorted(ended, key=_causes_first):
                if process.status != 0:
                    self._on_failure(process)
            while forwarded < len(self._signals):
                forwarded += 1
                self._forward(self._signals[forwarded - 1], forwarded)
            if self._deadline is not None and time.monotonic() > self._deadline:
                self._signal_running(signal.SIGKILL)

    def _on_failure(self, process: _Process) -> None:
        if self._first is not None:
            return
        self._first = process
        if self._was_told(process):
            return  # the others are on their way
        self._say(f"{_describe(process, len(self._processes))}; ending the others")
        if self._deadline is None:
            self._deadline = time.monotonic() + self._grace_s
        self._signal_running(signal.SIGTERM)

    def _was_told(self, process: _Process) -> bool:
        """Whether it ended as one does on a signal that was passed on."""
        return _exit_status(process) in {128 + number for number in self._signals}

    def _report(self, process: _Process) -> None:
        """Last of all, below what the other processes had to say."""
        self._say(f"first failure: {_describe(process, len(self._processes))}. The end of its output:")
        for line in process.last_lines or ["(nothing)"]:
            self._log.write(f"{process.prefix}{line}\n".encode())
        self._log.flush()

    def _forward(self, number: int, times: int) -> None:
        self._signal_running(number if times < 3 else signal.SIGKILL)
        if times == 2 and self._deadline is None:
            self._deadline = time.monotonic() + self._grace_s

    def _signal_running(self, number: int) -> None:
        for process in self._processes:
            if process.status is None:
                process.signal_group(number)

    def _read(self, process: _Process) -> None:
        """Prints the lines that have come."""
        while not process.output.closed:
            part = process.output.read(1 << 16)
            if part is None:  # nothing now
                return
            if not part:  # nothing any more
                self._selector.unregister(process.output)
                process.output.close()
                part = b"\n" if process.rest else b""
            *lines, process.rest = (process.rest + part).split(b"\n")
            for line in lines:
                process.last_lines.append(line.decode(errors="replace"))
                self._out.write(process.prefix.encode() + line + b"\n")
            self._out.flush()

    def _drain(self) -> None:
        """What their own children still write, which are ended now."""
        for process in self._processes:
            process.signal_group(signal.SIGKILL)
        deadline = time.monotonic() + 1
        while any(not process.output.closed for process in self._processes) and time.monotonic() < deadline:
            for process in self._processes:
                self._read(process)
            time.sleep(0.01)

    def _end(self) -> None:
        for process in self._processes:
            process.signal_group(signal.SIGKILL)
            process.popen.wait()
            process.output.close()
        for key in list(self._selector.get_map().values()):
            if key.data is None:
                os.close(key.fd)
        self._selector.close()

    @contextlib.contextmanager
    def _note_signals(self) -> Iterator[None]:
        before = {
            number: signal.signal(number, lambda got, _: self._signals.append(got)) for number in _FORWARDED
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _say(self, text: str) -> None:
        self._log.write(f"[launch] {text}\n".encode())
        self._log.flush()


def _exit_status(process: _Process) -> int:
    """As a shell gives it."""
    assert process.status is not None
    return process.status if process.status >= 0 else 128 - process.status


def _causes_first(process: _Process) -> int:
    """The order of processes that have ended at once: a signal gives the others errors, process 0's end aborts them."""
    assert process.status is not None
    if any(_SERVICE_GONE in line for line in process.last_lines):
        return 2
    return 0 if process.status < 0 else 1


def _describe(process: _Process, count: int) -> str:
    how = f"ended with status {process.status}"
    if process.status is not None and process.status < 0:
        how = f"was ended by {signal.Signals(-process.status).name}"
    return f"process {process.number} of {count} {how}"


def _die_with_parent() -> Callable[[], None]:
    """What a new process does first: asks the kernel to end it when the launcher ends, in whatever way."""
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return ask


def free_address() -> str:
    """host:port of this host's loopback that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def environment(
    number: int,
    processes: int,
    address: str,
    *,
    devices_per_process: int | None = None,
    gpu_each: bool = False,
) -> dict[str, str]:
    """The environment of process `number`: this one's, and where its job is."""
    env = os.environ | {
        _ADDRESS: address,
        "JAX_COORDINATOR_BIND_ADDRESS": address,  # JAX would listen on all of the host's interfaces
        _COUNT: str(processes),
        _NUMBER: str(number),
        "PYTHONUNBUFFERED": "1",
    }
    if devices_per_process is not None:
        threads = max(2 * devices_per_process, int(env.get("NPROC", 0)), os.cpu_count() or 1)
        env |= {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices_per_process),
            "NPROC": str(threads),  # see jax_wideep.use_cpu_devices
        }
    if gpu_each:
        visible = env.get("CUDA_VISIBLE_DEVICES", "").split(",") if env.get("CUDA_VISIBLE_DEVICES") else None
        if visible is not None and len(visible) < processes:
            raise ValueError(
                f"launch: --gpu-each: expected a GPU for each of {processes} processes in CUDA_VISIBLE_DEVICES, got "
                f"{','.join(visible)}"
            )
        env["CUDA_VISIBLE_DEVICES"] = str(number) if visible is None else visible[number]
    return env


def make_parser() -> argparse.ArgumentParser:
    """Of the launcher's own command line."""
    parser = argparse.ArgumentParser(
        prog="python -m jax_wideep.launch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--processes", type=int, required=True, help="how many")
    devices = parser.add_mutually_exclusive_group()
    devices.add_argument("--devices-per-process", type=int, help="CPU devices that each process makes")
    devices.add_argument("--gpu-each", action="store_true", help="process i sees the i-th GPU only")
    parser.add_argument("--grace", type=float, default=5, help="seconds between SIGTERM and SIGKILL")
    parser.add_argument("program", help="a file, or the name of a module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the program's own")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(argv)
    for name in ("processes", "devices_per_process"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {value}")

    is_file = options.program.endswith(".py") or os.path.exists(options.program)
    program = [options.program] if is_file else ["-m", options.program]
    address = free_address()
    try:
        environments = [
            environment(
                number,
                options.processes,
                address,
                devices_per_process=options.devices_per_process,
                gpu_each=options.gpu_each,
            )
            for number in range(options.processes)
        ]
    except ValueError as error:
        parser.error(str(error))
    return Job(
        [sys.executable, *program, *options.arguments],
        environments,
        grace_s=options.grace,
        out=sys.stdout.buffer,
        log=sys.stderr.buffer,
    ).run()


if __name__ == "__main__":
    sys.exit(main())
