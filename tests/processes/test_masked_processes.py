"""Masked ranks where the ranks are in several processes: planned, and after a process has ended."""

import signal

import jobs


def test_planned(tmp_path):
    for output in jobs.run(tmp_path, 3, 2, "masked.py", "planned"):
        assert output.rstrip().endswith("ok"), output[-3000:]


def test_survivors_go_on(tmp_path):
    """Values and gradients are those without the ended process's ranks; nothing is compiled again."""
    with jobs.Job(tmp_path, 3, 2, "masked.py", ["killed"]) as job:
        outcomes = job.wait()
    assert outcomes[2].status == -signal.SIGKILL
    for process in (0, 1):
        outcome = outcomes[process]
        assert outcome.status == 0 and "ok" in outcome.output, outcome.output[-4000:]
