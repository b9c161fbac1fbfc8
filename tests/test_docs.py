"""The documentation runs and its links lead somewhere."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def code_blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def run_python(page, num_blocks, folder):
    """Runs all Python of a page as one program, in a process that has no device yet; returns the lines it prints."""
    blocks = code_blocks(ROOT / page, "python")
    assert len(blocks) == num_blocks
    program = folder / "program.py"
    program.write_text("\n".join(blocks))
    run = subprocess.run(
        [sys.executable, program], cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_readme(tmp_path):
    loss, shape = run_python("README.md", 2, tmp_path)
    assert re.fullmatch(r"loss \d\.\d{3}, gradients of wi \(32, 256, 1024\)", loss)
    assert shape == "(1024, 256)"


def test_families(tmp_path):
    # 1 + 16 * 3 tensors of float32
    stored = 4 * (64 * 16 + 16 * 3 * 64 * 32)
    assert run_python("docs/families.md", 3, tmp_path) == ["16 (8, 5, 64)", f"49 True {stored}", "True"]


def test_placement(tmp_path):
    replicas, first, same, last = run_python("docs/placement.md", 3, tmp_path)
    assert re.fullmatch(r"replicas \[[\d ]+\] sum 40", replicas)
    before, after = map(
        float, re.fullmatch(r"most over mean: ([\d.]+) as they lie, ([\d.]+) placed", first).groups()
    )
    assert after < 1.1 < 2 < before
    assert same == "outputs differ by less than 1e-5"
    assert float(last.split()[-1]) < 1.5


def test_memory(tmp_path):
    spilled, layer, *options = run_python("docs/memory.md", 3, tmp_path)
    first, *others = map(int, re.search(r"\[([\d ]+)\]", spilled)[1].split())
    assert first >= 8 * 32 - 96 and max(others) < first  # the rank of the hot expert
    assert spilled.endswith("dropped 0 same True")
    assert layer == "layer (8, 32, 64) dropped 0"
    assert len(options) == 4 and all(line.endswith(" True") for line in options), options


def headings(page):
    """The anchors of a page's headings, as they are written in links."""
    for heading in re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name} links to {target}, which is not there"
        if anchor:
            assert anchor in set(headings(linked)), f"{page.name} links to {target}: no such heading"
