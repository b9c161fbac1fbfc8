#!/bin/bash
# Checks the exchange on the GPU of this machine. Builds first, unless $BUILD_DIR has the programs and the module
# _wideep_cuda for this python3. Logs go to $OUT, or to $BUILD_DIR/logs.
#
#   tests/gpu/run.sh [step ..]
#
#   cpp       the C++ test with virtual ranks in one process
#   nodes     two_hop_test.cu, the kernels between virtual nodes; then their times beside those of one node. Needs no NVSHMEM
#   sanitize  a part of it under compute-sanitizer, its four tools at once
#   suite     exchange_suite.py at each of $RANKS processes that share the GPU (default: 1 2 3 4 8), under MPS
#   killed    failures without command buffers: the next call raises too; a process dies, the others say which; and
#             then leave its rank out and go on
#   failures  tests/processes/failures.py: processes that die in every place or stop, and nothing is left of them; with
#             $FAILURES, its arguments
#   layers    moe_suite.py, placement_suite.py and families_suite.py at each of $RANKS processes
#   train     train_suite.py at 8 processes, against eight CPU devices
#   families  families_suite.py with $FAMILIES (default: gpt_oss llama4) at 4 processes
#   microbatches  benchmarks/microbatches.py with $MICROBATCHES, at 4 processes: training and decode, one and two under way
#   drop_in   examples/drop_in.py with $DROP_IN, one process: step times with ragged_dot experts and with the layer
#   memory    benchmarks/layer_memory.py with $MEMORY, at 4 processes, a job for each of $VARIANTS: memory and time of rows
#             for the worst case, of dropping and of spilling
#   kernels   benchmarks/exchange.cu with $KERNELS (default: --sweep), virtual ranks in one process
#   bench     benchmarks/exchange_gpu.py with $BENCH, at 8 processes
#
# Default: cpp suite killed, at most 8 minutes. families to memory take at most 13 minutes together; what they found is in
# summary.log, and at the end of the output.
set -u -o pipefail
cd "$(dirname "$0")/../.."
. tests/gpu/steps.sh
RANKS=${RANKS:-1 2 3 4 8}

sanitize() {
  local tool pids=() rc=0
  for tool in memcheck racecheck synccheck initcheck; do
    timeout --kill-after=5 200 compute-sanitizer --tool $tool --error-exitcode 9 "$BUILD_DIR/exchange_gpu_test" \
      ${SANITIZE:-OneRank TwoRanksEveryForm} >"$LOGS/$tool.log" 2>&1 &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || rc=1; done
  tail -n 5 "$LOGS"/{memcheck,racecheck,synccheck,initcheck}.log
  return $rc
}

if [ ! -x "$BUILD_DIR/exchange_gpu_test" ]; then
  step 600 build bash -c "cmake -S . -B $BUILD_DIR -DWIDEEP_CUDA=ON -DWIDEEP_TESTS=ON -DPython_EXECUTABLE=$(command -v python3) &&
    cmake --build $BUILD_DIR -j4 --target exchange_gpu_test two_hop_gpu_test exchange_benchmark _wideep_cuda" || exit 1
fi
cp "$BUILD_DIR"/_wideep_cuda*.so jax_wideep/ || exit 1

for name in ${@:-cpp suite killed}; do
  case $name in
    cpp) step 90 cpp "$BUILD_DIR/exchange_gpu_test" ${CPP:-} ;;
    nodes)
      step 90 nodes_cpp "$BUILD_DIR/two_hop_gpu_test" ${CPP:-}
      step 120 nodes "$BUILD_DIR/exchange_benchmark" --node-size=4 "--json=$LOGS/nodes.jsonl" \
        ${NODES:---ops=dispatch,combine,plan} ;;
    sanitize) echo "== sanitize"; sanitize || { echo "== sanitize failed"; failed=1; } ;;
    suite)
      start_mps
      for ranks in $RANKS; do
        step 110 suite python3 tests/gpu/launch.py --timeout 100 --xla-flag=--xla_gpu_graph_min_graph_size=1 \
          --xla-flag=--xla_gpu_autotune_level=0 --dump=captured_step "$ranks" tests/gpu/exchange_suite.py ${CHECKS:-}
      done ;;
    killed)
      start_mps
      step 60 killed python3 tests/gpu/launch.py --timeout 50 --xla-flag=--xla_gpu_enable_command_buffer= \
        4 tests/gpu/exchange_suite.py bad_index delayed killed
      step 60 killed python3 tests/gpu/launch.py --timeout 50 --xla-flag=--xla_gpu_enable_command_buffer= \
        4 tests/gpu/exchange_suite.py killed_then_masked ;;
    failures)
      start_mps
      step 170 failures env "WIDEEP_PLATFORM=${WIDEEP_PLATFORM:-cuda}" "PYTHONPATH=$PWD:$PWD/tests:${PYTHONPATH:-}" \
        python3 tests/processes/failures.py ${FAILURES:-} ;;
    layers)
      start_mps
      for ranks in $RANKS; do
        for suite in moe placement families; do
          # Without tuning XLA has no configuration for its Triton products, which the references use.
          step 160 layers python3 tests/gpu/launch.py --timeout 150 --xla-flag=--xla_gpu_autotune_level=0 \
            --xla-flag=--xla_gpu_enable_triton_gemm=false "$ranks" tests/gpu/${suite}_suite.py
        done
      done ;;
    train)
      step 150 train env JAX_PLATFORMS=cpu WIDEEP_CPU_RANKS=8 WIDEEP_BACKEND=xla PYTHONPATH=.:tests:${PYTHONPATH:-} \
        python3 tests/gpu/train_suite.py --save "$BUILD_DIR/training.npz"
      start_mps
      step 110 train python3 tests/gpu/launch.py --timeout 100 8 tests/gpu/train_suite.py \
        --reference "$BUILD_DIR/training.npz" ;;
    families)
      start_mps
      step 120 families python3 tests/gpu/launch.py --timeout 110 --xla-flag=--xla_gpu_autotune_level=0 \
        --xla-flag=--xla_gpu_enable_triton_gemm=false 4 tests/gpu/families_suite.py ${FAMILIES:-gpt_oss llama4}
      note families ': ok|failed' ;;
    microbatches)
      start_mps
      step 150 microbatches python3 tests/gpu/launch.py --timeout 140 4 benchmarks/microbatches.py \
        --json "$LOGS/microbatches.jsonl" \
        ${MICROBATCHES:---tokens 1024 --decode-tokens 32 --hidden 2048 --ffn 1024 --experts 64 --layers 2}
      note microbatches 'ranks, one / two|failed' ;;
    drop_in)
      step 240 drop_in env "PYTHONPATH=$PWD:${PYTHONPATH:-}" python3 examples/drop_in.py ${DROP_IN:---dtype bfloat16
        --hidden 1024 --ffn 512 --layers 4 --experts 32 --top-k 4 --batch 32 --seq 256 --steps 60 --learning-rate 3e-4}
      note drop_in 'ms a step|losses differ' ;;
    memory)
      start_mps
      IFS=, read -ra variants <<<"${VARIANTS:-worst case,drop 1.5,spill 1.5,spill 2}"
      for variant in "${variants[@]}"; do
        step 60 memory python3 tests/gpu/launch.py --timeout 55 4 benchmarks/layer_memory.py --only "$variant" \
          --json "$LOGS/memory_${variant// /_}.jsonl" \
          ${MEMORY:---tokens 2048 --hidden 2048 --ffn 1024 --experts 64 --dtype bfloat16}
      done
      note memory '^\| (\| temporaries|[a-z]+ [0-9c])|failed' ;;
    kernels) step 300 kernels "$BUILD_DIR/exchange_benchmark" "--json=$LOGS/exchange.jsonl" ${KERNELS:---sweep} ;;
    bench)
      start_mps
      step 300 bench python3 tests/gpu/launch.py --timeout 290 --xla-flag=--xla_gpu_graph_min_graph_size=1 8 benchmarks/exchange_gpu.py \
        --json "$LOGS/exchange_gpu.jsonl" ${BENCH:-} ;;
    *) echo "unknown step $name"; exit 2 ;;
  esac
done
if [ -s "$LOGS/summary.log" ]; then echo "== summary"; cat "$LOGS/summary.log"; fi
exit $failed
