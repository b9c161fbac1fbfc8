"""The examples run as programs, with small settings, in processes of their own."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
TIMEOUT_S = 300
SMALL = ["--batch", "8", "--seq", "32", "--layers", "1", "--ffn", "32"]


def start(program, *arguments):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1", "COLUMNS": "120"}
    env.pop("NPROC", None)  # the program's own business
    return subprocess.Popen(
        [sys.executable, EXAMPLES / program, *map(str, arguments)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(program, *arguments):
    process = start(program, *arguments)
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, output
    return output


@pytest.fixture
def text_folder(tmp_path):
    """Sixty files of one sentence each, over and over, with a number of the file's own."""
    folder = tmp_path / "text"
    (folder / "deeper").mkdir(parents=True)
    for i in range(60):
        path = folder / ("deeper" if i % 2 else "") / f"file{i}.txt"
        path.write_text(f"the quick brown fox {i:02d} jumps over the lazy dog. " * 100)
    return folder


@pytest.fixture
def lm(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import lm.text

    return lm


# ---- programs ----


def test_drop_in():
    output = run("drop_in.py", "--steps", 12, "--batch", 8, "--seq", 32, "--layers", 1, "--ffn", 32)
    for name in ("ragged_dot", "jax_wideep"):
        first, last = map(float, re.search(rf"{name} +loss ([\d.]+) -> ([\d.]+)", output).groups())
        assert last < first - 0.5, output
    assert float(re.search(r"differ by .* by (\S+) at most", output)[1]) < 1e-3, output


def test_train_interrupt_go_on_and_decode(tmp_path, text_folder):
    folder = tmp_path / "run"
    options = [*SMALL, "--data", text_folder, "--pattern", "*.txt", "--run", folder]
    process = start("train_lm.py", *options, "--steps", 100_000)
    output = ""
    for line in process.stdout:
        output += line
        if line.startswith("step 25/"):
            process.send_signal(signal.SIGINT)
    process.wait(TIMEOUT_S)
    assert process.returncode == 130, output
    stopped = int(re.search(r"Stopped by a signal after step (\d+) of 100000", output)[1])
    assert 25 <= stopped < 1000 and str(folder) in output

    output = run("train_lm.py", *options, "--steps", stopped + 30)
    assert f"Going on from step {stopped}" in output
    first, last = map(float, re.search(r"Held-out loss ([\d.]+) -> .*?([\d.]+) nats", output).groups())
    assert abs(first - np.log(256)) < 0.2 and last < 4, output

    output = run("train_lm.py", *options, "--steps", stopped + 30)
    assert f"All {stopped + 30} steps are done already" in output

    output = run(
        "decode.py",
        *("--checkpoint", folder / "checkpoint"),
        *("--data", text_folder, "--pattern", "*.txt", "--new-tokens", 4),
    )
    assert "1 layers, hidden 128, 16 experts of inner size 32" in output  # the checkpoint's sizes
    assert re.search(
        r"8 sequences x 3 steps: latency per token p50 [\d.]+ ms, p90 .* p99 .* tokens/s", output
    )


def test_checkpoint_of_other_settings_is_an_error(tmp_path, text_folder):
    options = ["--data", text_folder, "--pattern", "*.txt", "--run", tmp_path / "run"]
    run("train_lm.py", *SMALL, *options, "--steps", 1)
    process = start("train_lm.py", *SMALL, *options, "--steps", 2, "--top-k", 4)
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1
    assert "checkpoint: expected one with" in output and "--fresh" in output
    output = run("train_lm.py", *SMALL, *options, "--steps", 2, "--top-k", 4, "--fresh")
    assert "Going on" not in output and "step 2/2" in output


def test_experts_are_placed_while_training_and_before_decoding(tmp_path, text_folder):
    folder, text = tmp_path / "run", ["--data", text_folder, "--pattern", "*.txt"]
    placed = ["--redundant-experts", 8, "--replace-every", 4]
    run("train_lm.py", *SMALL, *text, *placed, "--run", folder, "--steps", 6)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line.get("replaced")] == [4]
    rows = {line["step"]: line["layers"][0]["rows_per_rank"] for line in lines if "layers" in line}
    assert all(len(of_ranks) == 8 and sum(of_ranks) == 8 * 32 * 2 for of_ranks in rows.values())
    output = run("decode.py", "--checkpoint", folder / "checkpoint", *text, "--place", "--new-tokens", 2)
    before, after = map(float, re.search(r"worst layer: ([\d.]+) before, ([\d.]+) after", output).groups())
    assert after <= before and after < 1.5


def test_decode_with_random_weights(text_folder):
    options = ["--data", text_folder, "--pattern", "*.txt", "--layers", 1, "--devices", 4]
    output = run("decode.py", *options, "--batch", 6, "--new-tokens", 4, "--quantize", "none")
    assert "4 cpu devices, 4 experts of every layer on each" in output
    assert "prefill  768 tokens" in output and "6 sequences x 3 steps" in output


@pytest.mark.parametrize("wire", ["fp8", "none"])
def test_overlapped_decode_gives_the_same(wire):
    output = run("decode_overlap.py", "--devices", 4, "--layers", 2, "--steps", 3, "--quantize", wire)
    assert "4 x cpu, backend cpu: 16 tokens a rank, 2 layers" in output
    for name in ("plain", "in_halves", "overlapped"):
        assert re.search(rf"^{name} +[\d.]+ ms a step", output, re.MULTILINE), output
    assert float(re.search(r"differ by at most (\S+) of the largest", output)[1]) < 1e-5


def test_demo(tmp_path):
    output = run("demo.py", *SMALL, "--steps", 20, "--new-tokens", 8, "--run", tmp_path / "out")
    for row in ("attention", "routing", "exchange", "experts", "rest", "step", "padded all_to_all", "ring"):
        assert re.search(rf"^│ {row}\b.* [\d.]+ ", output, re.MULTILINE), (row, output)
    first, last = map(float, re.search(r"Held-out loss ([\d.]+) -> .*?([\d.]+) nats", output).groups())
    assert last < first - 0.5
    for name in ("loss.png", "expert_load.png", "route.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    report = (tmp_path / "out" / "report.html").read_text()
    assert '"name":"jax_wideep: plan, dispatch, combine","ms":' in report


# ---- text ----


def test_files_are_held_out_whole(lm, text_folder):
    corpus = lm.text.read_corpus(text_folder, "*.txt")
    parts = [part.read(0, part.size).tobytes() for part in (corpus.train, corpus.held_out)]
    numbers = [set(re.findall(rb"fox (\d\d)", part)) for part in parts]
    assert not numbers[0] & numbers[1]
    assert len(numbers[0]) + len(numbers[1]) == 60 and len(numbers[1]) >= 2


def test_batches_depend_on_step_and_seed_only(lm, text_folder):
    corpus = lm.text.read_corpus(text_folder, "*.txt")
    batch = corpus.train_batch(3, 0, 4, 20)[:]
    assert batch.shape == (4, 20) and batch.dtype == np.int32
    np.testing.assert_array_equal(batch, corpus.train_batch(3, 0, 4, 20))
    for step, seed in ((4, 0), (3, 1)):
        assert np.any(batch != corpus.train_batch(step, seed, 4, 20))
    assert lm.text.as_text(batch[0]).encode() in corpus.train.read(0, corpus.train.size).tobytes()


def test_only_the_rows_asked_for_are_read(lm, text_folder, monkeypatch):
    corpus = lm.text.read_corpus(text_folder, "*.txt")
    windows = corpus.train_batch(0, 0, 8, 20)
    whole, read = windows[:], []
    monkeypatch.setattr(lm.text.Text, "read", lambda self, start, length: read.append(start) or [0] * length)
    part = windows[2:4, :5]
    assert part.shape == (2, 5) and len(read) == 2
    monkeypatch.undo()
    np.testing.assert_array_equal(windows[2:4, :5], whole[2:4, :5])


def test_windows_run_over_the_ends_of_files(lm, tmp_path):
    paths = [tmp_path / name for name in "abc"]
    for path, text in zip(paths, (b"one", b"", b"three"), strict=True):
        path.write_bytes(text)
    joined = b"one\n\nthree"
    text = lm.text.Text(paths)
    assert text.size == len(joined)
    for start in range(text.size):
        for length in range(text.size - start + 1):
            assert text.read(start, length).tobytes() == joined[start : start + length]


def test_too_little_text_is_an_error(lm, tmp_path):
    (tmp_path / "short.py").write_text("pass")
    with pytest.raises(ValueError, match=r"expected files .* at least 10,000 bytes to train on, got 4 bytes"):
        lm.text.read_corpus(tmp_path)
