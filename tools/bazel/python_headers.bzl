"""What the building Python has installed: its own headers, nanobind, and jaxlib's FFI headers.

The interpreter is $PYTHON_BIN_PATH, or else the python3 of the PATH. Its folders are linked, not copied.
"""

_PROBE = """
import importlib.util, pathlib, sys, sysconfig
spec = importlib.util.find_spec("nanobind")
if spec is None or not spec.submodule_search_locations:
    sys.exit("nanobind is not installed in the building Python: pip install 'nanobind>=2.4'")
print(pathlib.Path(spec.submodule_search_locations[0]))
print(sysconfig.get_paths()["include"])
"""

_BUILD = """
package(default_visibility = ["//visibility:public"])

cc_library(
    name = "python",
    hdrs = glob(["python/**"]),
    includes = ["python"],
)

cc_library(
    name = "xla_ffi_api",
    hdrs = glob(["jaxlib/xla/ffi/api/**/*.h"]),
    includes = ["jaxlib"],
)

cc_library(
    name = "nanobind",
    srcs = ["nanobind/src/nb_combined.cpp"] + glob(["nanobind/src/*.h"]),
    hdrs = glob(["nanobind/include/**/*.h", "nanobind/ext/robin_map/include/**/*.h"]),
    copts = ["-std=c++17", "-fvisibility=hidden", "-fno-strict-aliasing"],
    # nanobind's headers see it too: both sides must agree on what an assertion prints.
    defines = ["NB_COMPACT_ASSERTIONS"],
    includes = ["nanobind/ext/robin_map/include", "nanobind/include"],
    linkstatic = True,
    textual_hdrs = glob(["nanobind/src/*.cpp"], exclude = ["nanobind/src/nb_combined.cpp"]),
    deps = [":python"],
)
"""

def _run(repository_ctx, arguments):
    result = repository_ctx.execute(arguments)
    if result.return_code != 0:
        fail("%s: %s" % (arguments[0], result.stderr.strip() or result.stdout.strip()))
    return result.stdout.strip().split("\n")

def _python_headers_impl(repository_ctx):
    python = repository_ctx.os.environ.get("PYTHON_BIN_PATH") or repository_ctx.which("python3")
    if not python:
        fail("no Python found: set PYTHON_BIN_PATH, or put python3 on the PATH")
    ffi_include_dir = repository_ctx.path(Label("//:tools/ffi_include_dir.py"))
    nanobind, python_include = _run(repository_ctx, [python, "-c", _PROBE])
    jaxlib_include = _run(repository_ctx, [python, ffi_include_dir])[0]
    if not repository_ctx.path(python_include + "/Python.h").exists:
        fail("%s holds no Python.h: install this Python's development headers" % python_include)
    repository_ctx.symlink(python_include, "python")
    repository_ctx.symlink(jaxlib_include + "/xla", "jaxlib/xla")
    for folder in ["include", "src", "ext"]:
        repository_ctx.symlink(nanobind + "/" + folder, "nanobind/" + folder)
    repository_ctx.file("BUILD", _BUILD)

python_headers = repository_rule(
    implementation = _python_headers_impl,
    environ = ["PATH", "PYTHON_BIN_PATH"],
    local = True,  # what is installed may change between two builds
)
