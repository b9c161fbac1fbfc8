"""docs/training.md and the files for clusters: what they say can be run as it stands."""

import os
import pathlib
import re
import shlex
import subprocess
import sys
import textwrap

import pytest
import tyro
import yaml

from jax_wideep import launch

ROOT = pathlib.Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "training.md").read_text()
SBATCH = ROOT / "examples" / "cluster" / "train_lm.sbatch"
MANIFEST = ROOT / "examples" / "cluster" / "train_lm.yaml"
TIMEOUT_S = 120


def code(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def environment(**more):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return kept | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"} | more


def finish(processes):
    outputs = [process.communicate(timeout=TIMEOUT_S)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return outputs


def start(*command, **env):
    return subprocess.Popen(
        [*map(str, command)],
        env=environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def train_lm(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    import train_lm

    return train_lm


def commands():
    page = [shlex.split(line, comments=True) for block in code("sh") for line in block.splitlines()]
    script = SBATCH.read_text().replace("\\\n", " ")
    srun = [shlex.split(line) for line in script.splitlines() if line.startswith("srun ")]
    container = next(yaml.safe_load_all(MANIFEST.read_text().split("---")[1]))["spec"]["template"]["spec"]
    (container,) = container["containers"]
    return [*page, *srun, container["command"] + container["args"]]


def test_commands_have_options_that_exist(train_lm):
    known = commands()
    assert len(known) == 6
    for words in known:
        if "jax_wideep.launch" in words:
            options = launch.make_parser().parse_args(words[words.index("jax_wideep.launch") + 1 :])
            words = [options.program, *options.arguments]
        program = words.index("examples/train_lm.py")
        arguments = [word for word in words[program + 1 :] if word != "$@"]
        assert tyro.cli(train_lm.Options, args=arguments).run is not None, words


def test_python_of_the_page_runs_alone_and_launched(tmp_path):
    program = tmp_path / "program.py"
    program.write_text("\n".join(code("python")))
    (output,) = finish([start(sys.executable, program)])
    assert output == "process 0 of 1, 1 devices in all\n"
    launcher = [sys.executable, "-m", "jax_wideep.launch", "--processes", 2, "--devices-per-process", 3]
    (output,) = finish([start(*launcher, program)])
    assert sorted(line for line in output.splitlines() if "process" in line) == [
        f"[{number}] process {number} of 2, 6 devices in all" for number in range(2)
    ]


@pytest.mark.parametrize("version", [4, 5])
def test_processes_of_open_mpi_find_each_other(tmp_path, version):
    """With the variables that `mpirun` would set, for two processes on this host."""
    program = tmp_path / "program.py"
    program.write_text("\n".join(code("python")))
    port = int(launch.free_address().split(":")[1])

    def variables(number):
        ranks = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": str(number)}
        if version == 5:
            return ranks | {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}"}
        uri = {"OMPI_MCA_orte_hnp_uri": f"{port << 12}.0;tcp://127.0.0.1:1"}
        return ranks | uri | {"OMPI_COMM_WORLD_LOCAL_RANK": str(number)}

    outputs = finish([start(sys.executable, program, **variables(number)) for number in range(2)])
    for number, output in enumerate(outputs):
        assert f"process {number} of 2, 2 devices in all\n" in output


def test_sbatch_file_starts_the_program_through_srun(tmp_path):
    """Run by bash, with a `srun` that shows how it was called."""
    fake = tmp_path / "srun"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    (output,) = finish([start("bash", SBATCH, "--fresh", PATH=path, RUN="/a run")])
    words = output.splitlines()
    assert "--kill-on-bad-exit=1" in words and words[-3:] == ["--run", "/a run", "--fresh"]
    assert (ROOT / words[words.index("python") + 1]).exists()
    settings = re.findall(r"^#SBATCH --([\w-]+)", SBATCH.read_text(), re.MULTILINE)
    assert len(settings) == len(set(settings))


def test_manifest_is_consistent():
    service, job = yaml.safe_load_all(MANIFEST.read_text())
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    name = job["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": name}  # Kubernetes gives the pods this label
    assert service["spec"]["clusterIP"] == "None"
    spec = job["spec"]
    pod = spec["template"]["spec"]
    assert spec["completionMode"] == "Indexed" and pod["subdomain"] == service["metadata"]["name"]
    (container,) = pod["containers"]
    env = {entry["name"]: entry for entry in container["env"]}
    assert env["JAX_COORDINATOR_ADDRESS"]["value"].startswith(f"{name}-0.{pod['subdomain']}:")
    assert env["JAX_NUM_PROCESSES"]["value"] == str(spec["completions"]) == str(spec["parallelism"])
    index = env["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert index == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes


def test_explicit_variables_start_a_program_by_hand(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent("\n".join(code("python"))))
    address = launch.free_address()
    names = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}
    (output,) = finish([start(sys.executable, program, **names)])
    assert output == "process 0 of 1, 1 devices in all\n"
