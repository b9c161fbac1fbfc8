"""Weights from parameter trees of other JAX libraries.

Names and shapes as they were read in those libraries' sources (MaxText's `layers/moe.py`, Transformer Engine's
`jax/flax/moe.py`) in November 2026; E experts, H hidden, F ffn, S the shared expert's ffn.

MaxText, a routed block, or a folder of it as `MoeBlock_0` beside `shared_experts`:

    gate/kernel [H, E], gate/bias [E], wi_0 [E, H, F] (gate), wi_1 [E, H, F] (up), wo [E, F, H],
    wi_0_bias [E, F], wi_1_bias [E, F], wo_bias [E, H]
    shared_experts/wi_0/kernel [H, S], shared_experts/wi_1/kernel [H, S], shared_experts/wo/kernel [S, H]

`gate/bias` is DeepSeek's selection bias, or the bias of GPT-OSS's logits. Layers that were scanned are stacked along
one more axis of every array, the second by default (`param_scan_axis`).

Transformer Engine, the parameters of one `_MoEBlock`:

    gate_kernel [H, E], wi [E, H, 2 F] (gate before up) or wi_0 and wi_1 [E, H, F], wo [E, F, H],
    wi_0_bias [E, F], wi_1_bias [E, F], wo_bias [E, H], expert_bias [E] (the selection bias)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_wideep.families import mapping
from jax_wideep.families.presets import Preset

Tree = Mapping[str, Any]


def from_maxtext(
    tree: Tree, preset: Preset, *, number: int | None = None, scan_axis: int = 1
) -> dict[str, Any]:
    """The layer's arrays by parameter name, for `assign`, from MaxText's parameters of one MoE block.

    Args:
      tree: nested by name, leaves arrays or boxes with a `value`: the block that holds `gate`, or the one that holds
        `MoeBlock_0` and `shared_experts`.
      preset: the model's family and sizes.
      number: which of the layers that are stacked along `scan_axis`; None if they are not stacked.
      scan_axis: MaxText's `param_scan_axis`.

    Raises:
      ValueError: an array is missing or of the wrong shape; the message names it.
    """
    read = _Reader("from_maxtext", tree, None if number is None else (number, scan_axis))
    block = "MoeBlock_0/" if "MoeBlock_0" in tree else ""
    shared = {f"shared_{name}": f"shared_experts/{name}" for name in ("wi_0", "wi_1", "wo")}
    # The router's bias is named alike whether it is a bias of the logits or of the choice alone.
    bias = f"{block}gate/bias"
    return _collect(
        read,
        preset,
        {
            "gate.kernel": (f"{block}gate/kernel",),
            "gate.bias": (bias,),
            "gate.selection_bias": (bias,),
            "wi": (f"{block}wi_0", f"{block}wi_1"),
            "wo": (f"{block}wo",),
            "bi": (f"{block}wi_0_bias", f"{block}wi_1_bias"),
            "bo": (f"{block}wo_bias",),
            "shared_wi": (f"{shared['shared_wi_0']}/kernel", f"{shared['shared_wi_1']}/kernel"),
            "shared_wo": (f"{shared['shared_wo']}/kernel",),
        },
    )


def from_transformer_engine(tree: Tree, preset: Preset) -> dict[str, Any]:
    """The layer's arrays by parameter name, for `assign`, from the parameters of a Transformer Engine MoE block.

    That block has no shared expert: add "shared_wi" and "shared_wo" to a preset's that has one, or replace its
    `shared_ffn` by 0.

    Args:
      tree: by name, leaves arrays or boxes with a `value`.
      preset: the model's family and sizes.

    Raises:
      ValueError: an array is missing or of the wrong shape; the message names it.
    """
    read = _Reader("from_transformer_engine", tree, None)
    return _collect(
        read,
        preset,
        {
            "gate.kernel": ("gate_kernel",),
            "gate.selection_bias": ("expert_bias",),
            "wi": ("wi",) if "wi" in tree else ("wi_0", "wi_1"),
            "wo": ("wo",),
            "bi": ("wi_0_bias", "wi_1_bias"),
            "bo": ("wo_bias",),
        },
    )


class _Reader:
    """Arrays of a tree by path."""

    def __init__(self, op: str, tree: Tree, layer: tuple[int, int] | None):
        self.op, self.tree, self.layer = op, tree, layer

    def __call__(self, path: str, shape: tuple[int, ...]) -> Any:
        node: Any = self.tree
        for name in path.split("/"):
            if not isinstance(node, Mapping) or name not in node:
                raise ValueError(
                    f"{self.op}: tree: expected an array at {path!r}, got none; the tree has {sorted(self.tree)}"
                )
            node = node[name]
        array = getattr(node, "value", node)
        got = np.shape(array)
        expected = shape
        if self.layer is not None:
            number, axis = self.layer
            if len(got) == len(shape) + 1 and 0 <= number < got[axis]:
                return self._checked(path, array[(slice(None),) * axis + (number,)], shape)
            expected = (*shape[:axis], "layers", *shape[axis:])  # type: ignore[arg-type]
            raise ValueError(
                f"{self.op}: tree: {path!r}: expected shape {list(expected)} with layer {number}, got {got}"
            )
        return self._checked(path, array, shape)

    def _checked(self, path: str, array: Any, shape: tuple[int, ...]) -> Any:
        if np.shape(array) != shape:
            raise ValueError(
                f"{self.op}: tree: {path!r}: expected shape {list(shape)}, got {list(np.shape(array))}"
            )
        return array


def _collect(read: _Reader, preset: Preset, paths: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """Every parameter from its path, or from two side by side along the last axis: gate and up."""
    params = {}
    for name, shape in mapping.parameter_shapes(preset).items():
        if name not in paths:
            raise ValueError(
                f"{read.op}: preset: expected a layer without {name!r}, which such trees do not have; replace the "
                "preset's settings"
            )
        halves = paths[name]
        of_one = (*shape[:-1], shape[-1] // len(halves))
        arrays = [read(path, of_one) for path in halves]
        params[name] = arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis=-1)
    return params
