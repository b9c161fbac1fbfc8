#!/bin/bash
# Compiles the CUDA module, GPU tests and benchmarks with nvcc and checks what came out; no GPU needed. Where there is no nvcc it says so and
# succeeds. Where PYTHON has nvidia-nvshmem-cu13, or WIDEEP_NVSHMEM_HOME has its include and lib, the module
# _wideep_nvshmem too.
#
#   tools/check_cuda.sh [build folder]       PYTHON: the interpreter to build for (python3)
#
# Checked: it compiles, within ten minutes of two cores; wgmma is not serialised (nvcc's C7510); the module needs
# nothing of libcuda at load time, so that it imports on a machine without a driver, and no library of the toolkit.
set -u -o pipefail
cd "$(dirname "$0")/.."
BUILD_DIR=${1:-build/check_cuda}
PYTHON=${PYTHON:-python3}
LIMIT_S=600

if ! command -v nvcc >/dev/null && [ ! -x "${CUDACXX:-}" ]; then
  echo "check_cuda: no nvcc here, nothing checked"
  exit 0
fi
mkdir -p "$BUILD_DIR"
log=$BUILD_DIR/build.log
fail() { echo "check_cuda: $*"; exit 1; }

began=$SECONDS
{
  cmake -S . -B "$BUILD_DIR" -DWIDEEP_CUDA=ON -DWIDEEP_TESTS=ON -DPython_EXECUTABLE="$(command -v "$PYTHON")" &&
    timeout $LIMIT_S cmake --build "$BUILD_DIR" --clean-first --parallel 2 --target _wideep_cuda
} 2>&1 | tee "$log" | grep -E "warning:|error:|C7510|FAILED"
[ "${PIPESTATUS[0]}" = 0 ] || { tail -n 30 "$log"; fail "the build failed, or took more than $LIMIT_S s"; }
seconds=$((SECONDS - began))
if grep -q C7510 "$log"; then fail "wgmma is serialised (C7510), see $log"; fi

module=$(ls "$BUILD_DIR"/_wideep_cuda*.so) || fail "no module in $BUILD_DIR"
driver_symbols=$(nm -D --undefined-only "$module" | grep -oE ' cu[A-Z][A-Za-z0-9]*' || true)
if [ -n "$driver_symbols" ]; then fail "$module refers to libcuda:$driver_symbols"; fi
libraries=$(readelf -d "$module" | sed -n 's/.*NEEDED.*\[\(.*\)\].*/\1/p')
unexpected=$(grep -vE '^(libc|libm|libdl|librt|libpthread|libstdc\+\+|libgcc_s|ld-linux-x86-64|ld-linux-aarch64)\.so' \
  <<<"$libraries")
if [ -n "$unexpected" ]; then fail "$module needs $unexpected"; fi
PYTHONPATH=$BUILD_DIR "$PYTHON" -c "import _wideep_cuda; print(sorted(_wideep_cuda.handlers()))" ||
  fail "the module does not import without a driver"
echo "check_cuda: $module, $seconds s"

# What runs on a GPU beside it: compiled, not run.
programs=(exchange_gpu_test two_hop_gpu_test low_latency_gpu_test gemm_test swiglu_test
  exchange_benchmark low_latency_benchmark peer_copy_benchmark gemm_benchmark)
timeout $LIMIT_S cmake --build "$BUILD_DIR" --parallel 2 --target "${programs[@]}" >"$log" 2>&1 ||
  { grep -E "error|FAILED" "$log" | head -n 30; fail "the build of ${programs[*]} failed"; }
echo "check_cuda: ${#programs[@]} programs"

nvshmem=${WIDEEP_NVSHMEM_HOME:-$("$PYTHON" -c 'import nvidia.nvshmem as m; print(list(m.__path__)[0])' 2>/dev/null)}
if [ -z "$nvshmem" ]; then
  echo "check_cuda: no nvidia-nvshmem-cu13 here, _wideep_nvshmem not checked"
  exit 0
fi
{
  cmake -S . -B "$BUILD_DIR" -DWIDEEP_NVSHMEM=ON -DWIDEEP_NVSHMEM_HOME="$nvshmem" &&
    timeout $LIMIT_S cmake --build "$BUILD_DIR" --parallel 2 --target _wideep_nvshmem
} >"$log" 2>&1 || { tail -n 30 "$log"; fail "the build of _wideep_nvshmem failed"; }
module=$(ls "$BUILD_DIR"/_wideep_nvshmem*.so) || fail "no module _wideep_nvshmem in $BUILD_DIR"
PYTHONPATH=$BUILD_DIR "$PYTHON" -c "
import ctypes
ctypes.CDLL('$nvshmem/lib/libnvshmem_host.so.3', mode=ctypes.RTLD_GLOBAL)
import _wideep_nvshmem
print('NVSHMEM', _wideep_nvshmem.version())" || fail "$module does not import without a GPU"
echo "check_cuda: $module"
