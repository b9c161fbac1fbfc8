"""The layer of each family against the `transformers` package: routing decisions, values, gradients, checkpoints."""

import copy
import dataclasses
import importlib
import json
import sys

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_wideep as wep
from jax_wideep import families

pytestmark = pytest.mark.skipif(sys.version_info >= (3, 12), reason="needs torch, installed on Python 3.11")

NAMES = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_moe, not renormalised",
    "deepseek_v3",
    "gpt_oss",
    "llama4",
    "llama4, top-2",
)
RANKS, BATCH, SEQ, HIDDEN = 8, 8, 6, 64


@pytest.fixture(scope="session")
def hf():
    return importlib.import_module("hf_models")


@pytest.fixture(scope="session")
def folders(tmp_path_factory, hf):
    """By name: a checkpoint that transformers wrote, over several files."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name.split(",")[0])
            hf.model(name).save_pretrained(made[name], max_shard_size="100KB")
        return made[name]

    return folder


def draw(seed):
    return np.random.default_rng(seed).normal(size=(BATCH, SEQ, HIDDEN)).astype(np.float32)


def relative(got, want, tolerance, what):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape and np.abs(want).max() > 0, what
    worst = np.abs(got - want).max() / np.abs(want).max()
    assert worst < tolerance, f"{what} differs by {worst:.1e} of the largest"


def load(folder, make_group, **settings):
    preset = families.from_config(folder)
    group = make_group(
        RANKS, num_experts=preset.router.num_experts, top_k=preset.router.top_k, hidden=preset.hidden, chunk=4
    )
    layer = nnx.eval_shape(lambda: preset.make_layer(group, rngs=nnx.Rngs(0), **settings))
    families.load_layer(layer, families.Checkpoint(folder), preset, number=1, progress=False)
    return preset, layer


@pytest.mark.parametrize("name", NAMES)
def test_same_decisions_values_and_gradients(hf, folders, make_group, name):
    preset, layer = load(folders(name), make_group)
    x, pull = draw(1), draw(2)
    want, want_dx, want_gradients = hf.run(name, x, pull)

    logits = wep.routing.router_logits(
        jnp.asarray(x.reshape(-1, HIDDEN)),
        jnp.asarray(np.asarray(layer.gate.kernel[...])),
        preset.router,
        bias=None if layer.gate.bias is None else jnp.asarray(np.asarray(layer.gate.bias[...])),
    )
    bias = layer.gate.selection_bias
    routing = wep.routing.route(
        logits, preset.router, selection_bias=None if bias is None else jnp.asarray(np.asarray(bias[...]))
    )
    weights = np.full(logits.shape, np.nan, np.float32)
    np.put_along_axis(weights, np.asarray(routing.topk_idx), np.asarray(routing.topk_weights), axis=1)
    want_weights = hf.chosen(name, x)
    np.testing.assert_array_equal(np.isnan(weights), np.isnan(want_weights))
    np.testing.assert_allclose(weights, want_weights, rtol=1e-5, atol=1e-6)
    assert len(np.unique(routing.topk_idx)) > preset.router.num_experts // 2

    graph, params, rest = nnx.split(layer, nnx.Param, ...)

    @jax.jit
    def step(params, x):
        def loss(params, x):
            out = nnx.merge(graph, params, rest)(x)
            return jnp.sum(out * pull), out

        (_, out), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)
        return out, gradients

    out, (gradients, dx) = step(params, jnp.asarray(x))
    relative(out, want, 1e-5, "output")
    relative(dx, want_dx, 1e-4, "gradient of x")
    got = {".".join(path): leaf[...] for path, leaf in nnx.to_flat_state(gradients)}
    wanted = hf.as_layer_has_them(name, want_gradients)
    assert set(got) == set(wanted)
    for key, value in wanted.items():
        relative(got[key], value, 1e-4, f"gradient of {key}")

    if name in ("gpt_oss", "llama4"):  # biases of rows in slabs, and weights that stay at home
        decoder = nnx.merge(graph, params, rest)
        decoder.config = dataclasses.replace(layer.config, mode="low_latency", quantize=None)
        relative(decoder(jnp.asarray(x)), want, 1e-5, "low-latency output")


@pytest.mark.parametrize("name", ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4"))
def test_round_trip_of_what_transformers_wrote_is_bit_exact(tmp_path, hf, make_group, name):
    model = copy.deepcopy(hf.model(name))
    for (
        parameter
    ) in model.parameters():  # the selection bias, a buffer, stays float32 as in published checkpoints
        parameter.data = parameter.data.bfloat16()
    model.save_pretrained(tmp_path / "theirs")
    preset, layer = load(tmp_path / "theirs", make_group, param_dtype=jnp.bfloat16)
    families.save_layers(tmp_path / "ours", {1: layer}, preset, max_file_bytes=60_000, progress=False)
    theirs, ours = (families.Checkpoint(tmp_path / folder) for folder in ("theirs", "ours"))
    prefix = {"mixtral": "block_sparse_moe", "llama4": "feed_forward"}.get(name, "mlp")
    prefix = f"model.layers.1.{prefix}."
    assert set(ours.names()) == {tensor for tensor in theirs.names() if tensor.startswith(prefix)}
    for tensor in ours.names():
        want, got = theirs.find(tensor), ours.find(tensor)
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        assert ours.read(got).tobytes() == theirs.read(want).tobytes(), tensor


@pytest.mark.parametrize("name", ("mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "llama4"))
def test_transformers_reads_what_was_saved(tmp_path, hf, make_group, name):
    """Another layer's weights in a model's checkpoint: its module then computes what that layer does."""
    import torch

    model = hf.model(name)
    model.save_pretrained(tmp_path / "model")
    preset, layer = load(tmp_path / "model", make_group)
    x = draw(3)
    before = layer(jnp.asarray(x))
    for parameter in families.mapping.parameter_shapes(preset):
        variable = layer.parameter(parameter)
        variable.set_value(variable[...] * 0.75)
    families.save_layers(tmp_path / "ours", {1: layer}, preset, progress=False)

    folder = tmp_path / "model"
    names = {file: families.Checkpoint(tmp_path / file).names() for file in ("model", "ours")}
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (tmp_path / "ours" / "model.safetensors").rename(folder / "b.safetensors")
    weight_map = dict.fromkeys(names["model"], "a.safetensors") | dict.fromkeys(
        names["ours"], "b.safetensors"
    )
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map})
    )
    read = type(model).from_pretrained(folder).eval()
    with torch.no_grad():
        out = hf.block_of(read)(torch.tensor(x))
    out = out[0] if isinstance(out, tuple) else out
    after = layer(jnp.asarray(x))
    assert jnp.abs(after - before).max() > 0.1 * jnp.abs(before).max()
    relative(after, out.numpy().reshape(x.shape), 1e-5, "output")


def test_mxfp4_is_unpacked_as_transformers_does(tmp_path, hf, make_group):
    import torch
    from safetensors.torch import save_file
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    preset = families.gpt_oss(hidden=64, ffn=32, num_experts=8, top_k=2)
    torch.manual_seed(0)
    tensors = {
        "router.weight": torch.randn(8, 64, dtype=torch.bfloat16),
        "router.bias": torch.randn(8, dtype=torch.bfloat16),
        "experts.gate_up_proj_bias": torch.randn(8, 64, dtype=torch.bfloat16),
        "experts.down_proj_bias": torch.randn(8, 64, dtype=torch.bfloat16),
    }
    dense = {}
    for matrix, (n_in, n_out) in {"gate_up_proj": (64, 64), "down_proj": (32, 64)}.items():
        blocks = torch.randint(0, 256, (8, n_out, n_in // 32, 16), dtype=torch.uint8)
        scales = torch.randint(117, 131, (8, n_out, n_in // 32), dtype=torch.uint8)
        tensors |= {f"experts.{matrix}_blocks": blocks, f"experts.{matrix}_scales": scales}
        dense[matrix] = convert_moe_packed_tensors(blocks, scales).float().numpy()
    save_file({f"model.layers.3.mlp.{n}": t for n, t in tensors.items()}, tmp_path / "model.safetensors")
    with preset.make_group(
        jax.make_mesh((RANKS,), ("expert",), devices=jax.devices()[:RANKS]), backend="xla"
    ) as group:
        params = families.load_params(families.Checkpoint(tmp_path), preset, group, 3, progress=False)
    up = dense["gate_up_proj"]
    np.testing.assert_array_equal(
        np.asarray(params["wi"], np.float32), np.concatenate([up[..., ::2], up[..., 1::2]], axis=-1)
    )
    np.testing.assert_array_equal(np.asarray(params["wo"], np.float32), dense["down_proj"])
    assert params["wi"].dtype == jnp.bfloat16
