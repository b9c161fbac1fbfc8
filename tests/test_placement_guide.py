"""The code of docs/placement.md, as one program, in a process that has no device yet."""

import pathlib
import re
import subprocess
import sys

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "placement.md"


def test_the_guide_runs(tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    program = tmp_path / "guide.py"
    program.write_text("\n".join(blocks))
    run = subprocess.run(
        [sys.executable, program], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr
    replicas, first, same, last = run.stdout.splitlines()
    assert re.fullmatch(r"replicas \[[\d ]+\] sum 40", replicas)
    before, after = map(
        float, re.fullmatch(r"most over mean: ([\d.]+) as they lie, ([\d.]+) placed", first).groups()
    )
    assert after < 1.1 < 2 < before
    assert same == "outputs differ by less than 1e-5"
    assert float(last.split()[-1]) < 1.5
