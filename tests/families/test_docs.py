"""The code of docs/families.md runs, as one program, and prints what it should."""

import pathlib
import re
import subprocess
import sys

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "families.md"


def test_code_runs(tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    program = tmp_path / "families.py"
    program.write_text("\n".join(blocks))
    done = subprocess.run(
        [sys.executable, program], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    # 1 + 16 * 3 tensors of float32
    stored = 4 * (64 * 16 + 16 * 3 * 64 * 32)
    assert done.stdout.splitlines() == ["16 (8, 5, 64)", f"49 True {stored}", "True"]
