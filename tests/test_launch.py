"""python -m jax_wideep.launch: output, failures, signals, and nothing left behind. The programs here do without JAX."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from jax_wideep import launch

LAUNCH = [sys.executable, "-m", "jax_wideep.launch"]
TIMEOUT_S = 120


@pytest.fixture
def program(tmp_path):
    """Makes a program of this text, in which `number` is the process's; returns its file."""

    def make(text):
        path = tmp_path / "program.py"
        path.write_text(
            "import os, signal, subprocess, sys, time\n"
            'number = int(os.environ["JAX_PROCESS_ID"])\n' + textwrap.dedent(text)
        )
        return path

    return make


def run(*arguments, **options):
    return subprocess.run(
        [*LAUNCH, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        **options,
    )


def start(*arguments):
    return subprocess.Popen(
        [*LAUNCH, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def read_until(process, wanted, times):
    """Reads lines until `times` of them hold `wanted`."""
    lines = []
    while sum(wanted in line for line in lines) < times:
        line = process.stdout.readline()
        assert line, f"ended with {process.wait()}: {lines}"
        lines.append(line)
    return lines


def assert_gone(pids, within_s=10):
    """None of these processes runs; one that nobody waited for yet (a zombie) has ended, too."""

    def state(pid):
        try:
            return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return "X"

    deadline = time.monotonic() + within_s
    running = list(pids)
    assert running
    while running := [pid for pid in running if state(pid) not in "ZX"]:
        assert time.monotonic() < deadline, f"processes {running} still run"
        time.sleep(0.02)


def test_every_line_has_its_process_in_front_and_the_job_is_described(program):
    file = program("""
        job = [os.environ[n] for n in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_NUM_CPU_DEVICES")]
        print(number, *job, sys.argv[1:])
        print("an error", file=sys.stderr)
        sys.stdout.write("no line break")
    """)
    done = run("--processes", 3, "--devices-per-process", 2, file, "--steps", 5)
    assert done.returncode == 0 and done.stderr == ""
    lines = sorted(done.stdout.splitlines())
    assert len(lines) == 9
    addresses = set()
    for number in range(3):
        of_process = [line.removeprefix(f"[{number}] ") for line in lines if line.startswith(f"[{number}] ")]
        assert of_process[1:] == ["an error", "no line break"]
        match = re.fullmatch(rf"{number} (127\.0\.0\.1:\d+) 3 2 \['--steps', '5'\]", of_process[0])
        addresses.add(match[1])
    assert len(addresses) == 1


def test_first_failure_ends_the_others_and_is_reported_last(program, tmp_path):
    file = program("""
        print("pid", os.getpid(), flush=True)
        if number == 1:
            while len(os.listdir(sys.argv[1])) < 2:
                time.sleep(0.01)
            for i in range(30):
                print("line", i)
            print("this is why")
            sys.exit(7)
        def end(*_):
            print("told to end")
            sys.exit(3)
        signal.signal(signal.SIGTERM, end)
        open(os.path.join(sys.argv[1], str(number)), "x").close()
        time.sleep(1000)
    """)
    (tmp_path / "ready").mkdir()
    done = run("--processes", 3, file, tmp_path / "ready")
    assert done.returncode == 7
    assert done.stdout.count("told to end") == 2
    first, rest = done.stderr.split("\n", 1)
    assert first == "[launch] process 1 of 3 ended with status 7; ending the others"
    assert rest.startswith(
        "[launch] first failure: process 1 of 3 ended with status 7. The end of its output:\n"
    )
    assert rest.splitlines()[1:] == [f"[1] line {i}" for i in range(11, 30)] + ["[1] this is why"]
    assert_gone(map(int, re.findall(r"pid (\d+)", done.stdout)))


def test_causes_come_first():
    """Of processes that have ended when the launcher looks: a kill, an error, and aborts for process 0's sake."""

    def ended(number, status, line):
        process = launch._Process(number, None, "", status=status)
        process.last_lines.append(line)
        return process

    service_gone = (
        "F1125 client.h:80] Terminating process because the JAX distributed service detected fatal errors."
    )
    aborted = ended(1, -signal.SIGABRT, service_gone)
    error = ended(0, 1, "ValueError: the reason")
    killed = ended(2, -signal.SIGKILL, "step 3")
    assert sorted([aborted, error], key=launch._causes_first)[0] is error
    assert sorted([error, killed, aborted], key=launch._causes_first) == [killed, error, aborted]


def test_what_does_not_end_by_itself_is_killed_with_its_children(program, tmp_path):
    file = program("""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
        print("pid", os.getpid(), child.pid, flush=True)
        open(os.path.join(sys.argv[1], str(number)), "x").close()
        if number == 0:
            while len(os.listdir(sys.argv[1])) < 2:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(1000)
    """)
    (tmp_path / "ready").mkdir()
    began = time.monotonic()
    done = run("--processes", 2, "--grace", 0.5, file, tmp_path / "ready")
    assert done.returncode == 128 + signal.SIGKILL
    assert "first failure: process 0 of 2 was ended by SIGKILL" in done.stderr
    pids = [int(pid) for line in re.findall(r"pid (\d+) (\d+)", done.stdout) for pid in line]
    assert len(pids) == 4
    assert_gone(pids)
    assert time.monotonic() - began < TIMEOUT_S / 2  # the children's 1000 s are not waited for


def test_children_that_outlive_a_good_end_are_ended(program):
    file = program("""
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
        print("pid", child.pid)
    """)
    done = run("--processes", 2, file)
    assert done.returncode == 0
    assert_gone(map(int, re.findall(r"pid (\d+)", done.stdout)))


SAVES_ON_SIGNAL = """
    def save(got, _):
        time.sleep(0.3 * number)
        print("saved after", got)
        sys.exit(128 + got)
    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, save)
    print("pid", os.getpid(), flush=True)
    time.sleep(1000)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_passed_on_and_every_process_may_finish(program, number):
    job = start("--processes", 3, "--grace", 0.1, program(SAVES_ON_SIGNAL))
    lines = read_until(job, "pid", 3)
    job.send_signal(number)
    rest, _ = job.communicate(timeout=TIMEOUT_S)
    assert job.returncode == 128 + number
    assert rest.count(f"saved after {number.value}") == 3 and "failure" not in rest
    assert_gone(int(line.split()[-1]) for line in lines)


def test_second_ctrl_c_ends_what_hangs(program):
    file = program("""
        signal.signal(signal.SIGINT, lambda *_: print("not now", flush=True))
        print("pid", os.getpid(), flush=True)
        while True:
            time.sleep(1)
    """)
    job = start("--processes", 2, "--grace", 0.3, file)
    lines = read_until(job, "pid", 2)
    job.send_signal(signal.SIGINT)
    read_until(job, "not now", 2)
    job.send_signal(signal.SIGINT)
    job.communicate(timeout=TIMEOUT_S)
    assert job.returncode == 128 + signal.SIGKILL
    assert_gone(int(line.split()[-1]) for line in lines)


def test_killed_launcher_leaves_no_process(program):
    job = start("--processes", 2, program('print("pid", os.getpid(), flush=True); time.sleep(1000)'))
    lines = read_until(job, "pid", 2)
    job.kill()
    job.wait()
    job.stdout.close()
    assert_gone(int(line.split()[-1]) for line in lines)


def test_program_may_be_a_module(tmp_path):
    (tmp_path / "some_module.py").write_text("print('module', __name__)")
    done = run("--processes", 1, "some_module", env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0 and done.stdout == "[0] module __main__\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", "0"], "--processes: expected at least 1, got 0"),
        (["--processes", "1", "--devices-per-process", "0"], "--devices-per-process: expected at least 1"),
        (
            ["--processes", "3", "--gpu-each"],
            "a GPU for each of 3 processes in CUDA_VISIBLE_DEVICES, got 4,5",
        ),
    ],
)
def test_wrong_arguments(monkeypatch, capsys, arguments, message):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    with pytest.raises(SystemExit) as ended:
        launch.main([*arguments, "x.py"])
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_environment_of_each_process(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    assert launch.environment(1, 2, "h:1", gpu_each=True)["CUDA_VISIBLE_DEVICES"] == "5"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert launch.environment(1, 2, "h:1", gpu_each=True)["CUDA_VISIBLE_DEVICES"] == "1"
    monkeypatch.setenv("NPROC", "3")
    env = launch.environment(0, 2, "h:1", devices_per_process=40)
    assert int(env["NPROC"]) >= 80 and env["JAX_PLATFORMS"] == "cpu"


# ---- initialize ----

SLURM = {
    "SLURM_JOB_ID": "1",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
LAUNCHED = {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
EXPLICIT = {
    "coordinator_address": "h:1",
    "num_processes": 2,
    "process_id": 1,
    "cluster_detection_method": "deactivate",
}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        (LAUNCHED, EXPLICIT),
        (LAUNCHED | SLURM, EXPLICIT),  # launched inside of a job step
        (LAUNCHED | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
        (SLURM, {}),
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2"}, None),  # in an sbatch script, not under srun
        (OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://1.1.1.1:1"}, {}),
        (OPEN_MPI | {"JAX_COORDINATOR_ADDRESS": "h:1"}, EXPLICIT),
        ({"KUBERNETES_SERVICE_HOST": "1.1.1.1", "JOB_COMPLETION_INDEX": "1"}, {}),
        ({"KUBERNETES_SERVICE_HOST": "1.1.1.1"}, None),  # a pod of its own
    ],
)
def test_where_initialize_finds_the_processes(monkeypatch, environment, found):
    alone = not any(name.startswith(("SLURM_", "OMPI_", "KUBERNETES_")) for name in os.environ)
    for name in [*LAUNCHED, *SLURM, *OPEN_MPI, "OMPI_MCA_orte_hnp_uri", "JOB_COMPLETION_INDEX"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launch._find_processes() == found
    if found is None and alone:
        assert launch.initialize() is False


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, r"got none of \['JAX_COORDINATOR_ADDRESS', 'JAX_PROCESS_ID'\]"),
        (OPEN_MPI, r"-x JAX_COORDINATOR_ADDRESS=HOST:PORT"),
    ],
)
def test_half_an_environment_is_an_error(monkeypatch, environment, message):
    for name in [*LAUNCHED, *SLURM]:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        launch.initialize()


def test_uncaught_exception_ends_a_launched_process_at_once(program):
    """Process 1 waits for process 0 in a barrier; JAX's own end of process 0 would wait for process 1."""
    file = program("""
        import jax
        from jax.experimental import multihost_utils
        from jax_wideep import launch

        assert launch.initialize()
        assert (jax.process_count(), jax.process_index(), jax.device_count()) == (2, number, 2)
        if number == 0:
            raise ValueError("the reason")
        multihost_utils.sync_global_devices("never")
    """)
    done = run("--processes", 2, "--devices-per-process", 1, file)
    assert done.returncode == 1
    report = done.stderr[done.stderr.index("first failure") :]
    assert report.startswith("first failure: process 0 of 2 ended with status 1.")
    assert report.endswith("[0] ValueError: the reason\n")
