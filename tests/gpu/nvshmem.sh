#!/bin/bash
# Checks NVSHMEM under the backend "cuda" on the GPU of this machine: ranks share it under MPS, as one node and as
# virtual nodes. Builds first, unless $BUILD_DIR has the modules for this python3; needs the package nvidia-nvshmem-cu13.
# Logs go to $OUT, or to $BUILD_DIR/logs.
#
#   tests/gpu/nvshmem.sh [step ..]
#
#   one_node   low_latency_suite.py, exchange_suite.py and nvshmem_suite.py at each of $RANKS processes (default: 2 4 8),
#              arenas in NVSHMEM's memory
#   nodes      the same over virtual nodes, all of whose rows go by NVSHMEM's puts, $NODES (default: 2x1 2x2 2x4 4x2 8x1 8/3;
#              nodes x ranks of each, or ranks / ranks of a node, of which the last one has what is left)
#   stores     the same over $STORE_NODES (default: 2x4 8/3), rows written in place by stores, as virtual nodes do by default
#   bench      times the throughput ops at 4096 tokens, hidden 7168, top 8 of 256 experts, 16 SMs a rank: 8 ranks as one
#              node, as $BENCH_NODES (default: 2x4) with stores, and with NVSHMEM's puts only; and the
#              ratios; figures go to $LOGS/bench_*.jsonl too
#
# Default: one_node, nodes and stores. CHECKS, LL_CHECKS, EXCHANGE_CHECKS: checks of the suites; BENCH_OPS: parts of names
# of the ops of benchmarks/exchange_gpu.py.
set -u -o pipefail
cd "$(dirname "$0")/../.."
. tests/gpu/steps.sh
RANKS=${RANKS:-2 4 8}
NODES=${NODES:-2x1 2x2 2x4 4x2 8x1 8/3}
STORE_NODES=${STORE_NODES:-2x4 8/3}
BENCH_NODES=${BENCH_NODES:-2x4}
BENCH_OPS=${BENCH_OPS:-"dispatch push;combine pull;dispatch grad pull;combine grad"}
LL_CHECKS=${LL_CHECKS:-values kept masked loop bad_index}
EXCHANGE_CHECKS=${EXCHANGE_CHECKS:-values one_token fp8 masked repeats transforms bad_index delayed}
LIMIT_S=180  # of each job
# NVSHMEM's heap beside JAX's pools.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.06}
BENCH_MEM_FRACTION=0.08  # of it each rank's rows, half a gigabyte, several times
export NVSHMEM_SYMMETRIC_SIZE=${NVSHMEM_SYMMETRIC_SIZE:-2G}

if ! ls "$BUILD_DIR"/_wideep_nvshmem*.so >/dev/null 2>&1; then
  step 600 build bash -c "cmake -S . -B $BUILD_DIR -DWIDEEP_CUDA=ON -DWIDEEP_NVSHMEM=ON -DWIDEEP_TESTS=ON \
    -DPython_EXECUTABLE=$(command -v python3) &&
    cmake --build $BUILD_DIR -j4 --target _wideep_cuda _wideep_nvshmem" || exit 1
fi
cp "$BUILD_DIR"/_wideep_cuda*.so "$BUILD_DIR"/_wideep_nvshmem*.so jax_wideep/ || exit 1
start_mps

launch() {  # name ranks group's settings, script and arguments..
  local name=$1 ranks=$2 group=$3
  shift 3
  WIDEEP_GROUP=$group step $((LIMIT_S + 10)) "$name" python3 tests/gpu/launch.py --timeout $LIMIT_S \
    --xla-flag=--xla_gpu_autotune_level=0 --xla-flag=--xla_gpu_graph_min_graph_size=1 "$ranks" "$@"
}
read_shape() {  # sets ranks and node_size
  case $1 in
    *x*) node_size=${1#*x} ranks=$((${1%x*} * node_size)) ;;
    */*) node_size=${1#*/} ranks=${1%/*} ;;
    *) echo "expected nodes x ranks, or ranks / ranks of a node, got $1"; exit 2 ;;
  esac
}

suites() {  # name ranks group's settings
  launch "$1" "$2" "$3" tests/gpu/low_latency_suite.py $LL_CHECKS
  launch "$1" "$2" "$3" tests/gpu/exchange_suite.py $EXCHANGE_CHECKS
  launch "$1" "$2" '{}' tests/gpu/nvshmem_suite.py ${CHECKS:-}
}

bench() {  # name group's settings
  local ops LIMIT_S=280
  IFS=';' read -r -a ops <<<"$BENCH_OPS"
  rm -f "$LOGS/$1.jsonl"
  XLA_PYTHON_CLIENT_MEM_FRACTION=$BENCH_MEM_FRACTION launch "$1" "$ranks" "$2" \
    benchmarks/exchange_gpu.py --sms 16 --form chain --ops "${ops[@]}" --json "$LOGS/$1.jsonl"
}

over_nodes() {  # shape
  read_shape "$1"
  export WIDEEP_NODE_SIZE=$node_size
  suites "nvshmem_${1//\//_}" "$ranks" "{\"transport\": \"nvshmem\", \"node_size\": $node_size}"
  unset WIDEEP_NODE_SIZE
}

for name in ${@:-one_node nodes stores}; do
  case $name in
    one_node)
      for ranks in $RANKS; do
        suites nvshmem_one_node "$ranks" '{"transport": "nvshmem"}'
      done ;;
    nodes)
      export WIDEEP_NVSHMEM_ONLY_PUTS=1
      for shape in $NODES; do over_nodes "$shape"; done
      unset WIDEEP_NVSHMEM_ONLY_PUTS ;;
    stores)
      for shape in $STORE_NODES; do over_nodes "$shape"; done ;;
    bench)
      read_shape "$BENCH_NODES"
      # Chunks of 8: nothing here is low-latency, and arenas' mirrors are of that size.
      bench bench_one_node '{"transport": "nvshmem", "chunk": 8}' &&
        bench bench_nodes "{\"transport\": \"nvshmem\", \"chunk\": 8, \"node_size\": $node_size}" &&
        WIDEEP_NVSHMEM_ONLY_PUTS=1 \
          bench bench_puts "{\"transport\": \"nvshmem\", \"chunk\": 8, \"node_size\": $node_size}"
      for way in nodes puts; do
        step 20 bench_ratio python3 tests/gpu/ratio.py "$LOGS/bench_one_node.jsonl" "$LOGS/bench_$way.jsonl"
      done ;;
    *) echo "unknown step $name"; exit 2 ;;
  esac
done
exit $failed
