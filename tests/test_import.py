"""What `import jax_wideep` does, and what it leaves alone."""

import subprocess
import sys

import jax_wideep as wep


def in_fresh_python(program, tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_import_starts_no_backend(tmp_path):
    program = "import jax_wideep as wep; print(wep.group._ffi.backend_started())"
    assert in_fresh_python(program, tmp_path) == "False"


def test_import_leaves_flax_and_the_compiled_modules_for_later(tmp_path):
    program = (
        "import sys, jax_wideep\n"
        "late = ('flax', 'jax_wideep.flax', 'jax_wideep._wideep_cpu', 'jax_wideep._wideep_cuda')\n"
        "print([name for name in late if name in sys.modules])"
    )
    assert in_fresh_python(program, tmp_path) == "[]"


def test_every_public_name_is_there():
    for name in [*wep.__all__, "flax"]:
        assert getattr(wep, name) is not None, name
    public = {name for name in vars(wep) if not name.startswith("_")}
    modules = {name for name in public if type(getattr(wep, name)).__name__ == "module"}
    assert public - modules - {"Any"} <= set(wep.__all__)
