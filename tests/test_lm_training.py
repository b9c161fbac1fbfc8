"""Parts of examples/train_lm.py: precision, parts of a batch, operations, metrics."""

import json
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def examples_path(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)


def test_bfloat16_parameters_keep_what_small_steps_add_up_to():
    from lm.training import with_float32_weights

    start = {"a": jnp.ones(3, jnp.bfloat16), "router": jnp.full(2, -2.0, jnp.float32)}
    gradient = {"a": jnp.asarray([1.0, 0.5, -1.0], jnp.bfloat16), "router": jnp.full(2, 0.25, jnp.float32)}

    def train(optimizer):
        params, state = start, optimizer.init(start)
        for _ in range(100):
            updates, state = optimizer.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    params, state = train(with_float32_weights(optax.sgd(1e-3)))
    exact = {name: np.asarray(value, np.float64) for name, value in start.items()}
    for name in exact:
        exact[name] -= 100 * 1e-3 * np.asarray(gradient[name], np.float64)
        assert params[name].dtype == start[name].dtype and state.weights[name].dtype == jnp.float32
        np.testing.assert_allclose(state.weights[name], exact[name], rtol=1e-5)
        np.testing.assert_array_equal(params[name], state.weights[name].astype(params[name].dtype))
    without, _ = train(optax.sgd(1e-3))
    np.testing.assert_array_equal(without["a"][:2], 1)  # steps too small for bfloat16 are lost


def test_optimizer_state_is_float32_beside_bfloat16_parameters():
    from lm import training

    sizes = training.ModelSizes(hidden=32, layers=1, heads=2, ffn=16, dtype="bfloat16")
    model = training.make_model(sizes.config(), 0)
    optimizer = training.make_optimizer(model, 1e-3)
    floats = [
        leaf for leaf in jax.tree.leaves(nnx.state(optimizer)) if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    assert floats and {leaf.dtype for leaf in floats} == {jnp.dtype("float32")}
    assert model.blocks[0].moe.wi[...].dtype == jnp.bfloat16
    # Sharded as the parameters are: no device holds all experts' moments.
    experts = [leaf for leaf in floats if leaf.shape == model.blocks[0].moe.wi[...].shape]
    assert len(experts) == 3  # weights and two moments
    for leaf in experts:
        assert leaf.sharding == model.blocks[0].moe.wi[...].sharding
    model.group.close()


def test_parts_of_a_batch_give_the_gradient_of_the_batch():
    from lm import training

    def train(microbatches):
        sizes = training.ModelSizes(hidden=32, layers=1, heads=2, ffn=16, capacity_factor=16.0)
        model = training.make_model(sizes.config(), 0)
        optimizer = nnx.Optimizer(model, optax.sgd(1.0), wrt=nnx.Param)
        tokens = np.random.default_rng(0).integers(0, 256, (64, 9), np.int32)
        batch = training.put_batch(model, tokens)
        weights = training.LossWeights(aux=0.0, z=0.0)  # the balance of a batch is not the mean of its parts'
        report = training.train_step(model, optimizer, batch, weights, microbatches)
        assert int(report.stats.overflow.sum()) == 0
        state = jax.device_get(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
        model.group.close()
        return jax.device_get(report), state

    (whole, want), (parts, got) = train(1), train(4)
    np.testing.assert_allclose(parts.loss, whole.loss, rtol=1e-5)
    np.testing.assert_array_equal(parts.stats.tokens_per_expert, whole.stats.tokens_per_expert)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, want)


def test_learning_rate_rises_then_falls_to_its_end():
    from lm.training import make_schedule

    schedule = make_schedule(0.5, 100, warmup=10, final=0.1)
    rates = np.asarray([schedule(step) for step in range(101)])
    np.testing.assert_allclose(rates[:11], np.linspace(0, 0.5, 11), rtol=1e-6)
    cosine = 0.05 + 0.45 * (1 + np.cos(np.pi * np.arange(91) / 90)) / 2
    np.testing.assert_allclose(rates[10:], cosine, rtol=1e-4)


def test_operations_count_the_weights_that_a_token_meets():
    from lm.throughput import flops_per_token, peak_flops

    from jax_wideep.flax.transformer import TransformerConfig

    config = TransformerConfig(
        vocab=10, hidden=8, num_layers=3, num_heads=2, ffn=5, num_experts=16, top_k=2, shared_ffn=7
    )
    attention, router, experts, shared = 4 * 8 * 8, 8 * 16, 2 * 3 * 8 * 5, 3 * 8 * 7
    weights = 3 * (attention + router + experts + shared) + 8 * 10
    assert flops_per_token(config, seq=32) == 6 * weights + 12 * 3 * 8 * 32

    def peak(kind):
        return peak_flops(types.SimpleNamespace(device_kind=kind))

    assert peak("NVIDIA H100 80GB HBM3") == peak("NVIDIA H200") == 989e12
    assert peak("NVIDIA H100 PCIe") == 756e12
    assert peak("cpu") is None


def test_metrics_go_on_from_the_checkpoint(tmp_path):
    from lm.metrics import MetricsLog, read_history

    layers = [{"tokens_per_expert": [3, 1], "rows_per_rank": [4], "dropped": 0}]
    with MetricsLog(tmp_path, {"ranks": 8}, step=0) as log:
        assert log.first_held_out is None
        log.write({"step": 0, "held_out_loss": 5.5})
        for step in (1, 2, 3):
            log.write({"step": step, "loss": float(step), "mfu": None, "layers": layers})
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # killed while it wrote
    with MetricsLog(tmp_path, {"ranks": 4}, step=2) as log:
        assert log.first_held_out == 5.5
        log.write({"step": 3, "loss": 30.0, "layers": layers})
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert records[0] == {"run": {"ranks": 4}}
    assert [(record["step"], record.get("loss")) for record in records[1:]] == [
        (0, None),
        (1, 1),
        (2, 2),
        (3, 30),
    ]
    assert "mfu" not in records[2] and records[2]["layers"] == layers
    history = read_history(tmp_path)
    assert history.loss == [1, 2, 30] and history.held_out == [(0, 5.5)]
    assert history.tokens_per_expert == [[[3, 1]]] * 3
    events = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    for tag in (b"loss", b"load/layer0/expert", b"load/layer0/rank", b"dropped/layer0"):
        assert tag in events
