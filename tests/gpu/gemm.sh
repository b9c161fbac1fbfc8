#!/bin/bash
# Builds (unless $BUILD_DIR has the programs already), checks and times the grouped GEMM on the GPU of this
# machine. Logs go to $OUT, or to $BUILD_DIR/logs. Arguments name the steps; default: all of
# test sanitize bench peers jax. The step jax needs the module _wideep_cuda for python3 in $MODULE_DIR.
set -u -o pipefail
cd "$(dirname "$0")/../.."
BUILD_DIR=${BUILD_DIR:-build/gemm}
MODULE_DIR=${MODULE_DIR:-$BUILD_DIR}
LOGS=${OUT:-$BUILD_DIR/logs}
mkdir -p "$LOGS"
failed=0

step() {  # seconds name command..
  local limit=$1 name=$2
  shift 2
  echo "== $name"
  timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$LOGS/$name.log"
  local rc=${PIPESTATUS[0]}
  if [ "$rc" != 0 ]; then echo "== $name failed: $rc"; failed=1; fi
  return "$rc"
}

if [ ! -x "$BUILD_DIR/gemm_test" ]; then
  step 300 build bash -c "cmake -S . -B $BUILD_DIR -DWIDEEP_CUDA=ON -DWIDEEP_TESTS=ON -DPython_EXECUTABLE=$(command -v python3) &&
    cmake --build $BUILD_DIR -j2 --target gemm_test gemm_benchmark _wideep_cuda" || exit 1
  if grep -q C7510 "$LOGS/build.log"; then echo "wgmma is serialised"; exit 1; fi
fi

for name in ${@:-test sanitize bench peers jax}; do
  case $name in
    test) step 120 test "$BUILD_DIR/gemm_test" || exit 1 ;;
    sanitize)
      for tool in memcheck synccheck initcheck; do
        step 120 "$tool" compute-sanitizer --tool $tool --error-exitcode 9 "$BUILD_DIR/gemm_test" \
          OneTile RaggedRows EmptyGroups Slabs TailIsLeft RandomRagged
      done ;;
    bench) step 120 bench "$BUILD_DIR/gemm_benchmark" ;;
    jax)
      XLA_FLAGS=--xla_gpu_graph_min_graph_size=1 \
        step 200 jax python3 tests/gpu/gemm_jax.py "$MODULE_DIR" --time --ragged-dot ;;
    peers) step 150 peers python3 benchmarks/gemm_peers.py ;;
    *) echo "unknown step $name"; exit 2 ;;
  esac
done
exit $failed
