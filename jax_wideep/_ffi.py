"""Sole importer of the compiled modules and of private JAX; every branch on a version is here.

Each exchange op is a primitive of our own rather than `jax.ffi.ffi_call(has_side_effect=True)`: the latter
breaks `jax.checkpoint` on jax 0.10 and loses the varying axes under `check_vma=True`. A primitive has a
shape rule (`_abstract`), a lowering to the custom call of the same name, and a batching rule that runs the
batch one after the other.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import config as _jax_config
from jax._src import core as _core
from jax._src import dispatch as _dispatch
from jax._src import distributed as _distributed
from jax._src import xla_bridge as _xla_bridge
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import PartitionSpec

# Oldest jaxlib whose CPU client runs more devices than threads without a hang in its own collectives.
_JAXLIB_WITHOUT_THREAD_LIMIT = (0, 12)

# Recorded after each compilation, also where it was a load from JAX's cache.
_COMPILED = "/jax/core/compile/backend_compile_duration"
_num_compilations = 0  # that were heard of

# ---- the compiled modules ----


@functools.cache
def cpu_module() -> ModuleType | None:
    """The compiled CPU backend with its handlers registered, or None if it was not built."""
    try:
        module = importlib.import_module("jax_wideep._wideep_cpu")
    except ModuleNotFoundError:
        return None
    jax.ffi.register_ffi_type("wideep_op_instance", module.op_instance_type(), platform="cpu")
    for target, handler in module.handlers().items():
        jax.ffi.register_ffi_target(target, handler, platform="cpu")

    def count(event: str, *_: Any, **__: Any) -> None:
        global _num_compilations
        if event == _COMPILED:
            _num_compilations += 1
            module.executable_done()

    jax.monitoring.register_event_duration_secs_listener(count)
    return module


@functools.cache
def compilations_are_counted() -> bool:
    """Whether this JAX still records _COMPILED: where executables begin could not be told without."""
    before = _num_compilations
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        jax.jit(lambda x: x + 1).lower(np.float32(0)).compile()
    return cpu_module() is not None and _num_compilations > before


@functools.cache
def cuda_module() -> ModuleType | None:
    """The compiled CUDA backend with its handlers registered, or None if it was not built."""
    try:
        module = importlib.import_module("jax_wideep._wideep_cuda")
    except ModuleNotFoundError:
        return None
    for target, handler in module.handlers().items():
        jax.ffi.register_ffi_target(target, handler, platform="CUDA")
    return module


@functools.cache
def nvshmem_module() -> ModuleType | None:
    """NVSHMEM's memory and relay, or None if they were not built; the library has to be loaded."""
    try:
        return importlib.import_module("jax_wideep._wideep_nvshmem")
    except ModuleNotFoundError:
        return None


@functools.cache
def gpu_compute_capability() -> str | None:
    """The lowest compute capability of this process's NVIDIA GPUs, such as "9.0"; None without a GPU."""
    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError:
        return None
    return min((device.compute_capability for device in devices), key=float, default=None)


# ---- JAX's state ----


def backend_started() -> bool:
    """Whether JAX has made a backend, after which NPROC and the number of CPU devices are fixed."""
    return bool(_xla_bridge.backends_are_initialized())


def coordination_client() -> Any:
    """The client of JAX's coordination service; None unless jax.distributed.initialize was called."""
    return _distributed.global_state.client


def cpu_thread_limit_applies() -> bool:
    """Whether this jaxlib can hang when a CPU client has fewer than two threads a device."""
    import jaxlib.version

    return tuple(int(n) for n in jaxlib.version.__version__.split(".")[:2]) < _JAXLIB_WITHOUT_THREAD_LIMIT


def cpu_client_threads() -> int:
    """Threads that XLA's CPU client has or will have: NPROC, or the processors of this process."""
    text = os.environ.get("NPROC", "")
    return int(text) if text.isdecimal() and int(text) > 0 else len(os.sched_getaffinity(0))


def manual_axes() -> dict[str, int]:
    """Size by name of the mesh axes that are manual here, that is, that a shard_map runs over."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return {}
    sizes = dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True))
    return {name: sizes[name] for name in mesh.axis_names if name in mesh.manual_axes}


def automatic_axes() -> dict[str, int]:
    """Size by name of the mesh axes that are not manual here."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return {}
    sizes = dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True))
    return {name: size for name, size in sizes.items() if name not in mesh.manual_axes}


def current_mesh() -> jax.sharding.Mesh | None:
    """The mesh given to `jax.set_mesh`, or None."""
    mesh = jax.sharding.get_mesh()
    return None if mesh.empty else mesh


# ---- varying axes (shard_map's check_vma) ----


def varying_axes(*arrays: Any) -> frozenset[str]:
    """The mesh axes over which any of `arrays` varies, as shard_map's type check counts them."""
    axes: frozenset[str] = frozenset()
    for array in arrays:
        axes |= frozenset(_core.typeof(array).mat.varying)
    return axes


def vary(arrays: Sequence[Any], axes: Sequence[str] = ()) -> list[Any]:
    """`arrays`, all varying over `axes` and over whatever any of them varies over.

    The gradient of an array that was replicated is thereby summed over the ranks. Does nothing where
    shard_map does not check (`check_vma=False`) or outside of it.
    """
    arrays = [jnp.asarray(array) for array in arrays]
    if not _jax_config._check_vma.value or not manual_axes():
        return arrays
    wanted = varying_axes(*arrays) | frozenset(axes)
    varied = []
    for array in arrays:
        missing = tuple(sorted(wanted - varying_axes(array)))
        varied.append(jax.lax.pcast(array, missing, to="varying") if missing else array)
    return varied


# ---- primitives ----

Spec = tuple[tuple[int, ...], Any]  # (shape, dtype)
Attrs = dict[str, Callable[[Any], Any]]  # keyword parameter -> the C type it goes out as


def _exchange_primitive(
    name: str,
    outputs: Callable[..., list[Spec]],
    attrs: Attrs,
    *,
    cpu_operands: slice = slice(None),
    cuda_operands: slice = slice(None),
    cuda_attrs: Attrs | None = None,
) -> Primitive:
    """A primitive in which every rank of a group takes part; arguments as in _custom_call_primitive.

    A backend's handler takes the operands of its slice. `cuda_attrs` are those that only CUDA's handler takes
    beside `attrs`; None: there is no such handler.
    """
    primitive = _custom_call_primitive(name, outputs)
    primitive.def_impl(functools.partial(_not_eager, name))
    lower = _custom_call(name, attrs, has_side_effect=True, taken=cpu_operands)
    mlir.register_lowering(primitive, lower, platform="cpu")
    if cuda_attrs is not None:
        lower = _custom_call(name, attrs | cuda_attrs, has_side_effect=True, taken=cuda_operands)
        mlir.register_lowering(primitive, lower, platform="cuda")
    return primitive


def _half_primitive(name: str, outputs: Callable[..., list[Spec]], attrs: Attrs) -> Primitive:
    """Half of an exchange, on CUDA only; arguments as in _custom_call_primitive."""
    primitive = _exchange_primitive(name, outputs, attrs, cuda_attrs={})

    def _batching(*_: Any, **__: Any) -> Any:
        # One after the other, all the first halves would come before all the second ones.
        raise ValueError(f"{name}: the halves cannot run under jax.vmap; use ll_dispatch and ll_combine")

    batching.primitive_batchers[primitive] = _batching
    return primitive


def _send_primitive(name: str, attrs: Attrs) -> Primitive:
    """The first half: its result, a ticket, says which call the second half belongs to, and comes before it."""
    primitive = _half_primitive(name, lambda *_, **__: [((1,), jnp.uint32)], attrs)

    def _jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> tuple[list[Any], list[Any]]:
        # Gradients go past the halves: low_latency.py has those of the whole op.
        results = primitive.bind(*primals, **params)
        return results, [ad.Zero(_core.typeof(result).to_tangent_aval()) for result in results]

    ad.primitive_jvps[primitive] = _jvp
    return primitive


def _kernel_primitive(name: str, outputs: Callable[..., list[Spec]], attrs: Attrs) -> Primitive:
    """A primitive that one GPU computes alone; arguments as in _custom_call_primitive."""
    primitive = _custom_call_primitive(name, outputs)
    primitive.def_impl(functools.partial(_dispatch.apply_primitive, primitive))
    lowering = _custom_call(name, attrs, has_side_effect=False)

    def _elsewhere(ctx: Any, *operands: Any, **params: Any) -> Any:
        platforms = ctx.module_context.platforms
        if len(platforms) > 1:
            # A branch of platform_dependent that only CUDA takes is lowered for every platform.
            return lowering(ctx, *operands, **params)
        raise ValueError(
            f"{name}: implementation: 'cuda' runs on NVIDIA GPUs, this is being compiled for {platforms[0]}; use "
            "implementation='auto'"
        )

    mlir.register_lowering(primitive, _elsewhere)
    mlir.register_lowering(primitive, lowering, platform="cuda")
    return primitive


def _custom_call(
    name: str, attrs: Attrs, has_side_effect: bool, taken: slice = slice(None)
) -> Callable[..., Any]:
    """The lowering rule to the custom call `wideep_<name>`.

    `attrs` are the keyword parameters that the handler takes as attributes, with their C type, and `taken` the
    operands that it takes. Parameters that are not listed only serve the shape rule, or another backend.
    """
    lower = jax.ffi.ffi_lowering(f"wideep_{name}", has_side_effect=has_side_effect)

    def _lowering(ctx: Any, *operands: Any, **params: Any) -> Any:
        ctx = ctx.replace(avals_in=ctx.avals_in[taken])
        return lower(ctx, *operands[taken], **{key: c_type(params[key]) for key, c_type in attrs.items()})

    return _lowering


def _custom_call_primitive(name: str, outputs: Callable[..., list[Spec]]) -> Primitive:
    """A primitive with a shape rule and a batching rule, still without a lowering.

    `outputs` is the shape rule: from the operands' avals and the keyword parameters to the results.
    """
    primitive = Primitive(f"wideep_{name}")
    primitive.multiple_results = True

    def _abstract(*avals: Any, **params: Any) -> list[Any]:
        varying = _core.standard_vma_rule(primitive.name, *avals)
        return [_result_aval(shape, dtype, varying) for shape, dtype in outputs(*avals, **params)]

    def _batching(args: Sequence[Any], dims: Sequence[Any], **params: Any) -> tuple[list[Any], list[int]]:
        """The batch runs one after the other; an exchange thereby in the same order on every rank."""
        batched = [i for i, dim in enumerate(dims) if dim is not None]
        moved = [jnp.moveaxis(args[i], dims[i], 0) for i in batched]

        def one(*slices: Any) -> list[Any]:
            operands = list(args)
            for i, piece in zip(batched, slices, strict=True):
                operands[i] = piece
            return primitive.bind(*vary(operands), **params)

        results = jax.lax.map(lambda slices: one(*slices), tuple(moved))
        return results, [0] * len(results)

    primitive.def_abstract_eval(_abstract)
    batching.primitive_batchers[primitive] = _batching
    return primitive


def _result_aval(shape: tuple[int, ...], dtype: Any, varying: frozenset[Any]) -> Any:
    sharding = _core.get_cur_mesh_sharding(PartitionSpec(*[None] * len(shape)))
    manual = _core.ManualAxisType(varying=varying)
    return _core.ShapedArray(shape, jnp.dtype(dtype), sharding=sharding, manual_axis_type=manual)


def _not_eager(name: str, *_: Any, **__: Any) -> Any:
    raise ValueError(
        f"{name}: exchange ops run inside jax.shard_map under jax.jit; wrap the caller in jax.jit"
    )


def _plan_outputs(
    rank: Any, topk_idx: Any, *, num_experts: int, num_ranks: int, capacity: int, **_: Any
) -> list[Spec]:
    return [
        ((num_experts // num_ranks,), jnp.int32),  # group_sizes
        ((), jnp.int32),  # num_rows
        ((), jnp.int32),  # overflow
        ((num_experts,), jnp.int32),  # tokens_per_expert
        (topk_idx.shape, jnp.int32),  # dest_rank
        (topk_idx.shape, jnp.int32),  # dest_row
        ((capacity,), jnp.int32),  # row_source
        ((capacity,), jnp.int32),  # arrival_rows
        ((num_ranks,), jnp.int32),  # rows_per_source
    ]


def _dispatch_outputs(x: Any, weights: Any, *_: Any, capacity: int, **__: Any) -> list[Spec]:
    return [((capacity, x.shape[1]), x.dtype), ((capacity,), jnp.float32)]


def _dispatch_grad_outputs(
    drows: Any, drow_weights: Any, dest_rank: Any, *_: Any, form: str, **__: Any
) -> list[Spec]:
    num_tokens, top_k = dest_rank.shape
    dx = ((num_tokens, drows.shape[1]), drows.dtype)
    return [dx, ((num_tokens, top_k), jnp.float32), *_combine_scratch(drows, form)]


def _combine_outputs(y: Any, row_weights: Any, dest_rank: Any, *_: Any, form: str, **__: Any) -> list[Spec]:
    return [((dest_rank.shape[0], y.shape[1]), y.dtype), *_combine_scratch(y, form)]


def _combine_scratch(rows: Any, form: str) -> list[Spec]:
    """The sums of one form; XLA keeps them in memory that peers can read."""
    return [(rows.shape, rows.dtype)] if form == "reduce" else []


def _combine_grad_outputs(dout: Any, y: Any, row_weights: Any, *_: Any, **__: Any) -> list[Spec]:
    return [(y.shape, y.dtype), (row_weights.shape, jnp.float32)]


def _quantize_outputs(x: Any) -> list[Spec]:
    tokens, hidden = x.shape
    return [(x.shape, jnp.float8_e4m3fn), ((tokens, hidden // 128), jnp.float32)]


def _ll_dispatch_outputs(rank: Any, payload: Any, *_: Any, **params: Any) -> list[Spec]:
    return _packed_rows(payload.shape[1], **params)


def _ll_dispatch_recv_outputs(*_: Any, hidden: int, **params: Any) -> list[Spec]:
    return _packed_rows(hidden, **params)


def _packed_rows(
    hidden: int, *, num_experts: int, num_ranks: int, chunk: int, rows_dtype: Any, **_: Any
) -> list[Spec]:
    packed = (num_experts // num_ranks, num_ranks * chunk)
    with_scales = rows_dtype == jnp.float8_e4m3fn
    return [
        ((*packed, hidden), rows_dtype),  # rows
        ((*packed, hidden // 128) if with_scales else (0, 0, 0), jnp.float32),  # row_scales
        (packed[:1], jnp.int32),  # counts
        (packed, jnp.int32),  # row_source
    ]


def _ll_combine_outputs(y: Any, topk_weights: Any, *_: Any, **__: Any) -> list[Spec]:
    return [((topk_weights.shape[0], y.shape[2]), y.dtype)]


def _ll_combine_recv_outputs(
    ticket: Any, topk_weights: Any, *_: Any, hidden: int, out_dtype: Any, **__: Any
) -> list[Spec]:
    return [((topk_weights.shape[0], hidden), out_dtype)]


def _ll_combine_grad_outputs(dout: Any, y: Any, topk_weights: Any, *_: Any, **__: Any) -> list[Spec]:
    return [(y.shape, y.dtype), (topk_weights.shape, jnp.float32)]


_GROUP: Attrs = {"group": np.int64}
_TAIL: Attrs = {"zero_tail": np.bool_}
_LL: Attrs = {"num_experts": np.int64, "chunk": np.int64}

# C++'s DispatchForm and CombineForm.
_DISPATCH_FORMS = ("push", "pull")
_COMBINE_FORMS = ("pull", "push", "reduce")
_DISPATCH_FORM: Attrs = {"form": lambda form: np.int32(_DISPATCH_FORMS.index(form))}
_COMBINE_FORM: Attrs = {"form": lambda form: np.int32(_COMBINE_FORMS.index(form))}

# Of the plan's arrays, which are the last six operands (_plan_operands), the CPU takes only the first.
_plan_p = _exchange_primitive(
    "plan",
    _plan_outputs,
    _GROUP | {"num_experts": np.int64, "overflow_is_error": np.bool_},
    cuda_operands=slice(1, None),
    cuda_attrs={},
)
_dispatch_p = _exchange_primitive(
    "dispatch", _dispatch_outputs, _GROUP | _TAIL, cpu_operands=slice(5), cuda_attrs=_DISPATCH_FORM
)
_dispatch_grad_p = _exchange_primitive(
    "dispatch_grad", _dispatch_grad_outputs, _GROUP, cpu_operands=slice(6), cuda_attrs=_COMBINE_FORM
)
_combine_p = _exchange_primitive(
    "combine", _combine_outputs, _GROUP, cpu_operands=slice(6), cuda_attrs=_COMBINE_FORM
)
_combine_grad_p = _exchange_primitive(
    "combine_grad", _combine_grad_outputs, _GROUP | _TAIL, cpu_operands=slice(6), cuda_attrs={}
)
_quantize_p = _exchange_primitive("quantize", _quantize_outputs, {})
# CUDA knows its rank, casts to FP8 itself, and its combine takes topk_idx, the last operand, too.
_WIRE: Attrs = {"quantize": np.bool_}
_ll_dispatch_p = _exchange_primitive(
    "ll_dispatch",
    _ll_dispatch_outputs,
    _GROUP | _LL | _TAIL,
    cuda_operands=slice(1, None),
    cuda_attrs=_WIRE,
)
_ll_combine_p = _exchange_primitive(
    "ll_combine", _ll_combine_outputs, _GROUP | _LL, cpu_operands=slice(4), cuda_attrs={}
)
_ll_combine_grad_p = _exchange_primitive(
    "ll_combine_grad",
    _ll_combine_grad_outputs,
    _GROUP | _LL | _TAIL,
    cpu_operands=slice(5),
    cuda_attrs={},
)

_ll_dispatch_send_p = _send_primitive("ll_dispatch_send", _GROUP | _LL | _WIRE)
_ll_dispatch_recv_p = _half_primitive(
    "ll_dispatch_recv", _ll_dispatch_recv_outputs, _GROUP | _LL | _TAIL | _WIRE
)
_ll_combine_send_p = _send_primitive("ll_combine_send", _GROUP | _LL)
_ll_combine_recv_p = _half_primitive("ll_combine_recv", _ll_combine_recv_outputs, _GROUP | _LL)


# ---- kernels of one GPU: csrc/gemm ----


def _workspace_spec(num_groups: int) -> Spec:
    """What grouped_matmul.h calls GroupedMatmulWorkspaceBytes; the handlers check it."""
    return (16 * (1 + num_groups),), jnp.uint8


def _grouped_matmul_outputs(
    rows: Any, w: Any, group_sizes: Any, *, transpose_w: bool, out_dtype: Any, **_: Any
) -> list[Spec]:
    columns = w.shape[1 if transpose_w else 2]
    return [((*rows.shape[:-1], columns), out_dtype), _workspace_spec(group_sizes.shape[0])]


def _grouped_matmul_weight_grad_outputs(
    rows: Any, dout: Any, group_sizes: Any, *, out_dtype: Any
) -> list[Spec]:
    num_groups = group_sizes.shape[0]
    return [((num_groups, rows.shape[-1], dout.shape[-1]), out_dtype), _workspace_spec(num_groups)]


def _quantize_rows_outputs(x: Any) -> list[Spec]:
    return [((x.shape[0], wire_row_bytes(x.shape[1])), jnp.uint8)]


def _swiglu_outputs(hidden: Any, group_sizes: Any) -> list[Spec]:
    return [((*hidden.shape[:-1], hidden.shape[-1] // 2), hidden.dtype)]


def _swiglu_grad_outputs(hidden: Any, dout: Any, group_sizes: Any) -> list[Spec]:
    return [(hidden.shape, hidden.dtype)]


_grouped_matmul_p = _kernel_primitive(
    "grouped_matmul", _grouped_matmul_outputs, {"transpose_w": np.bool_, "zero_tail": np.bool_}
)
_grouped_matmul_weight_grad_p = _kernel_primitive(
    "grouped_matmul_weight_grad", _grouped_matmul_weight_grad_outputs, {}
)
_quantize_rows_p = _kernel_primitive("quantize_rows", _quantize_rows_outputs, {})
_swiglu_p = _kernel_primitive("swiglu", _swiglu_outputs, {})
_swiglu_grad_p = _kernel_primitive("swiglu_grad", _swiglu_grad_outputs, {})


def grouped_matmul(rows, w, group_sizes, transpose_w, out_dtype, zero_tail):
    """out[rows of g] = rows[rows of g] @ w[g], or @ w[g].T; [m, d] or [groups, cap, d]."""
    operands = vary([rows, w, group_sizes])
    out_dtype = jnp.dtype(out_dtype)
    return _grouped_matmul_p.bind(
        *operands, transpose_w=transpose_w, out_dtype=out_dtype, zero_tail=zero_tail
    )[0]


def grouped_matmul_weight_grad(rows, dout, group_sizes, out_dtype):
    """dw[g] = rows[rows of g].T @ dout[rows of g]."""
    operands = vary([rows, dout, group_sizes])
    return _grouped_matmul_weight_grad_p.bind(*operands, out_dtype=jnp.dtype(out_dtype))[0]


def swiglu(hidden, group_sizes):
    """silu(gate) * up on the rows of groups; the others are left unspecified."""
    return _swiglu_p.bind(*vary([hidden, group_sizes]))[0]


def swiglu_grad(hidden, dout, group_sizes):
    return _swiglu_grad_p.bind(*vary([hidden, dout, group_sizes]))[0]


# ---- the ops, as functions on one rank's arrays ----
# Shapes and meanings are those of reference.py, whose functions have the same names and signatures. All
# operands must vary over the same axes: the public ops see to it.


def plan(topk_idx, group, capacity, overflow_is_error):
    operands = vary([jax.lax.axis_index(group.axis), topk_idx])
    return _plan_p.bind(
        *operands,
        group=group.handle,
        num_experts=group.num_experts,
        num_ranks=group.num_ranks,
        capacity=capacity,
        overflow_is_error=overflow_is_error,
    )


def _plan_operands(plan):
    return [
        plan.dest_rank,
        plan.dest_row,
        plan.num_rows,
        plan.row_source,
        plan.arrival_rows,
        plan.rows_per_source,
    ]


def dispatch(x, weights, plan, zero_tail):
    return _dispatch_p.bind(
        *vary([x, weights, *_plan_operands(plan)]),
        group=plan.group.handle,
        capacity=plan.capacity,
        zero_tail=zero_tail,
        form=plan.group.dispatch_form,
    )


def dispatch_grad(drows, drow_weights, plan):
    operands = vary([drows, drow_weights, *_plan_operands(plan)])
    form = _combine_form(plan.group)
    return _dispatch_grad_p.bind(*operands, group=plan.group.handle, form=form)[:2]


def combine(y, row_weights, plan):
    operands = vary([y, row_weights, *_plan_operands(plan)])
    return _combine_p.bind(*operands, group=plan.group.handle, form=_combine_form(plan.group))[0]


def _combine_form(group):
    """Only CUDA's handlers have forms."""
    return group.combine_form if group.backend == "cuda" else "auto"


def combine_grad(dout, y, row_weights, plan, zero_tail):
    operands = vary([dout, y, row_weights, *_plan_operands(plan)])
    return _combine_grad_p.bind(*operands, group=plan.group.handle, zero_tail=zero_tail)


def quantize(x):
    return _quantize_p.bind(x)


def wire_row_bytes(hidden):
    """Bytes of a row on the FP8 wire: values, then a float32 scale for 128 of them, then zeros up to 16 bytes."""
    return (hidden + hidden // 128 * 4 + 15) // 16 * 16


def quantize_rows(x):
    """FP8 rows as they travel (wire_row_bytes) on CUDA; uint8."""
    return _quantize_rows_p.bind(x)[0]


def _ll_params(group):
    return {"group": group.handle, "num_experts": group.num_experts, "chunk": group.chunk}


def ll_dispatch(payload, scales, topk_idx, group, rows_dtype, zero_tail, quantize=False):
    """`quantize`: payload is not FP8 but travels so; on CUDA only."""
    no_scales = jnp.zeros((0, 0), jnp.float32)
    rank = jax.lax.axis_index(group.axis)
    operands = vary([rank, payload, no_scales if scales is None else scales, topk_idx])
    received = _ll_dispatch_p.bind(
        *operands,
        **_ll_params(group),
        num_ranks=group.num_ranks,
        rows_dtype=jnp.dtype(rows_dtype),
        zero_tail=zero_tail,
        quantize=quantize,
    )
    return _without_empty_scales(*received)


def ll_dispatch_send(x, topk_idx, group, quantize):
    """The ticket."""
    return _ll_dispatch_send_p.bind(*vary([x, topk_idx]), **_ll_params(group), quantize=quantize)[0]


def ll_dispatch_recv(ticket, topk_idx, group, rows_dtype, zero_tail, quantize):
    received = _ll_dispatch_recv_p.bind(
        *vary([ticket, topk_idx]),
        **_ll_params(group),
        num_ranks=group.num_ranks,
        hidden=group.hidden,
        rows_dtype=jnp.dtype(rows_dtype),
        zero_tail=zero_tail,
        quantize=quantize,
    )
    return _without_empty_scales(*received)


def _without_empty_scales(rows, row_scales, counts, row_source):
    return rows, (row_scales if row_scales.size else None), counts, row_source


def ll_combine(y, topk_weights, topk_idx, counts, row_source, group):
    operands = vary([y, topk_weights, counts, row_source, topk_idx])
    return _ll_combine_p.bind(*operands, **_ll_params(group))[0]


def ll_combine_send(y, topk_idx, counts, row_source, group):
    """The ticket."""
    return _ll_combine_send_p.bind(*vary([y, counts, row_source, topk_idx]), **_ll_params(group))[0]


def ll_combine_recv(ticket, topk_weights, topk_idx, group, out_dtype):
    params = _ll_params(group) | {"hidden": group.hidden, "out_dtype": jnp.dtype(out_dtype)}
    return _ll_combine_recv_p.bind(*vary([ticket, topk_weights, topk_idx]), **params)[0]


def ll_combine_grad(dout, y, topk_weights, topk_idx, counts, row_source, group, zero_tail):
    operands = vary([dout, y, topk_weights, counts, row_source, topk_idx])
    return _ll_combine_grad_p.bind(*operands, **_ll_params(group), zero_tail=zero_tail)
