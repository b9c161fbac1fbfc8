"""Argument checks shared by the public ops. Each raises ValueError: argument, expected, got, remedy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jax_wideep.group import ExpertGroup

ROW_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def instance(op: str, name: str, value: Any, kind: type, remedy: str) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{op}: {name}: expected a {kind.__name__}, got {type(value).__name__}; {remedy}")


def group(op: str, value: Any) -> None:
    """The argument `group`, and where it is used; see ExpertGroup.check_inside_shard_map."""
    instance(op, "group", value, ExpertGroup, "make one with jax_wideep.ExpertGroup(mesh, ...)")
    value.check_inside_shard_map(op)


def shape(op: str, name: str, array: Any, expected: tuple[int | str, ...], remedy: str = "") -> None:
    """`expected` holds sizes, or the name of an axis of any size."""
    got = jnp.shape(array)
    same = len(got) == len(expected) and all(
        isinstance(want, str) or want == have for want, have in zip(expected, got, strict=True)
    )
    if not same:
        wanted = "[" + ", ".join(str(size) for size in expected) + "]"
        raise ValueError(f"{op}: {name}: expected shape {wanted}, got {list(got)}{_then(remedy)}")


def dtype(op: str, name: str, array: Any, expected: tuple[Any, ...], remedy: str = "") -> None:
    got = jax.dtypes.result_type(array)
    if not any(got == want for want in expected):
        names = " or ".join(dict.fromkeys(jnp.dtype(want).name for want in expected))
        raise ValueError(f"{op}: {name}: expected dtype {names}, got {got.name}{_then(remedy)}")


def topk_idx(op: str, array: Any, group: ExpertGroup) -> None:
    shape(op, "topk_idx", array, ("tokens", group.top_k), "the ExpertGroup was made for that top_k")
    dtype(op, "topk_idx", array, (jnp.int32,), "use .astype(jnp.int32)")


def gate_weights(op: str, name: str, array: Any, expected: tuple[int | str, ...]) -> None:
    shape(op, name, array, expected)
    dtype(op, name, array, (jnp.float32, *ROW_DTYPES[:2]), "gate weights are floats")


def rows(op: str, name: str, array: Any, expected: tuple[int | str, ...]) -> None:
    shape(op, name, array, expected, "hidden and sizes come from the ExpertGroup and the plan")
    dtype(op, name, array, ROW_DTYPES, "cast the rows")


def _then(remedy: str) -> str:
    return f"; {remedy}" if remedy else ""
