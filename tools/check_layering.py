"""Check that nothing imports or includes what lies above it (docs/design.md, "The house"), and that sources.bzl
lists all sources and headers.

    python tools/check_layering.py [root]

Prints one line per breach and exits with status 1 if there is any.
"""

from __future__ import annotations

import ast
import pathlib
import re
import sys
from collections.abc import Iterator

# The package's modules, lowest first. A module may import those before it, and its own submodules.
PYTHON_LAYERS = (
    "_types", "_ffi", "_exchange_ops", "_kernels", "_bootstrap", "_masking", "_host_transport", "_nvshmem",
    "_peer_transport", "group", "_check", "quantize", "reference", "plan", "exchange", "low_latency",
    "_grouped_matmul_loop", "grouped_matmul", "_swiglu", "_expert_bias", "routing", "placement", "replicas",
    "_rounds", "_microbatches", "moe", "load", "flax", "families", "bench", "report", "launch",
)  # fmt: skip

# What only some modules may import.
ALLOWED_IMPORTERS = {
    "jax._src": ("_ffi",),
    "jax_wideep._wideep_cpu": ("_ffi",),
    "jax_wideep._wideep_cuda": ("_ffi",),
    "jax_wideep._wideep_nvshmem": ("_ffi",),
    "flax": ("flax", "bench"),
}

# The folders of csrc, lowest first, and what no file of csrc may include.
CSRC_LAYERS = (("core",), ("transport",), ("ep", "gemm"))
NOT_IN_CSRC = re.compile(r"xla/|xla_ffi/|nanobind|pybind11|Python\.h|jaxlib/")
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)
CPP_SUFFIXES = {".cc", ".h", ".cu", ".cuh"}


def main() -> int:
    root = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parent.parent)
    breaches = [*python_breaches(root / "jax_wideep"), *cpp_breaches(root), *source_list_breaches(root)]
    print(*breaches, sep="\n", end="\n" if breaches else "")
    return 1 if breaches else 0


def python_breaches(package: pathlib.Path) -> Iterator[str]:
    for path in sorted(package.rglob("*.py")):
        layer = path.relative_to(package).parts[0].removesuffix(".py")
        if layer == "__init__":
            continue  # re-exports everything
        if layer not in PYTHON_LAYERS:
            yield f"{path}: {layer} has no place in PYTHON_LAYERS of {pathlib.Path(__file__).name}; give it one"
            continue
        for line, name in imported_names(path):
            for prefix, importers in ALLOWED_IMPORTERS.items():
                if is_within(name, prefix) and layer not in importers:
                    yield f"{path}:{line}: only {' and '.join(importers)} may import {prefix}"
            own = name.split(".")
            if own[0] != package.name or len(own) == 1 or own[1] not in PYTHON_LAYERS:
                continue
            if PYTHON_LAYERS.index(own[1]) > PYTHON_LAYERS.index(layer):
                yield f"{path}:{line}: {layer} may not import {own[1]}, which lies above it"


def imported_names(path: pathlib.Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, including importlib.import_module of a literal."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:  # relative: counted from the file's own package
                folder = path.parts[path.parts.index("jax_wideep") : -node.level]
                module = ".".join([*folder, module]).rstrip(".")
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant):
                    yield node.lineno, str(argument.value)


def is_within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def cpp_breaches(root: pathlib.Path) -> Iterator[str]:
    height = {folder: i for i, folders in enumerate(CSRC_LAYERS) for folder in folders}
    for path in sorted((root / "csrc").rglob("*")):
        if path.suffix not in CPP_SUFFIXES:
            continue
        folder = path.relative_to(root / "csrc").parts[0]
        if folder not in height:
            yield f"{path}: csrc/{folder} has no place in CSRC_LAYERS of {pathlib.Path(__file__).name}; give it one"
            continue
        for included in INCLUDE.findall(path.read_text()):
            if NOT_IN_CSRC.match(included):
                yield f"{path}: csrc may not include {included}: it knows neither XLA nor Python"
            parts = included.split("/")
            if parts[0] == "csrc" and height.get(parts[1], -1) > height[folder]:
                yield f"{path}: csrc/{folder} may not include {included}, which lies above it"
    for path in sorted((root / "xla_ffi").rglob("*.cu*")):
        yield f"{path}: kernels live in csrc; nvcc never sees the FFI headers"


def source_list_breaches(root: pathlib.Path) -> Iterator[str]:
    """CMake finds headers by itself, Bazel only those that sources.bzl lists."""
    lists: dict[str, list[str]] = {}
    exec((root / "sources.bzl").read_text(), lists)  # lists of strings, which are Python as well
    listed = {path for name, paths in lists.items() if name.isupper() for path in paths}
    there = {
        str(path.relative_to(root))
        for folder in ("csrc", "xla_ffi")
        for path in (root / folder).rglob("*")
        if path.suffix in CPP_SUFFIXES
    }
    for path in sorted(there - listed):
        yield f"{path}: not in sources.bzl"
    for path in sorted(path for path in listed - there if not path.startswith("tests/")):
        yield f"sources.bzl: {path} is not there"
    host = {*lists["HOST_SOURCES"], *lists["HOST_HEADERS"], *lists["ROW_KERNEL_SOURCE"]}
    for path in sorted(host & there):
        for included in INCLUDE.findall((root / path).read_text()):
            if included.startswith("csrc/") and included not in host:
                yield f"{path}: includes {included}, which is not in HOST_HEADERS of sources.bzl"


if __name__ == "__main__":
    sys.exit(main())
