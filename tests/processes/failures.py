"""Processes that die or stop: the others raise in time, name them, and leave nothing behind. On CPU devices and GPUs.

    python tests/processes/failures.py [case ..]                          on CPU devices
    WIDEEP_PLATFORM=cuda python tests/processes/failures.py [case ..]     a process for each rank, under MPS

`test_failures.py` runs the cases on CPU devices one by one. As a script, a job without a failure comes first, then the
cases side by side, and last, alone, that in which processes are aborted with work under way on their GPU, by which they
might disturb others under MPS. On GPUs the memory in use is compared before and after.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time

import jobs

PROCESSES = 3
ON_GPU = jobs.PLATFORM == "cuda"
DEVICES = 1 if ON_GPU else 2  # of each process
SLACK_S = 5.0
# What a group's set-up waits at the least, whatever its deadline.
SHORTEST_SET_UP_S = 10.0 if ON_GPU else 5.0
SHM = pathlib.Path("/dev/shm")
# An arena alone is larger than a third of it, a memory pool has more than 1 GB.
GPU_SLACK_MB = 100


@dataclasses.dataclass(frozen=True)
class Case:
    """What happens to whom.

    Attributes:
      where: as failing.py has it.
      victim: process.
      number: the signal.
      deadline_s: of the group. Where sockets tell that a process has ended, nobody needs it.
      apart: a program for each op, as on GPUs, and not one for all.
    """

    where: str
    victim: int = PROCESSES - 1
    number: str = "SIGKILL"
    deadline_s: float = 3.0 if ON_GPU else 30.0
    apart: bool = False


CASES = {
    "nothing": Case("none"),
    "dispatch": Case("dispatch"),
    "combine": Case("combine"),
    "dispatch_apart": Case("dispatch", apart=True),
    "combine_apart": Case("combine", apart=True),
    "between": Case("between"),
    "waiting": Case("waiting"),
    "set_up": Case("set-up", 1, deadline_s=3.0),
    "stopped": Case("between", 1, "SIGSTOP", deadline_s=3.0),
    "coordinator": Case("between", 0, deadline_s=3.0),
}
FIRST, LAST = "nothing", "coordinator"
# On GPUs programs are apart anyway. And a process that dies while its kernel runs leaves MPS in an undefined state, as
# NVIDIA says: with a GPU for each process it must work, under MPS it shows what happens.
ON_REQUEST = ("dispatch_apart", "combine_apart", "waiting") if ON_GPU else ()


def check(scratch: pathlib.Path, name: str) -> str:
    """Runs the case; returns how it went. Raises AssertionError."""
    case = CASES[name]
    shared_before = set(SHM.iterdir())
    arguments = (case.where, str(case.victim), case.number, str(case.deadline_s))
    more = {"WIDEEP_APART": "1"} if case.apart else {}
    with jobs.Job(scratch, PROCESSES, DEVICES, "failing.py", arguments, lambda process: more) as job:
        among = [p for p in range(PROCESSES) if case.number != "SIGSTOP" or p != case.victim]
        outcomes = job.wait(among=among)
    survivors = {p: outcome for p, outcome in outcomes.items() if p != case.victim}
    if case.where == "none":
        for outcome in outcomes.values():
            assert outcome.status == 0 and "nothing raised" in outcome.output, outcome.output[-3000:]
        text = "nothing raised"
    elif name == "coordinator":
        text = check_coordinator(case, outcomes, survivors)
    else:
        if case.number == "SIGKILL":
            victim = outcomes[case.victim]
            assert victim.status == -signal.SIGKILL, victim.output[-3000:]
        text = check_survivors(case, survivors)
    left = {path for path in set(SHM.iterdir()) - shared_before if "wideep" in path.name}
    assert not left, left
    return text


def check_survivors(case: Case, survivors: dict[int, jobs.Outcome]) -> str:
    latest = case.deadline_s
    if case.where == "set-up":
        latest = max(latest, SHORTEST_SET_UP_S)
    heard = []
    for process, outcome in survivors.items():
        found = re.search(r"raised after ([\d.]+): (.*)", outcome.output)
        assert found, f"process {process}:\n{outcome.output[-3000:]}"
        seconds, message = float(found[1]), found[2]
        heard.append(f"process {process} after {seconds:.1f} s")
        assert seconds < latest + SLACK_S, f"process {process} raised after {seconds} s: {message}"
        if case.number == "SIGSTOP":
            assert seconds > case.deadline_s - 0.5, message
        for word in expected_words(case):
            assert re.search(word, message), f"process {process}: expected {word!r} in {message}"
        assert outcome.status == 0, outcome.output[-3000:]
        assert "shared: []" in outcome.output, outcome.output[-1000:]
    return ", ".join(heard)


def expected_words(case: Case) -> list[str]:
    """Regular expressions of what each survivor has to say."""
    if case.where == "set-up":  # it has no ranks yet
        return [rf"process(es)? \[?{case.victim}\]?"]
    ranks = [DEVICES * case.victim + device for device in range(DEVICES)]
    if ON_GPU:
        op = {"between": "make_plan", "waiting": "(make_plan|dispatch)"}.get(case.where, case.where)
        return [f"{op}: ", rf"waited longer than the deadline of .* for rank {ranks[0]}\b"]
    if case.number == "SIGSTOP":
        return [
            rf"rank\(s\) {', '.join(map(str, ranks))} of {PROCESSES * DEVICES} \(in process {case.victim}\) "
            rf"did not arrive within the deadline of {1e3 * case.deadline_s:.0f} ms"
        ]
    # Its sockets close, so nobody waits for the deadline. The victim's first rank may have arrived.
    return [rf"rank\(s\) .*\b{ranks[-1]} of {PROCESSES * DEVICES} \(in process {case.victim}\) will not come"]


def check_coordinator(
    case: Case, outcomes: dict[int, jobs.Outcome], survivors: dict[int, jobs.Outcome]
) -> str:
    """JAX's clients end their processes when its coordination service goes.

    What the group has to say is on stderr by then, or raised if Python came first.
    """
    assert outcomes[case.victim].status == -signal.SIGKILL, outcomes[case.victim].output[-3000:]
    heard = []
    for process, outcome in survivors.items():
        seconds = outcome.seconds - outcomes[case.victim].seconds
        heard.append(f"process {process} ended {seconds:.1f} s later with status {outcome.status}")
        assert seconds < case.deadline_s + SLACK_S, heard[-1]
        assert outcome.status in (0, -signal.SIGABRT), outcome.output[-2000:]
        said = ("process 0 has ended", "JAX distributed service detected", "for rank 0")
        assert any(text in outcome.output for text in said), outcome.output[-2000:]
    return ", ".join(heard)


# ---- as a script ----


def gpu_memory_mb() -> int:
    """In use, on all GPUs, by whomever."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return sum(map(int, subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()))


def settled_gpu_memory_mb() -> int:
    """Once it does not change any more: the driver takes its time to give back what an ended process had."""
    readings = [gpu_memory_mb()]
    while len(readings) < 5 or len(set(readings[-5:])) > 1:
        time.sleep(0.2)
        readings.append(gpu_memory_mb())
    return readings[-1]


def check_gpu_memory(before_mb: int, within_s: float = 20.0) -> str:
    until = time.monotonic() + within_s
    while (now_mb := gpu_memory_mb()) > before_mb + GPU_SLACK_MB and time.monotonic() < until:
        time.sleep(0.2)
    assert now_mb <= before_mb + GPU_SLACK_MB, f"{now_mb} MB are in use, {before_mb} MB before"
    return f"{now_mb} MB in use, {before_mb} MB before"


def run_case(name: str) -> str:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="wideep-failures-") as scratch:
        text = check(pathlib.Path(scratch), name)
    print(f"{name}: ok, {time.monotonic() - began:.1f} s: {text}", flush=True)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side-by-side", type=int, default=5 if ON_GPU else 2, help="cases at a time")
    parser.add_argument("cases", nargs="*", metavar="case", help=f"of {', '.join(CASES)}; default: all")
    arguments = parser.parse_args()
    wanted = arguments.cases or [name for name in CASES if name not in ON_REQUEST]
    if unknown := set(wanted) - set(CASES):
        parser.error(f"expected cases of {', '.join(CASES)}, got {', '.join(sorted(unknown))}")
    failed = 0

    def attempt(name: str, run, *given) -> None:
        nonlocal failed
        try:
            run(*given)
        except Exception as error:
            failed += 1
            print(f"{name}: FAILED: {type(error).__name__}: {error}", flush=True)

    # Also so that the MPS server is there before its memory is looked at.
    attempt(FIRST, run_case, FIRST)
    before_mb = settled_gpu_memory_mb() if ON_GPU else 0

    def memory() -> None:
        print(f"memory: ok, {check_gpu_memory(before_mb)}", flush=True)

    for together in (
        [name for name in wanted if name not in (FIRST, LAST)],
        [n for n in wanted if n == LAST],
    ):
        with concurrent.futures.ThreadPoolExecutor(arguments.side_by_side) as pool:
            list(pool.map(lambda name: attempt(name, run_case, name), together))
        if ON_GPU and together:
            attempt("memory", memory)
    print(f"failures: {'ok' if not failed else f'{failed} failed'}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
