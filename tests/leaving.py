"""How a process of a test's job ends where JAX's own way out would wait for a process that is gone.

Process 0 runs JAX's coordination service, and every client aborts when that goes. So process 0 goes last: the program
that started the job gives it a pipe as its stdin, and closes the pipe once the other processes have ended.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import NoReturn

# ---- in a process of the job ----


def leave() -> NoReturn:
    import jax  # here, since the program that starts the job may do without

    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:
        sys.stdin.buffer.read()
    os._exit(0)


# ---- in the program that starts it ----


def stdin_of(process: int) -> int:
    """For subprocess.Popen."""
    return subprocess.PIPE if process == 0 else subprocess.DEVNULL


def let_first_leave(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """All but process 0 have ended, or are not waited for."""
    pipe = processes[0].stdin
    assert pipe is not None
    pipe.close()
