"""Loading and saving: values by hand, round trips that are bit-exact, bytes read, errors that name the tensor."""

import json
import pathlib
import struct

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoints import EXPERTS, FFN, HIDDEN, PRESETS, draw_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.numpy import save_file

from jax_wideep import families
from jax_wideep.families import mapping
from jax_wideep.flax.transformer import Transformer, TransformerConfig

QUIET = {"progress": False}


def write(folder, tensors, files=1):
    """One file, or several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    if files == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    file_of = {
        name: f"model-{at % files + 1:05d}-of-{files:05d}.safetensors" for at, name in enumerate(names)
    }
    for file in set(file_of.values()):
        save_file({name: tensors[name] for name in names if file_of[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": file_of}))
    return folder


def read(folder):
    """All tensors of a folder, as the `safetensors` package sees them: dtype, shape and bytes."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                found[name] = tensor.dtype, tensor.shape, tensor.tobytes()
    return found


def as_read(tensors):
    return {name: (tensor.dtype, tensor.shape, tensor.tobytes()) for name, tensor in tensors.items()}


# ---- values ----


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_loaded_and_saved(tmp_path, family, family_group, dtype, files):
    preset = PRESETS[family]
    tensors, want = draw_checkpoint(family, dtype=dtype)
    layer = nnx.eval_shape(
        lambda: preset.make_layer(family_group(preset), rngs=nnx.Rngs(0), param_dtype=dtype)
    )
    other = draw_checkpoint(family, number=6, seed=1, dtype=dtype)[0]
    checkpoint = families.Checkpoint(write(tmp_path / "theirs", tensors | other, files))
    families.load_layer(layer, checkpoint, preset, 5, **QUIET)

    in_float32 = ("gate.kernel", "gate.bias", "gate.selection_bias")
    for name, value in want.items():
        got = layer.parameter(name)[...]
        assert got.dtype == (np.float32 if name in in_float32 else dtype), name
        np.testing.assert_array_equal(np.asarray(got, np.float32), value.astype(np.float32), name)
        spec = PartitionSpec("expert" if name in ("wi", "wo", "bi", "bo") else None, *[None] * (got.ndim - 1))
        assert got.sharding == NamedSharding(layer.config.group.mesh, spec), name
    # Everything of this layer but the other layer's, once: each rank its own experts, and the rest on every rank.
    whole = {name: value for name, value in want.items() if name not in ("wi", "wo", "bi", "bo")}
    stored = sum(tensor.nbytes for tensor in tensors.values())
    assert checkpoint.bytes_read == stored, whole

    prefix = "language_model.model.layers.{number}.feed_forward." if family == "llama4" else None
    families.save_layers(tmp_path / "ours", {5: layer}, preset, prefix=prefix, **QUIET)
    assert read(tmp_path / "ours") == as_read(tensors)


@pytest.mark.parametrize("shape", [(3, 5), (16, 1024), (40, 2500), (7,), (2, 3, 4)])
@pytest.mark.parametrize("dtypes", [("u2", "u2"), ("f4", "f2"), ("f4", "f4")])
def test_blocks_of_a_transposed_copy(shape, dtypes):
    source = np.random.default_rng(0).integers(0, 2000, shape).astype(dtypes[0])
    straight, turned, back = (np.zeros(size, dtypes[1]) for size in (shape, shape[::-1], shape))
    mapping.copy(straight, source)
    mapping.copy(turned.T, source)
    mapping.copy(back, turned.T)
    for copied in (straight, turned.T, back):
        np.testing.assert_array_equal(copied, source)


def test_groups_side_by_side_read_once(tmp_path, make_group):
    """Experts over one axis of a mesh with two: each is on two devices, and read for both at once."""
    preset = PRESETS["gpt_oss"]
    mesh = jax.make_mesh((2, 4), ("data", "expert"), devices=jax.devices()[:8])
    group = make_group(mesh=mesh, num_experts=EXPERTS, top_k=2, hidden=HIDDEN, backend="xla")
    tensors, want = draw_checkpoint("gpt_oss")
    checkpoint = families.Checkpoint(write(tmp_path / "theirs", tensors))
    params = families.load_params(checkpoint, preset, group, 5, **QUIET)
    assert checkpoint.bytes_read == sum(tensor.nbytes for tensor in tensors.values())
    for shard in params["wi"].addressable_shards:
        np.testing.assert_array_equal(shard.data, want["wi"][shard.index])
    families.save_layers(tmp_path / "ours", {5: params}, preset, **QUIET)
    assert read(tmp_path / "ours") == as_read(tensors)


def test_saved_over_several_files(tmp_path, family_group):
    preset = PRESETS["qwen3_moe"]
    group = family_group(preset)
    tensors = {}
    layers = {}
    for number in (0, 3):
        more, _ = draw_checkpoint("qwen3_moe", number, seed=number)
        tensors |= more
        layers[number] = families.load_params(
            families.Checkpoint(write(tmp_path / str(number), more)), preset, group, number, **QUIET
        )
    families.save_layers(tmp_path / "ours", layers, preset, max_file_bytes=5000, **QUIET)
    files = sorted(path.name for path in (tmp_path / "ours").iterdir())
    count = len(files) - 1
    assert count > 5
    assert files == [
        *(f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)),
        "model.safetensors.index.json",
    ]
    assert all(
        (tmp_path / "ours" / name).stat().st_size < 5000 + 2000 for name in files[:-1]
    )  # the header comes on top
    assert read(tmp_path / "ours") == as_read(tensors)
    index = json.loads((tmp_path / "ours" / files[-1]).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    again = families.Checkpoint(tmp_path / "ours")
    assert sorted(again.names()) == sorted(tensors)
    with pytest.raises(FileExistsError, match=r"without model\.safetensors\.index\.json"):
        families.save_layers(tmp_path / "ours", layers, preset, **QUIET)


def test_linen_takes_the_parameters(tmp_path, family_group):
    preset = PRESETS["deepseek_v3"]
    group = family_group(preset, backend="xla")
    checkpoint = families.Checkpoint(write(tmp_path, draw_checkpoint("deepseek_v3")[0]))
    params = families.load_params(checkpoint, preset, group, 5, **QUIET)
    layer = preset.make_layer(group, rngs=nnx.Rngs(0))
    families.load_layer(layer, checkpoint, preset, 5, **QUIET)
    flax = __import__("jax_wideep.flax", fromlist=["linen"])
    linen = flax.linen.MoE(**preset.layer_settings(), group=group)
    variables = {
        "params": {"gate": {"kernel": params["gate.kernel"]}}
        | {name: value for name, value in params.items() if "." not in name},
        "router_state": {"selection_bias": params["gate.selection_bias"]},
    }
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2, HIDDEN)) / 1000, jnp.float32)
    np.testing.assert_array_equal(linen.apply(variables, x), layer(x))


def test_a_layer_of_a_transformer(tmp_path, family, family_group):
    preset = PRESETS[family]
    tensors, want = draw_checkpoint(family)
    config = TransformerConfig(**preset.layer_settings(), num_heads=2, num_layers=2, vocab=8)
    model = nnx.eval_shape(lambda: Transformer(config, family_group(preset, backend="xla"), rngs=nnx.Rngs(0)))
    checkpoint = families.Checkpoint(write(tmp_path, tensors))
    families.load_layer(model.blocks[1].moe, checkpoint, preset, 5, **QUIET)
    for name, value in want.items():
        np.testing.assert_array_equal(model.blocks[1].moe.parameter(name)[...], value, name)
    assert isinstance(model.blocks[0].moe.wi.get_value(), jax.ShapeDtypeStruct)


def test_replicas_are_loaded_and_saved_once(tmp_path, family, make_group):
    preset = PRESETS[family]
    tensors, want = draw_checkpoint(family)
    group = make_group(4, num_experts=EXPERTS + 4, top_k=preset.router.top_k, hidden=HIDDEN, backend="xla")
    layer = preset.make_layer(group, rngs=nnx.Rngs(0), redundant_experts=4)
    abstract = nnx.eval_shape(lambda: preset.make_layer(group, rngs=nnx.Rngs(0), redundant_experts=4))
    checkpoint = families.Checkpoint(write(tmp_path / "theirs", tensors))
    with pytest.raises(
        ValueError, match="layer: expected arrays in one that has a placement, got an abstract"
    ):
        families.load_layer(abstract, checkpoint, preset, 5, **QUIET)
    families.load_layer(layer, checkpoint, preset, 5, **QUIET)
    logical = np.asarray(layer.places.get().logical_of_physical)
    assert len(logical) == EXPERTS + 4
    np.testing.assert_array_equal(layer.wi[...], want["wi"][logical])
    np.testing.assert_array_equal(layer.wo[...], want["wo"][logical])
    prefix = "language_model.model.layers.{number}.feed_forward." if family == "llama4" else None
    families.save_layers(tmp_path / "ours", {5: layer}, preset, prefix=prefix, **QUIET)
    assert read(tmp_path / "ours") == as_read(tensors)


def test_progress_counts_all_bytes(tmp_path, family_group, capsys):
    preset = PRESETS["gpt_oss"]
    tensors, _ = draw_checkpoint("gpt_oss")
    checkpoint = families.Checkpoint(write(tmp_path, tensors))
    families.load_params(checkpoint, preset, family_group(preset), 5)
    shown = capsys.readouterr().err
    assert "layer 5: 100%" in shown and f"{checkpoint.bytes_read / 1000:.1f}k/" in shown


# ---- quantised checkpoints ----


def test_deepseek_fp8_blocks_are_scaled(tmp_path, make_group):
    """Matrices whose sizes are no multiples of the block; scales that differ from block to block."""
    hidden, ffn = 200, 136
    preset = families.deepseek_v3(hidden, ffn, 4, 2, num_groups=2, group_top_k=1)
    rng = np.random.default_rng(0)
    tensors = {
        "gate.weight": rng.normal(size=(4, hidden)).astype(np.float32),
        "gate.e_score_correction_bias": rng.normal(size=4).astype(np.float32),
    }
    dense = {}
    blocks = [f"experts.{e}" for e in range(4)] + ["shared_experts"]
    for block in blocks:
        for name, shape in {
            "gate_proj": (ffn, hidden), "up_proj": (ffn, hidden), "down_proj": (hidden, ffn),
        }.items():  # fmt: skip
            key = f"{block}.{name}.weight"
            tensors[key] = rng.normal(size=shape).astype(ml_dtypes.float8_e4m3fn)
            scales = rng.uniform(0.5, 2, size=(2, 2)).astype(np.float32)
            tensors[key + "_scale_inv"] = scales
            dense[key] = np.array(
                [[tensors[key][i, j].astype(np.float32) * scales[i // 128, j // 128] for j in range(shape[1])]
                 for i in range(shape[0])]
            )  # fmt: skip
    write(tmp_path, {f"model.layers.0.mlp.{name}": tensor for name, tensor in tensors.items()})
    group = make_group(4, num_experts=4, top_k=2, hidden=hidden, backend="xla")
    checkpoint = families.Checkpoint(tmp_path)
    for dtype in (None, jnp.float32):
        params = families.load_params(checkpoint, preset, group, 0, param_dtype=dtype, **QUIET)
        kept = dtype or jnp.bfloat16
        for e in range(4):
            gate, up, down = (dense[f"experts.{e}.{name}_proj.weight"].T for name in ("gate", "up", "down"))
            np.testing.assert_array_equal(params["wi"][e], np.concatenate([gate, up], axis=1).astype(kept))
            np.testing.assert_array_equal(params["wo"][e], down.astype(kept))
    np.testing.assert_array_equal(params["shared_wo"], dense["shared_experts.down_proj.weight"].T)

    del tensors["experts.2.up_proj.weight_scale_inv"]
    write(tmp_path, {f"model.layers.0.mlp.{name}": tensor for name, tensor in tensors.items()})
    with pytest.raises(
        ValueError, match=r"tensor 'model\.layers\.0\.mlp\.experts\.2\.up_proj\.weight_scale_inv'"
    ):
        families.load_params(families.Checkpoint(tmp_path), preset, group, 0, **QUIET)


def test_gpt_oss_mxfp4_by_hand(tmp_path, make_group):
    preset = families.gpt_oss(32, 32, 4, 2)
    rng = np.random.default_rng(0)
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    tensors = {
        "router.weight": np.ones((4, 32), np.float32),
        "router.bias": np.ones(4, np.float32),
        "experts.gate_up_proj_bias": np.ones((4, 64), np.float32),
        "experts.down_proj_bias": np.ones((4, 32), np.float32),
    }
    dense = {}
    for name, n_out in (("gate_up_proj", 64), ("down_proj", 32)):
        packed = rng.integers(0, 256, (4, n_out, 1, 16), dtype=np.uint8)
        scales = rng.integers(120, 132, (4, n_out, 1), dtype=np.uint8)
        tensors |= {f"experts.{name}_blocks": packed, f"experts.{name}_scales": scales}
        dense[name] = np.empty((4, 32, n_out))
        for e, out, byte in np.ndindex(4, n_out, 16):
            for half, code in enumerate((packed[e, out, 0, byte] & 15, packed[e, out, 0, byte] >> 4)):
                dense[name][e, 2 * byte + half, out] = values[code] * 2.0 ** (int(scales[e, out, 0]) - 127)
    write(tmp_path, {f"model.layers.0.mlp.{name}": tensor for name, tensor in tensors.items()})
    group = make_group(4, num_experts=4, top_k=2, hidden=32, backend="xla")
    checkpoint = families.Checkpoint(tmp_path)
    params = families.load_params(checkpoint, preset, group, 0, **QUIET)
    up = dense["gate_up_proj"]
    np.testing.assert_array_equal(params["wi"][..., :32], up[..., ::2])
    np.testing.assert_array_equal(params["wi"][..., 32:], up[..., 1::2])
    np.testing.assert_array_equal(params["wo"], dense["down_proj"])
    assert checkpoint.bytes_read == sum(tensor.nbytes for tensor in tensors.values())

    bad = tensors | {"experts.down_proj_scales": tensors["experts.down_proj_scales"].astype(np.int32)}
    write(tmp_path, {f"model.layers.0.mlp.{name}": tensor for name, tensor in bad.items()})
    with pytest.raises(ValueError, match=r"down_proj_scales' of .*: expected uint8, got int32"):
        families.load_params(families.Checkpoint(tmp_path), preset, group, 0, **QUIET)


# ---- errors ----


def load(folder, family, family_group, **settings):
    preset = PRESETS[family]
    group = family_group(preset, backend="xla")
    return families.load_params(families.Checkpoint(folder), preset, group, 5, **QUIET, **settings)


DAMAGE = ("missing", "shape", "dtype", "truncated")


@given(
    family=st.sampled_from(list(PRESETS)),
    damage=st.sampled_from(DAMAGE),
    files=st.integers(1, 3),
    which=st.integers(0, 10**6),
)
def test_a_damaged_tensor_is_named(tmp_path_factory, family, damage, files, which):
    folder = tmp_path_factory.mktemp(family)
    tensors, _ = draw_checkpoint(family)
    name = sorted(tensors)[which % len(tensors)]
    if damage == "missing":
        del tensors[name]
    elif damage == "shape":
        tensors[name] = np.concatenate([tensors[name]] * 2)
    elif damage == "dtype":
        tensors[name] = tensors[name].astype(np.int16)
    write(folder, tensors, files)
    if damage == "truncated":
        at = families.Checkpoint(folder).find(name)
        with open(at.path, "r+b") as file:
            file.truncate(at.begin + at.nbytes - 1)
    preset = PRESETS[family]
    mesh = jax.make_mesh((2,), ("expert",), devices=jax.devices()[:2])
    words = {
        "missing": "expected it in",
        "shape": "expected shape",
        "dtype": "expected floats, got int16",
        "truncated": "truncated after",
    }
    with preset.make_group(mesh, backend="xla") as group, pytest.raises(ValueError) as raised:
        families.load_params(families.Checkpoint(folder), preset, group, 5, **QUIET)
    message = str(raised.value)
    assert words[damage] in message
    # Others that lie behind it in the file are cut off, too.
    assert repr(name) in message or (damage == "truncated" and "tensor 'model" in message)


def test_a_file_that_shrinks_while_it_is_read(tmp_path, family_group):
    tensors, _ = draw_checkpoint("gpt_oss")
    checkpoint = families.Checkpoint(write(tmp_path, tensors))
    preset = PRESETS["gpt_oss"]
    name = "model.layers.5.mlp.experts.gate_up_proj"
    at = checkpoint.find(name)
    with open(at.path, "r+b") as file:
        file.truncate(at.begin + at.nbytes - 1)
    with pytest.raises(ValueError, match="truncated"):
        families.load_params(checkpoint, preset, family_group(preset, backend="xla"), 5, **QUIET)


def test_errors(tmp_path, family_group):
    tensors, _ = draw_checkpoint("qwen3_moe")
    folder = write(tmp_path / "good", tensors, files=2)
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    victim = "model.layers.5.mlp.experts.3.up_proj.weight"

    with pytest.raises(
        ValueError, match=r"'model\.layers\.5.*expected values that bfloat16, the dtype of wi"
    ):
        load(folder, "qwen3_moe", family_group, param_dtype=jnp.bfloat16)
    rounded = load(folder, "qwen3_moe", family_group, param_dtype=jnp.bfloat16, cast=True)
    assert rounded["wi"].dtype == jnp.bfloat16 and rounded["gate.kernel"].dtype == jnp.float32
    with pytest.raises(ValueError, match=r"tensor 'model\.layers\.7\.mlp\.gate\.weight': expected it in"):
        preset = PRESETS["qwen3_moe"]
        families.load_params(
            families.Checkpoint(folder), preset, family_group(preset, backend="xla"), 7, **QUIET
        )

    index.write_text(json.dumps({"weight_map": weight_map | {victim: "model-00009-of-00009.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=rf"tensor '{victim}': expected it in .*download it"):
        load(folder, "qwen3_moe", family_group)
    other = next(file for file in weight_map.values() if file != weight_map[victim])
    index.write_text(json.dumps({"weight_map": weight_map | {victim: other}}))
    with pytest.raises(ValueError, match=rf"tensor '{victim}': .*that file does not hold it"):
        load(folder, "qwen3_moe", family_group)
    index.write_text(json.dumps({"weight_map": weight_map | {victim: "../model.safetensors"}}))
    with pytest.raises(
        ValueError, match=rf"tensor '{victim}' of .*: expected a file's name, got '\.\./model"
    ):
        load(folder, "qwen3_moe", family_group)
    for text in ("{", "[]", "{}"):
        index.write_text(text)
        with pytest.raises(ValueError, match="expected an index with a weight_map"):
            load(folder, "qwen3_moe", family_group)

    with pytest.raises(FileNotFoundError, match=r"in .*, got neither"):
        families.Checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="which is neither"):
        families.Checkpoint(tmp_path / "nowhere")


def damaged_headers():
    def file(header, data=b"\0" * 16):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data

    good = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    return {
        "empty": (b"", "do not hold a header"),
        "short": (b"\x10\0\0", "do not hold a header"),
        "huge": (struct.pack("<Q", 1 << 60) + b"{}", "do not hold a header"),
        "no JSON": (file(b"{nothing}"), "an unreadable one"),
        "no UTF-8": (file(b"\xff\xfe\x00{}"), "an unreadable one"),
        "a list": (file([1]), "an unreadable one"),
        "no dtype": (file({"t": {"shape": [4], "data_offsets": [0, 16]}}), "an unreadable one"),
        "size": (file({"t": good | {"shape": [5]}}), "tensor 't' of .*: expected 20 bytes for F32"),
        "negative": (
            file({"t": good | {"shape": [-4]}}),
            "tensor 't' of .*: expected bytes after the header",
        ),
        "before": (file({"t": good | {"data_offsets": [-16, 0]}}), "tensor 't' of .*: expected bytes after"),
        "behind": (file({"t": good | {"data_offsets": [16, 32]}}), "tensor 't' of .* truncated after"),
    }


@pytest.mark.parametrize("what", damaged_headers())
def test_damaged_headers(tmp_path, what):
    content, message = damaged_headers()[what]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        families.Checkpoint(path).find("t")
    assert str(path) in str(raised.value)


def test_layers_of_other_settings_are_refused(tmp_path, family_group):
    preset = PRESETS["mixtral"]
    group = family_group(preset, backend="xla")
    checkpoint = families.Checkpoint(write(tmp_path, draw_checkpoint("mixtral")[0]))
    layer = preset.make_layer(group, rngs=nnx.Rngs(0), ffn=FFN + 2)
    with pytest.raises(ValueError, match=f"layer: expected ffn = {FFN} as in preset, got {FFN + 2}"):
        families.load_layer(layer, checkpoint, preset, 5, **QUIET)
    layer = preset.make_layer(group, rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match=r"params: expected .*'wo'.*, got .*'gate.kernel', 'wi'.; is the preset"
    ):
        families.assign(layer, {"gate.kernel": jnp.zeros((HIDDEN, EXPERTS)), "wi": jnp.zeros(3)})
    with pytest.raises(
        ValueError, match=r"layers: expected 'gate\.bias' of shape \(8,\) under 'model\.layers\.0"
    ):
        families.save_layers(tmp_path / "out", {0: layer}, PRESETS["gpt_oss"], **QUIET)
    params = families.load_params(checkpoint, preset, group, 5, **QUIET)
    split = jax.device_put(params["wo"], NamedSharding(group.mesh, PartitionSpec(None, None, "expert")))
    with pytest.raises(ValueError, match="expected 'wo' split by experts or not at all"):
        families.save_layers(tmp_path / "out", {0: params | {"wo": split}}, preset, **QUIET)
    with pytest.raises(ValueError, match="group: expected one of 8 experts, got one of 16"):
        families.load_params(
            checkpoint, preset, family_group(preset, num_experts=16, backend="xla"), 5, **QUIET
        )
    assert not pathlib.Path(tmp_path / "out").exists()


# ---- round trips of anything ----


@given(
    family=st.sampled_from(list(PRESETS)),
    dtype=st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]),
    ranks=st.sampled_from([1, 2, 4, 8]),
    files=st.integers(1, 4),
    max_file_bytes=st.integers(1, 40_000),
    seed=st.integers(0, 10**6),
)
def test_round_trip_is_bit_exact(tmp_path_factory, family, dtype, ranks, files, max_file_bytes, seed):
    preset = PRESETS[family]
    folder = tmp_path_factory.mktemp(family)
    tensors, _ = draw_checkpoint(family, 0, seed)
    # Any bits, NaN with a payload included: what is only moved must not change.
    rng = np.random.default_rng(seed)
    for name, tensor in tensors.items():
        kept = np.dtype(np.float32) if "correction_bias" in name else np.dtype(dtype)
        router = ("gate.", "router.")  # widened to float32 and back
        if any(part in name for part in router):
            tensors[name] = rng.normal(size=tensor.shape).astype(kept)
        else:
            bits = rng.integers(0, 256, (*tensor.shape, kept.itemsize), np.uint8)
            tensors[name] = bits.view(kept)[..., 0].copy()
    write(folder / "theirs", tensors, files)
    mesh = jax.make_mesh((ranks,), ("expert",), devices=jax.devices()[:ranks])
    with preset.make_group(mesh, backend="xla") as group:
        params = families.load_params(families.Checkpoint(folder / "theirs"), preset, group, 0, **QUIET)
    prefix = "language_model.model.layers.{number}.feed_forward." if family == "llama4" else None
    families.save_layers(
        folder / "ours", {0: params}, preset, prefix=prefix, max_file_bytes=max_file_bytes, **QUIET
    )
    assert read(folder / "ours") == as_read(tensors)
