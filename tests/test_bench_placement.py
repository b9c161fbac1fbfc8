"""The benchmarks `placement` and `trace` on small sizes, and what they work out."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_wideep.bench import measure, trace
from jax_wideep.bench.__main__ import main


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    # The suite has more devices than the benchmark would make.
    monkeypatch.setattr(measure, "use_cpu_devices", lambda num_devices: None)

    def run(*arguments):
        lines = tmp_path / "out.jsonl"
        sizes = [
            "--devices",
            "4",
            "--tokens",
            "16",
            "--hidden",
            "32",
            "--experts",
            "16",
            "--top-k",
            "2",
            "--ffn",
            "16",
        ]
        main([*map(str, arguments), *sizes, "--json", str(lines)])
        records = [json.loads(line) for line in lines.read_text().splitlines()]
        for record in records:
            assert all(math.isfinite(value) for value in record.values() if isinstance(value, (int, float)))
        return records, capsys.readouterr().out

    return run


def test_placement(run):
    records, printed = run("placement", "--repeats", 2)
    assert [(record["implementation"], record["op"]) for record in records] == [
        ("as they lie", "exchange"), ("as they lie", "layer"),
        ("placed", "exchange"), ("placed", "layer"), ("placed", "choosing replicas"), ("placed", "moving experts"),
    ]  # fmt: skip
    assert {record["redundant"] for record in records} == {4}
    without, placed = records[0], records[2]
    assert 1 <= placed["imbalance"] < without["imbalance"] <= 4  # of 4 ranks
    assert placed["imbalance"] <= placed["worst_imbalance"]
    assert "4 redundant experts" in printed


def test_trace_names_the_phases(run, tmp_path):
    records, printed = run("trace", "--steps", 2, "--trace", tmp_path / "trace")
    phases = {record["phase"]: record["ms"] for record in records}
    for phase in ("plan", "dispatch", "experts", "combine", "route"):
        assert phases[f"wideep_{phase}"] > 0
        assert phase == "plan" or phases[f"wideep_{phase}, backward"] > 0
    assert list((tmp_path / "trace").rglob("*.xplane.pb")) and list(
        (tmp_path / "trace").rglob("*.trace.json.gz")
    )
    assert "The longest operations" in printed


def test_scopes_of_a_program():
    @jax.jit
    def loss(x):
        with jax.named_scope("wideep_here"), jax.named_scope("wideep_inner"):
            y = jnp.sin(x @ x)
        return jnp.sum(y @ y)

    text = jax.jit(jax.grad(loss)).lower(np.ones((64, 64), np.float32)).compile().as_text()
    assert {"wideep_here", "wideep_here, backward"} == set(trace.scopes_of(text).values())


PROGRAM = """HloModule m

%body (p: f32[2]) -> f32[2] {
  %p = f32[2] parameter(0)
  %a = f32[2] add(%p, %p), metadata={op_name="jit(f)/wideep_plan/while/body/add"}
  ROOT %copied = f32[2] copy(%a)
}

%fused (q: f32[2]) -> f32[2] {
  ROOT %s = f32[2] sine(%q), metadata={op_name="jit(f)/transpose(jvp(wideep_combine))/sin"}
}

ENTRY %main (x: f32[2]) -> f32[2] {
  %x = f32[2] parameter(0)
  %loop = f32[2] while(%x), condition=%cond, body=%body
  %fusion = f32[2] fusion(%loop), kind=kLoop, calls=%fused
  ROOT %last = f32[2] copy(%fusion)
}
"""


def test_operations_without_a_name_count_for_what_they_call_or_stand_beside():
    assert trace.scopes_of(PROGRAM) == {
        "a": "wideep_plan",
        "p": "wideep_plan",
        "copied": "wideep_plan",
        "s": "wideep_combine, backward",
        "loop": "wideep_plan",
        "fusion": "wideep_combine, backward",
    }


def test_own_times_by_hand():
    events = [(0, 10, "outer"), (2, 3, "inner"), (5, 5, "second"), (6, 1, "deepest"), (20, 4, "later")]
    assert sorted(trace._own_times(events)) == [
        ("deepest", 1), ("inner", 3), ("later", 4), ("outer", 2), ("second", 4),
    ]  # fmt: skip
