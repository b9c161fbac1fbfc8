#!/bin/bash
# Checks and times the grouped GEMM on the GPU of this machine. Builds first, unless $BUILD_DIR has the programs
# and the module _wideep_cuda for this python3. Logs go to $OUT, or to $BUILD_DIR/logs.
#
#   tests/gpu/gemm.sh [step ..]
#
#   test      the C++ tests
#   sanitize  a part of them under compute-sanitizer, three tools at once
#   pytest    the public functions under JAX
#   layer     benchmarks/layer_gpu.py
#   bench     benchmarks/gemm.cu
#   peers     benchmarks/gemm_peers.py
#   jax       benchmarks/gemm_jax.py
#
# Default: test sanitize pytest layer, at most 8 minutes. LAYER, BENCH: arguments of
# layer_gpu.py and gemm.cu.
set -u -o pipefail
cd "$(dirname "$0")/../.."
. tests/gpu/steps.sh

if [ ! -x "$BUILD_DIR/gemm_test" ]; then
  step 600 build bash -c "cmake -S . -B $BUILD_DIR -DWIDEEP_CUDA=ON -DWIDEEP_TESTS=ON -DPython_EXECUTABLE=$(command -v python3) &&
    cmake --build $BUILD_DIR -j2 --target gemm_test swiglu_test gemm_benchmark _wideep_cuda" || exit 1
  if grep -q C7510 "$LOGS/build.log"; then echo "wgmma is serialised"; exit 1; fi
fi
cp "$BUILD_DIR"/_wideep_cuda*.so jax_wideep/ || exit 1
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1

sanitize() {
  local tool pids=() rc=0
  for tool in memcheck synccheck initcheck; do
    (timeout --kill-after=5 90 compute-sanitizer --tool $tool --error-exitcode 9 "$BUILD_DIR/swiglu_test" &&
      timeout --kill-after=5 90 compute-sanitizer --tool $tool --error-exitcode 9 "$BUILD_DIR/gemm_test" \
        OneTile RaggedRows EmptyGroups Slabs TailIsLeft) >"$LOGS/$tool.log" 2>&1 &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || rc=1; done
  tail -n 4 "$LOGS"/{memcheck,synccheck,initcheck}.log
  return $rc
}

for name in ${@:-test sanitize pytest layer}; do
  case $name in
    test) step 60 test bash -c "$BUILD_DIR/gemm_test && $BUILD_DIR/swiglu_test" || exit 1 ;;
    sanitize) echo "== sanitize"; sanitize || { echo "== sanitize failed"; failed=1; } ;;
    pytest)
      JAX_PLATFORMS=cuda,cpu XLA_FLAGS=--xla_gpu_graph_min_graph_size=1 \
        step 150 pytest python3 -m pytest -q -m gpu tests/gpu/test_grouped_matmul_gpu.py \
        --durations=5 -p no:cacheprovider ;;
    layer) step 150 layer python3 benchmarks/layer_gpu.py ${LAYER:-} ;;
    bench) step 120 bench "$BUILD_DIR/gemm_benchmark" ${BENCH:-} ;;
    peers) step 150 peers python3 benchmarks/gemm_peers.py ;;
    jax) step 200 jax python3 benchmarks/gemm_jax.py --ragged-dot ;;
    *) echo "unknown step $name"; exit 2 ;;
  esac
done
exit $failed
