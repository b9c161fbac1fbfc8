#!/bin/bash
# Checks and times the low-latency shape on the GPU of this machine. Builds first, unless $BUILD_DIR has the programs
# and the module _wideep_cuda for this python3. Logs go to $OUT, or to $BUILD_DIR/logs.
#
#   tests/gpu/low_latency.sh [step ..]
#
#   cpp       the C++ test with virtual ranks in one process
#   sanitize  a small part of it under compute-sanitizer, its four tools at once
#   suite     low_latency_suite.py at each of $RANKS processes that share the GPU (default: 1 2 3 4 8), under MPS
#   killed    a process dies; the others leave its rank out and go on
#   bench     benchmarks/low_latency.cu: JSON lines to $LOGS/low_latency.jsonl, from them table and plot
#   loop      benchmarks/low_latency_gpu.py: 60 exchanges in one compiled step, at each of $LOOP_RANKS processes (default:
#             8), with the launch overhead by the kernels' times in $KERNELS (default: those of bench)
#   decode    python -m jax_wideep.bench decode at each of $DECODE_RANKS processes (default: 1 8)
#   overlap   examples/decode_overlap.py at 8 processes
#
# Default: cpp suite, at most 8 minutes. CPP, CHECKS, BENCH, LOOP, DECODE, OVERLAP: arguments of the programs.
set -u -o pipefail
cd "$(dirname "$0")/../.."
. tests/gpu/steps.sh
RANKS=${RANKS:-1 2 3 4 8}

launch() {  # seconds name launch.py's arguments..
  local limit=$1 name=$2
  shift 2
  start_mps
  step "$limit" "$name" python3 tests/gpu/launch.py --timeout $((limit - 10)) --xla-flag=--xla_gpu_autotune_level=0 "$@"
}

sanitize() {
  local tool pids=() rc=0
  for tool in memcheck racecheck synccheck initcheck; do
    timeout --kill-after=5 200 compute-sanitizer --tool $tool --error-exitcode 9 "$BUILD_DIR/low_latency_gpu_test" \
      ${SANITIZE:-TwoRanksEveryWire} >"$LOGS/low_latency_$tool.log" 2>&1 &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || rc=1; done
  tail -n 5 "$LOGS"/low_latency_{memcheck,racecheck,synccheck,initcheck}.log
  return $rc
}

if [ ! -x "$BUILD_DIR/low_latency_gpu_test" ]; then
  step 600 build bash -c "cmake -S . -B $BUILD_DIR -DWIDEEP_CUDA=ON -DWIDEEP_TESTS=ON -DPython_EXECUTABLE=$(command -v python3) &&
    cmake --build $BUILD_DIR -j4 --target low_latency_gpu_test low_latency_benchmark _wideep_cuda" || exit 1
fi
cp "$BUILD_DIR"/_wideep_cuda*.so jax_wideep/ || exit 1

for name in ${@:-cpp suite}; do
  case $name in
    cpp) step 90 cpp "$BUILD_DIR/low_latency_gpu_test" ${CPP:-} ;;
    sanitize) echo "== sanitize"; sanitize || { echo "== sanitize failed"; failed=1; } ;;
    suite)
      for ranks in $RANKS; do
        launch 110 suite --xla-flag=--xla_gpu_graph_min_graph_size=1 "$ranks" tests/gpu/low_latency_suite.py ${CHECKS:-}
      done ;;
    killed) launch 60 killed --xla-flag=--xla_gpu_enable_command_buffer= 4 tests/gpu/low_latency_suite.py killed_then_masked ;;
    bench)
      rm -f "$LOGS/low_latency.jsonl"
      step 200 bench "$BUILD_DIR/low_latency_benchmark" --json="$LOGS/low_latency.jsonl" ${BENCH:-} &&
        step 60 plot python3 benchmarks/plot_low_latency.py "$LOGS/low_latency.jsonl" --out "$LOGS/low_latency.png" ;;
    loop)
      kernels=()
      [ -f "${KERNELS:=$LOGS/low_latency.jsonl}" ] && kernels=(--kernels "$KERNELS")
      for ranks in ${LOOP_RANKS:-8}; do
        launch 120 loop --xla-flag=--xla_gpu_graph_min_graph_size=1 --dump=loop_of_exchanges "$ranks" \
          benchmarks/low_latency_gpu.py --json "$LOGS/low_latency_loop.jsonl" "${kernels[@]}" ${LOOP:-}
      done ;;
    decode)
      for ranks in ${DECODE_RANKS:-1 8}; do
        launch 200 decode "$ranks" jax_wideep.bench decode --json "$LOGS/decode_$ranks.jsonl" ${DECODE:-}
      done ;;
    overlap)
      launch 120 overlap --xla-flag=--xla_allow_excess_precision=false 8 examples/decode_overlap.py \
        --dtype bfloat16 ${OVERLAP:-} ;;
    *) echo "unknown step $name"; exit 2 ;;
  esac
done
exit $failed
