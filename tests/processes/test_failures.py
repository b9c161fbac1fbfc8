"""A process that dies or stops: the others raise in time, name its ranks, and leave nothing behind."""

import pathlib
import re
import signal

import jobs
import pytest

DEADLINE_S = 3.0
PROCESSES, DEVICES = 3, 2
SLACK_S = 5.0
SHM = pathlib.Path("/dev/shm")


def raised(outcome):
    """Seconds and message of what a survivor raised."""
    found = re.search(r"raised after ([\d.]+): (.*)", outcome.output)
    assert found, outcome.output[-3000:]
    return float(found[1]), found[2]


def survivors_of(tmp_path, where, victim, number):
    """Outcomes of the other processes; the victim is ended by `number`, or at last by the job."""
    arguments = (where, str(victim), number, str(DEADLINE_S))
    others = [process for process in range(PROCESSES) if process != victim]
    with jobs.Job(tmp_path, PROCESSES, DEVICES, "failing.py", arguments) as job:
        outcomes = job.wait(150, among=others)
        if number == "SIGKILL":
            assert job.wait(150, among=[victim])[victim].status == -signal.SIGKILL
    return outcomes


def check_survivors(outcomes, victim, *, at_once):
    for process, outcome in outcomes.items():
        seconds, message = raised(outcome)
        assert seconds < DEADLINE_S + SLACK_S, f"process {process} raised after {seconds} s"
        if at_once:
            assert seconds < DEADLINE_S, f"process {process} raised only after {seconds} s: {message}"
        assert f"process {victim}" in message, message
        assert outcome.status == 0
        assert "shared: []" in outcome.output, outcome.output[-1000:]


@pytest.mark.parametrize("where", ["dispatch", "combine", "between"])
def test_killed_process(tmp_path, where):
    """Its sockets close, so the others need no deadline. The last device of the victim is at `where`."""
    victim = PROCESSES - 1
    before = set(SHM.iterdir())
    outcomes = survivors_of(tmp_path, where, victim, "SIGKILL")
    check_survivors(outcomes, victim, at_once=True)
    assert not [path for path in set(SHM.iterdir()) - before if "wideep" in path.name]  # it has no name
    for outcome in outcomes.values():
        message = raised(outcome)[1]
        last = PROCESSES * DEVICES - 1
        assert re.search(
            rf"rank\(s\) .*\b{last} of {last + 1} \(in process {victim}\) will not come", message
        )


def test_killed_process_during_set_up(tmp_path):
    """Nobody knows it yet, so the others wait for as long as set-up may take."""
    outcomes = survivors_of(tmp_path, "set-up", 1, "SIGKILL")
    for outcome in outcomes.values():
        seconds, message = raised(outcome)
        assert seconds < DEADLINE_S + SLACK_S + 2  # set-up waits for 5 s at least
        assert re.search(r"process(es)? \[?1\]?", message), message
        assert "shared: []" in outcome.output


def test_stopped_process(tmp_path):
    """It does not close anything, so the deadline finds it."""
    victim = 1
    outcomes = survivors_of(tmp_path, "between", victim, "SIGSTOP")
    check_survivors(outcomes, victim, at_once=False)
    for outcome in outcomes.values():
        seconds, message = raised(outcome)
        assert seconds > DEADLINE_S - 0.5
        assert "rank(s) 2, 3 of 6 (in process 1) did not arrive within the deadline of 3000 ms" in message


def test_coordinator_dies(tmp_path):
    """Process 0 runs JAX's coordination service, whose clients end their processes when it goes: at once, too.

    What the group has to say is on stderr by then, or raised if Python came first.
    """
    outcomes = survivors_of(tmp_path, "between", 0, "SIGKILL")
    for outcome in outcomes.values():
        assert outcome.status in (0, -signal.SIGABRT), outcome.output[-2000:]
        assert "process 0 has ended" in outcome.output or "JAX distributed service detected" in outcome.output
