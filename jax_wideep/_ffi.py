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
from jax._src.lib.mlir.dialects import hlo as _hlo
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


def exchange_primitive(
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
        mlir.register_lowering(primitive, _apart(lower), platform="cuda")
    return primitive


def half_primitive(name: str, outputs: Callable[..., list[Spec]], attrs: Attrs) -> Primitive:
    """Half of an exchange, on CUDA only; arguments as in _custom_call_primitive."""
    primitive = exchange_primitive(name, outputs, attrs, cuda_attrs={})

    def _batching(*_: Any, **__: Any) -> Any:
        # One after the other, all the first halves would come before all the second ones.
        raise ValueError(f"{name}: the halves cannot run under jax.vmap; use ll_dispatch and ll_combine")

    batching.primitive_batchers[primitive] = _batching
    return primitive


def send_primitive(name: str, attrs: Attrs) -> Primitive:
    """The first half: its result, a ticket, says which call the second half belongs to, and comes before it."""
    primitive = half_primitive(name, lambda *_, **__: [((1,), jnp.uint32)], attrs)

    def _jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> tuple[list[Any], list[Any]]:
        # Gradients go past the halves: low_latency.py has those of the whole op.
        results = primitive.bind(*primals, **params)
        return results, [ad.Zero(_core.typeof(result).to_tangent_aval()) for result in results]

    ad.primitive_jvps[primitive] = _jvp
    return primitive


def kernel_primitive(name: str, outputs: Callable[..., list[Spec]], attrs: Attrs) -> Primitive:
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


def _apart(lower: Callable[..., Any]) -> Callable[..., Any]:
    """A lowering whose operands and results XLA's passes cannot join with what comes before and after.

    XLA for GPUs puts a custom call into one fusion with slices that it reads and updates that it goes into
    (DynamicSliceFusion). A call with several results and a side effect then stays where it was, too: it runs twice, the
    second time wherever the scheduler puts it, where a rank waits for what was overwritten.
    """

    def _lowering(ctx: Any, *operands: Any, **params: Any) -> Any:
        results = lower(ctx, *_hlo.OptimizationBarrierOp(operands).results, **params)
        return list(_hlo.OptimizationBarrierOp(results).results)

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
