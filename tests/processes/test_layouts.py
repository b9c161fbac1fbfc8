"""The same eight ranks as 1, 2, 4 and 8 processes: equal bits."""

import functools

import jax
import jax.numpy as jnp
import jobs
import numpy as np
import oracle
import pytest
import suite


@functools.cache
def one_process():
    """Results of eight devices of this process."""
    mesh = jax.make_mesh(
        (suite.RANKS,),
        ("expert",),
        axis_types=(jax.sharding.AxisType.Auto,),
        devices=jax.devices()[: suite.RANKS],
    )
    return {name: suite.shards(array) for name, array in suite.run(mesh).items()}


def whole(name):
    return np.concatenate([part for _, part in sorted(one_process()[name].items())])


def test_one_process():
    """What the others are compared with, against the oracle."""
    for seed, (dtype, capacity) in enumerate([("float32", None), ("bfloat16", suite.CAPACITY)]):
        arrays = suite.draw(seed, jnp.dtype(dtype))
        worst = suite.RANKS * suite.TOKENS * suite.TOP_K
        plan = oracle.make_plan(arrays["topk_idx"], suite.EXPERTS, capacity or worst)
        assert capacity is None or plan.overflow.sum() > 0
        rows, row_weights = oracle.dispatch(arrays["x"], arrays["weights"], plan)
        for name in ("group_sizes", "overflow", "dest_row", "row_source"):
            want = getattr(plan, name)
            np.testing.assert_array_equal(whole(f"throughput {name} {dtype}").reshape(want.shape), want, name)
        np.testing.assert_array_equal(whole(f"throughput rows {dtype}").reshape(rows.shape), rows)
        y = np.tanh(rows.astype(np.float32)).astype(rows.dtype)
        tolerance = 1e-5 if dtype == "float32" else 3e-2
        for shape in ("throughput", "exact"):
            if shape == "exact" and capacity is not None:
                continue  # it drops nothing
            out = whole(f"{shape} out {dtype}").astype(np.float64)
            want = oracle.combine(y, row_weights, plan).reshape(out.shape)
            np.testing.assert_allclose(out, want, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize(
    "devices", [(4, 4), (2, 2, 2, 2), (1,) * 8, (3, 5)], ids=lambda each: f"{len(each)}x{each[0]}"
)
def test_layout(devices, tmp_path):
    def environment(process):
        # As many threads everywhere, as the group asks for.
        return {"WIDEEP_DEVICES": str(devices[process]), "NPROC": str(2 * max(devices))}

    jobs.run(tmp_path, len(devices), 0, "suite.py", environment=environment)
    want = one_process()
    seen = {name: set() for name in want}
    for process in range(len(devices)):
        with np.load(tmp_path / f"results{process}.npz") as held:
            for key, got in held.items():
                name, start = key.rsplit("|", 1)
                expected = want[name][int(start)]
                seen[name].add(int(start))
                if name.startswith("layer"):
                    # JAX's collectives add in another order across processes.
                    scale = np.abs(expected).max()
                    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * scale, err_msg=key)
                else:
                    np.testing.assert_array_equal(
                        got, expected.view(np.uint8) if expected.dtype == jnp.bfloat16 else expected, key
                    )
    assert seen == {name: set(parts) for name, parts in want.items()}


def test_soak(tmp_path):
    """Loops, launches in flight, independent exchanges, two groups, and JAX's own collectives between."""
    jobs.run(tmp_path, 2, 0, "../soak.py", "--ranks", "2", "--exchanges", "500")
