"""The benchmarks run end to end on small sizes; their arithmetic is checked against values worked out by hand."""

import json
import math

import jax
import numpy as np
import pytest

from jax_wideep.bench import baselines, decode, draws, exchange, layer, measure, report
from jax_wideep.bench.__main__ import main
from jax_wideep.bench.settings import Draws, ExchangeSettings

SMALL = [
    "--devices",
    "4",
    "--tokens",
    "8",
    "--hidden",
    "32",
    "--experts",
    "8",
    "--top-k",
    "2",
    "--repeats",
    "2",
]
SETTINGS = ExchangeSettings(tokens=8, hidden=32, experts=8, top_k=2, repeats=2)


@pytest.fixture
def four_devices(monkeypatch):
    # The suite has more devices than the benchmark would make.
    monkeypatch.setattr(measure, "use_cpu_devices", lambda num_devices: None)


def _run(tmp_path, capsys, *arguments):
    lines, plot = tmp_path / "out.jsonl", tmp_path / "out.png"
    main([*arguments, "--json", str(lines), "--plot", str(plot)])
    assert plot.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    for record in records:
        assert {
            "date",
            "jax",
            "device_kind",
            "ranks",
            "backend",
            "hidden",
            "experts",
            "top_k",
            "dtype",
        } <= set(record)
        assert record["jax"] == jax.__version__ and record["ranks"] == 4
        assert all(math.isfinite(value) for value in record.values() if isinstance(value, (int, float)))
    return records, capsys.readouterr().out


@pytest.mark.parametrize("backend", ["cpu", "xla"])
def test_exchange(four_devices, tmp_path, capsys, backend):
    records, shown = _run(tmp_path, capsys, "exchange", *SMALL, "--backend", backend, "--routing", "uniform")
    timed = {(record["implementation"], record["op"]) for record in records}
    both = {exchange.ALL, "forward + backward"}
    ops = both | {
        "plan",
        "dispatch",
        "combine",
        "dispatch + combine",
        "dispatch backward",
        "combine backward",
    }
    theirs = {"padded all_to_all", "padded all_to_all, pad known", "ring"}
    want = {("jax_wideep", op) for op in ops} | {(name, op) for name in theirs for op in both}
    assert timed == want | {("bare copy", "dispatch + combine")}
    assert {record["backend"] for record in records} == {backend}
    assert "ragged_all_to_all: XLA:CPU has no ragged_all_to_all" in shown
    for record in records:
        assert record["median_ms"] > 0
        if record["op"] == exchange.ALL:
            assert (
                record["logical_bytes"] == 2 * 4 * 8 * 2 * 32 * 2
            )  # there and back: ranks, tokens, k, hidden, bf16


def test_layer(four_devices, tmp_path, capsys):
    records, _ = _run(
        tmp_path, capsys, "layer", *SMALL, "--ffn", "8", "--routing", "hot", "--dtype", "float32"
    )
    assert len(records) == 8
    assert {record["op"] for record in records} == {"forward", "forward + backward"}
    assert all(record["tokens_per_s"] > 0 and record["ffn"] == 8 for record in records)


def test_decode(four_devices, tmp_path, capsys):
    sizes = [
        "--hidden",
        "128",
        "--heads",
        "2",
        "--ffn",
        "16",
        "--experts",
        "8",
        "--top-k",
        "2",
        "--vocab",
        "32",
    ]
    run = ["--batch", "1", "3", "--prompt", "4", "--steps", "5", "--layers", "2", "--repeats", "2"]
    records, shown = _run(tmp_path, capsys, "decode", "--devices", "4", *sizes, *run)
    assert [record["batch"] for record in records] == [1, 3]
    for record in records:
        assert 0 < record["step_p50_ms"] <= record["step_p90_ms"] <= record["step_p99_ms"]
        assert all(record[f"{part}_ms"] > 0 for part in decode.PARTS)
        assert record["prefill_tokens_per_s"] > 0
    assert "tokens/s" in shown


def test_json_lines_to_stdout_by_default(capsys, four_devices):
    main(["exchange", *SMALL, "--no-baselines"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert len([json.loads(line) for line in lines]) == 9  # 8 ops and the bare copy


# ---- arithmetic ----


def test_percentiles_by_hand():
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert [measure.percentile(values, p) for p in (1, 20, 21, 50, 90, 99, 100)] == [1, 1, 2, 3, 5, 5, 5]
    assert measure.percentile(list(range(1, 101)), 99) == 99
    assert measure.percentile(list(range(1, 101)), 90) == 90
    assert measure.median([4.0, 1.0, 2.0, 3.0]) == 2.5


def test_latencies_by_hand():
    measured = decode.latencies([0.1, 0.2, 0.3, 0.4], sequences=8)
    assert measured == pytest.approx(
        {"tokens_per_s": 32.0, "step_p50_ms": 200.0, "step_p90_ms": 400.0, "step_p99_ms": 400.0}
    )


def test_bytes_by_hand():
    # Rows of 64 bytes; 4 ranks, 8 tokens each, 16 selections each.
    assert SETTINGS.row_bytes == 64
    assert exchange.job_bytes(SETTINGS, 4) == 2 * (32 + 64) * 64

    def wire(name, pad=0):
        return exchange.wire_bytes(name, SETTINGS, 4, rows_that_cross=50, pad=pad)

    assert wire("jax_wideep") == wire("ragged_all_to_all") == {"dispatch": 3200, "combine": 3200}
    # 12 pairs of different ranks exchange blocks of 16 rows each way.
    assert wire("padded all_to_all, pad known", pad=16) == {"dispatch": 12288, "combine": 12288}
    # 8 tokens to 3 others from each of 4 ranks; home as float32 sums.
    assert wire("ring") == {"dispatch": 12 * 8 * 64, "combine": 12 * 8 * 128}


def test_flops_by_hand():
    settings = layer.LayerSettings(hidden=32, ffn=8)
    # One row: gate and up are 32 x 8 each, down 8 x 32; a multiply-add is two operations.
    assert layer.layer_flops(settings, rows=1) == 2 * (32 * 8 + 32 * 8 + 8 * 32)


def test_what_crosses_by_hand():
    # Two ranks of two experts; rank 0's tokens choose (0, 1) and (2, 3), rank 1's (0, 2) and (2, 3).
    topk_idx = np.array([[0, 1], [2, 3], [0, 2], [2, 3]], np.int32)
    np.testing.assert_array_equal(draws.rows_per_pair(topk_idx, 2, 4), [[2, 2], [1, 3]])
    np.testing.assert_array_equal(draws.rows_per_rank(topk_idx, 2, 4), [3, 5])


# ---- draws ----


@pytest.mark.parametrize("kind", ["uniform", "zipf", "hot"])
def test_draws_are_distinct_experts(kind):
    idx = draws.draw_topk_idx(np.random.default_rng(0), draws.Routing(kind), 500, 16, 4)
    assert idx.dtype == np.int32 and idx.min() >= 0 and idx.max() < 16
    assert all(len(set(row)) == 4 for row in idx)
    if kind == "hot":
        assert np.all(idx[:, 0] == 0)


def test_draws_follow_the_law():
    rng = np.random.default_rng(0)
    tokens, experts = 200_000, 8
    first = draws.draw_topk_idx(rng, draws.Routing("zipf", 1.2), tokens, experts, 1)
    want = np.arange(1, experts + 1.0) ** -1.2
    want /= want.sum()
    got = np.bincount(first[:, 0], minlength=experts) / tokens
    np.testing.assert_allclose(got, want, atol=5 / math.sqrt(tokens))
    even = draws.draw_topk_idx(rng, draws.Routing("uniform"), tokens, experts, 1)
    got = np.bincount(even[:, 0], minlength=experts) / tokens
    np.testing.assert_allclose(got, 1 / experts, atol=5 / math.sqrt(tokens))


def test_weights_sum_to_one():
    weights = draws.draw_weights(np.random.default_rng(0), 100, 4)
    assert weights.dtype == np.float32 and weights.min() > 0
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-6)


def test_capacity(four_devices):
    mesh = measure.make_mesh(4, "cpu")
    for wanted, check in (("worst", 64), ("fit", 256), ("100", 100)):
        assert Draws(ExchangeSettings(**_sizes(), capacity=wanted), mesh).capacity() == check
    for wanted in ("3", "half"):
        with pytest.raises(
            ValueError, match=r"bench: capacity: expected 'fit', 'worst' or at least \d+ rows"
        ):
            Draws(ExchangeSettings(**_sizes(), capacity=wanted), mesh).capacity()


def _sizes():
    return {"tokens": 8, "hidden": 32, "experts": 8, "top_k": 2, "repeats": 2}


def test_every_repeat_draws_anew(four_devices):
    mesh = measure.make_mesh(4, "cpu")
    made = Draws(SETTINGS, mesh)
    assert not np.array_equal(made.topk_idx[0], made.topk_idx[1])
    first, second = np.asarray(made.tokens(), np.float32), np.asarray(made.tokens(), np.float32)
    assert not np.array_equal(first, second) and np.all(np.abs(first).max(axis=1) > 0)


# ---- measuring ----


def test_candidates_take_turns_and_failures_are_told():
    calls = []

    def candidate(name):
        return measure.Candidate(lambda x: calls.append(name) or x)

    def refuse(x):
        raise NotImplementedError("no such collective\nand more")

    candidates = {"a": candidate("a"), "b": candidate("b"), "c": measure.Candidate(refuse)}
    inputs = []
    measured, failed = measure.time_interleaved(
        candidates, lambda repeat: (inputs.append(repeat) or repeat,), repeats=3, warmup=1
    )
    assert inputs == [0, 1, 2, 3]
    assert failed == {"c": "no such collective"} and set(measured) == {"a", "b"}
    assert calls.count("a") == calls.count("b") == 4 and calls[2:4] != calls[4:6]
    assert all(len(times.wall) == len(times.cpu) == 3 for times in measured.values())


def test_too_many_devices(four_devices):
    with pytest.raises(ValueError, match="bench: devices: expected at most 16 cpu devices, got 99"):
        measure.make_mesh(99, "cpu")


def test_ragged_is_there_off_cpu():
    assert baselines.BASELINES["ragged_all_to_all"].missing_on.keys() == {"cpu"}


def test_table_shows_every_cell(capsys):
    report.print_table(
        "title", ["what", "ms", "n"], [["first", 1234.5, None], ["second", 0.01234, 7]], ["a note"]
    )
    shown = capsys.readouterr().out
    for text in ("title", "what", "ms", "first", "1,234", "–", "0.0123", "7", "a note"):
        assert text in shown
