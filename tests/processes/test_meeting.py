"""How the processes of a group find each other, and what keeps them from exchanging tokens."""

import os
import socket
import subprocess
import sys
import textwrap

import jax
import jobs
import pytest
import two_hosts

from jax_wideep import _bootstrap, _ffi


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ("hidden=128", "hidden: process 0 has 256, process 1 has 128"),
        ("backend=xla", "backend: process 0 has 'auto', process 1 has 'xla'"),
        ("versions", "jax: process 0 has "),
    ],
)
def test_settings_that_differ_are_an_error_in_every_process(tmp_path, change, difference):
    for output in jobs.run(tmp_path, 2, 1, "meeting.py", change):
        assert "refused: ExpertGroup: expected the same settings" in output
        assert difference in output
        if change == "versions":
            assert "process 1 has '0.0.1'" in output


def test_found_by_slurm(tmp_path):
    """JAX's own detection: what `srun` sets in the environment is all that the processes know."""
    with socket.socket() as probe:  # JAX takes port 61440 + job % 4096 upwards
        probe.bind(("127.0.0.1", 0))
        job = probe.getsockname()[1] % (2**12)

    def environment(process):
        return {
            "SLURM_JOB_ID": str(job),
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_NTASKS": "2",
            "SLURM_PROCID": str(process),
            "SLURM_LOCALID": str(process),
            "JAX_COORDINATOR_ADDRESS": None,
            "JAX_NUM_PROCESSES": None,
            "JAX_PROCESS_ID": None,
        }

    with jobs.Job(tmp_path, 2, 1, "meeting.py", ["exchange"], environment) as running:
        outcomes = running.wait()
    for outcome in outcomes.values():
        assert "backend cpu; warned: []" in outcome.output, outcome.output[-3000:]
        assert "exchanged" in outcome.output and outcome.status == 0


def test_programs_of_a_compilation_cache_exchange_by_collectives(tmp_path):
    """Process 0 fills the cache, and in the second job it alone finds its programs there."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    for _ in range(2):
        with jobs.Job(tmp_path, 2, 2, "meeting.py", ["exchange"], lambda process: cache) as running:
            outcomes = running.wait()
        for outcome in outcomes.values():
            assert outcome.status == 0, outcome.output[-3000:]
            assert "(backend='xla'), since" in outcome.output and "compilation cache is on" in outcome.output
            assert "exchanged" in outcome.output
        assert list(tmp_path.glob("*-cache"))


def test_two_hosts_exchange_by_collectives():
    """Two network namespaces: the same machine, but no socket reaches the other one."""
    reason = two_hosts.unavailable()
    if reason:
        pytest.skip(reason)
    paths = os.pathsep.join([str(jobs.HERE), str(jobs.HERE.parent)])
    environment = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": paths}
    command = [sys.executable, str(jobs.HERE / "meeting.py"), "exchange"]
    for status, output in two_hosts.run(command, timeout_s=jobs.TIMEOUT_S, env=environment):
        assert status == 0, output[-3000:]
        assert "backend xla" in output and "exchanged" in output
        assert "(backend='xla'), since the mesh spans several hosts" in output


# ---- strangers: another user of this host ----

NOBODY = 65534


# Imports come first: nobody may not see where Python is installed.
BECOME_NOBODY = f"import os, socket, sys; os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})\n"


def as_nobody(code, *arguments):
    """Starts Python code as another user."""
    command = [sys.executable, "-I", "-c", BECOME_NOBODY + textwrap.dedent(code), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")


@needs_root
def test_stranger_cannot_open_shared_memory():
    """It has no name; and what /proc shows of it is closed to others."""
    jax.devices()  # before the handlers: JAX cannot start a backend after that
    arena = _ffi.cpu_module().make_arena()
    path = f"/proc/{os.getpid()}/fd/{arena.descriptor}"
    with open(path, "rb"):
        pass  # its owner may
    assert os.stat(path).st_mode & 0o777 == 0o600
    output, _ = as_nobody("open(sys.argv[1], 'rb')", path).communicate(timeout=30)
    assert "PermissionError" in output, output


@needs_root
def test_stranger_cannot_join_the_rendezvous():
    """Whoever finds the socket is asked who they are, before anything is said."""
    address = f"wideep-test-{os.getpid()}"
    with _bootstrap._new_socket(20) as listener:
        listener.bind("\0" + address)
        listener.listen()
        child = as_nobody(
            """
            peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            peer.connect("\\0" + sys.argv[1])
            print(peer.recv(100))
            """,
            address,
        )
        peer, _ = listener.accept()
        with peer, pytest.raises(_bootstrap._StrangerError, match=f"user {NOBODY} is at the other end"):
            peer.settimeout(20)
            _bootstrap._receive(peer, b"0" * 32)
        assert child.communicate(timeout=30)[0] == "b''\n"  # closed, without a word
