#!/bin/bash
# Checks NVSHMEM under the backend "cuda" on the GPU of this machine: ranks share it under MPS, as one node and as
# virtual nodes. Builds first, unless $BUILD_DIR has the modules for this python3; needs the package nvidia-nvshmem-cu13.
# Logs go to $OUT, or to $BUILD_DIR/logs.
#
#   tests/gpu/nvshmem.sh [step ..]
#
#   one_node   low_latency_suite.py, exchange_suite.py and nvshmem_suite.py at each of $RANKS processes (default: 2 4 8),
#              arenas in NVSHMEM's memory
#   nodes      low_latency_suite.py and nvshmem_suite.py over virtual nodes, $NODES (default: 2x1 2x2 2x4 4x2 8x1; nodes x
#              ranks of each)
#
# Default: both, at most 12 minutes. CHECKS, LL_CHECKS, EXCHANGE_CHECKS: checks of the suites.
set -u -o pipefail
cd "$(dirname "$0")/../.."
. tests/gpu/steps.sh
RANKS=${RANKS:-2 4 8}
NODES=${NODES:-2x1 2x2 2x4 4x2 8x1}
LL_CHECKS=${LL_CHECKS:-values kept loop bad_index}
EXCHANGE_CHECKS=${EXCHANGE_CHECKS:-values one_token fp8 repeats}
# NVSHMEM's heap beside JAX's pools.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.06}
export NVSHMEM_SYMMETRIC_SIZE=${NVSHMEM_SYMMETRIC_SIZE:-2G}

if ! ls "$BUILD_DIR"/_wideep_nvshmem*.so >/dev/null 2>&1; then
  step 600 build bash -c "cmake -S . -B $BUILD_DIR -DWIDEEP_CUDA=ON -DWIDEEP_NVSHMEM=ON -DWIDEEP_TESTS=ON \
    -DPython_EXECUTABLE=$(command -v python3) &&
    cmake --build $BUILD_DIR -j4 --target _wideep_cuda _wideep_nvshmem" || exit 1
fi
cp "$BUILD_DIR"/_wideep_cuda*.so "$BUILD_DIR"/_wideep_nvshmem*.so jax_wideep/ || exit 1
start_mps

launch() {  # name ranks group's settings, script and checks..
  local name=$1 ranks=$2 group=$3
  shift 3
  WIDEEP_GROUP=$group step 130 "$name" python3 tests/gpu/launch.py --timeout 120 --xla-flag=--xla_gpu_autotune_level=0 \
    --xla-flag=--xla_gpu_graph_min_graph_size=1 "$ranks" "$@"
}

for name in ${@:-one_node nodes}; do
  case $name in
    one_node)
      for ranks in $RANKS; do
        launch nvshmem_one_node "$ranks" '{"transport": "nvshmem"}' tests/gpu/low_latency_suite.py $LL_CHECKS
        launch nvshmem_one_node "$ranks" '{"transport": "nvshmem"}' tests/gpu/exchange_suite.py $EXCHANGE_CHECKS
        launch nvshmem_one_node "$ranks" '{}' tests/gpu/nvshmem_suite.py ${CHECKS:-}
      done ;;
    nodes)
      for shape in $NODES; do
        nodes=${shape%x*} size=${shape#*x}
        export WIDEEP_NODE_SIZE=$size
        launch "nvshmem_$shape" $((nodes * size)) "{\"transport\": \"nvshmem\", \"node_size\": $size}" \
          tests/gpu/low_latency_suite.py $LL_CHECKS
        launch "nvshmem_$shape" $((nodes * size)) '{}' tests/gpu/nvshmem_suite.py ${CHECKS:-}
        unset WIDEEP_NODE_SIZE
      done ;;
    *) echo "unknown step $name"; exit 2 ;;
  esac
done
exit $failed
