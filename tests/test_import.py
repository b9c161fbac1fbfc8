"""`import jax_wideep` is cheap, starts nothing, and shows the public names."""

import json
import subprocess
import sys
import textwrap

import pytest

import jax_wideep as wep

PUBLIC = """
    ExpertGroup make_plan dispatch combine grouped_matmul moe_ffn DispatchPlan MoEStats Received
    ll_dispatch ll_dispatch_send ll_dispatch_recv ll_combine ll_combine_send ll_combine_recv
    routing RouterConfig CHECKPOINT_NAMES ClampedSwiGLU use_cpu_devices flax families
"""


def in_new_process(code):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_import_adds_little_and_starts_no_backend():
    new, seconds, started, again = in_new_process("""
        import json, sys, time
        import jax
        from jax._src import xla_bridge

        before = set(sys.modules)
        start = time.process_time()
        import jax_wideep
        seconds = time.process_time() - start
        new = sorted({name.split(".")[0] for name in set(sys.modules) - before})
        started = xla_bridge.backends_are_initialized()
        jax_wideep.use_cpu_devices(3)  # possible only before a backend starts
        print(json.dumps([new, seconds, started, jax.device_count("cpu")]))
    """)
    assert set(new) <= {"jax", "jax_wideep", "jaxtyping", "numpy"}  # neither Flax nor the compiled modules
    assert not started and again == 3
    assert seconds < 0.3  # of this process alone, not of the machine's other work; about 0.1 in practice


def test_flax_is_imported_on_first_use():
    before, after = in_new_process("""
        import json, sys
        import jax_wideep

        jax_wideep.families.PUBLISHED, jax_wideep.families.Checkpoint
        before = bool({"flax", "safetensors", "torch", "tqdm"} & set(sys.modules))
        jax_wideep.flax.MoE, jax_wideep.flax.linen.MoE
        print(json.dumps([before, "flax" in sys.modules]))
    """)
    assert (before, after) == (False, True)


def test_public_names():
    for name in PUBLIC.split():
        assert hasattr(wep, name), name
    with pytest.raises(AttributeError, match="module 'jax_wideep' has no attribute 'dispach'"):
        _ = wep.dispach
