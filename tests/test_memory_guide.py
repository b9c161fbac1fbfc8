"""The code of docs/memory.md, as one program, in a process that has no device yet."""

import pathlib
import re
import subprocess
import sys

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "memory.md"


def test_the_guide_runs(tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    program = tmp_path / "guide.py"
    program.write_text("\n".join(blocks))
    run = subprocess.run(
        [sys.executable, program], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr
    spilled, layer, *options = run.stdout.splitlines()
    first, *others = map(int, re.search(r"\[([\d ]+)\]", spilled)[1].split())
    assert first >= 8 * 32 - 96 and max(others) < first  # the rank of the hot expert
    assert spilled.endswith("dropped 0 same True")
    assert layer == "layer (8, 32, 64) dropped 0"
    assert len(options) == 4 and all(line.endswith(" True") for line in options), options
