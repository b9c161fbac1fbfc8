#!/bin/bash
# Checks and measures the library on N GPUs of this host, which reach each other's memory. Builds first, unless
# $BUILD_DIR has the programs and the module _wideep_cuda for this python3. Logs and records go to $OUT, or to
# $BUILD_DIR/logs: multi.log, the records, multi.jsonl, and the plot, multi.png; the tables are the end of the output.
#
#   tests/gpu/run_multi.sh N [step ..]
#
#   suite      the exchange and the low-latency suite, as one process with N GPUs and as N processes with one each
#   reduce     the exchange suite with combine_form="reduce" and masks, likewise, and ended processes; when all of it
#              passes, combine_form="auto" may become it (_peer_transport.choose_forms)
#   killed     failures: an index out of range, a late rank, a process that dies
#   failures   tests/processes/failures.py on three GPUs, or on two of which one has two ranks under MPS
#   nvshmem    low_latency_suite.py, exchange_suite.py and nvshmem_suite.py over NVSHMEM (nvidia-nvshmem-cu13), N processes,
#              as one node and as two virtual nodes of N / 2; then the exchange's times as both, and their ratio
#   link       benchmarks/peer_copy.cu: what a plain copy between the GPUs reaches
#   exchange   benchmarks/exchange_gpu.py: each op, N processes, captured; over SMs and routings
#   latency    benchmarks/low_latency_gpu.py: 1 to 128 tokens, N processes, captured
#   baselines  python -m jax_wideep.bench exchange beside XLA's collectives over NCCL, one process; once with XLA's
#              one-shot kernel for ragged_all_to_all and once without
#   layer      python -m jax_wideep.bench layer, likewise
#   train      examples/train_lm.py, as N processes that jax_wideep.launch starts and as one: losses and speed
#   drop_in    examples/drop_in.py, one process
#   microbatches  benchmarks/microbatches.py, N processes
#   decode     python -m jax_wideep.bench decode, N processes
#   overlap    examples/decode_overlap.py, N processes
#
# Default: all of them but failures and nvshmem, in this order. CHECKS, LL_CHECKS, EXCHANGE_CHECKS, LINK, EXCHANGE, LATENCY, BASELINES, LAYER, TRAIN, DROP_IN,
# MICROBATCHES, DECODE, OVERLAP: arguments of the programs, in place of those below. LIMIT: seconds for one step (default
# 240).
set -u -o pipefail
cd "$(dirname "$0")/../.."
. tests/gpu/steps.sh
LIMIT=${LIMIT:-240}
export NCCL_NVLS_ENABLE=0 NVSHMEM_DISABLE_NVLS=1 TORCH_SYMM_MEM_DISABLE_MULTICAST=1

gpus=${1:?how many GPUs}
shift
numbers=$(seq --separator=, 0 $((gpus - 1)))
captured=--xla-flag=--xla_gpu_graph_min_graph_size=1
sizes="--tokens 4096 --hidden 7168 --top-k 8"
one_shot=--xla_gpu_unsupported_use_ragged_all_to_all_one_shot_kernel

launch() {  # name, launch.py's arguments..
  local name=$1
  shift
  step "$LIMIT" "$name" python3 tests/gpu/launch.py --timeout $((LIMIT - 10)) "$@"
}
processes() { launch "$1" --devices=each "${@:2}"; }
one_process() { launch "$1" "--devices=$numbers" "${@:2}"; }

if [ ! -f "$(ls "$BUILD_DIR"/_wideep_cuda*.so 2>/dev/null | head -n 1)" ]; then
  step 600 build bash -c "cmake -S . -B $BUILD_DIR -DWIDEEP_CUDA=ON -DWIDEEP_TESTS=ON -DPython_EXECUTABLE=$(command -v python3) &&
    cmake --build $BUILD_DIR -j8 --target peer_copy_benchmark _wideep_cuda" || exit 1
fi
cp "$BUILD_DIR"/_wideep_cuda*.so jax_wideep/ || exit 1

run() {
  case $1 in
    suite)
      for suite in exchange low_latency; do
        flags="$captured --xla-flag=--xla_gpu_autotune_level=0 --dump=captured_step"
        one_process suite $flags 1 tests/gpu/${suite}_suite.py ${CHECKS:-}
        processes suite $flags "$gpus" tests/gpu/${suite}_suite.py ${CHECKS:-}
      done ;;
    reduce)
      export WIDEEP_GROUP='{"combine_form": "reduce"}'
      one_process reduce $captured --xla-flag=--xla_gpu_autotune_level=0 --dump=captured_step 1 \
        tests/gpu/exchange_suite.py ${CHECKS:-}
      processes reduce $captured --xla-flag=--xla_gpu_autotune_level=0 --dump=captured_step "$gpus" \
        tests/gpu/exchange_suite.py ${CHECKS:-}
      for check in killed killed_then_masked; do
        processes reduce --xla-flag=--xla_gpu_enable_command_buffer= "$gpus" tests/gpu/exchange_suite.py $check
      done
      unset WIDEEP_GROUP ;;
    failures)
      [ "$gpus" -ge 3 ] || start_mps
      step 170 failures env "WIDEEP_PLATFORM=${WIDEEP_PLATFORM:-cuda}" "CUDA_VISIBLE_DEVICES=$numbers" \
        "PYTHONPATH=$PWD:$PWD/tests:${PYTHONPATH:-}" python3 tests/processes/failures.py ${FAILURES:-}
      stop_mps ;;
    nvshmem)
      cp "$BUILD_DIR"/_wideep_nvshmem*.so jax_wideep/ || { failed=1; return; }
      local half=$((gpus / 2)) flags="$captured --xla-flag=--xla_gpu_autotune_level=0"
      export NVSHMEM_SYMMETRIC_SIZE=${NVSHMEM_SYMMETRIC_SIZE:-4G} XLA_PYTHON_CLIENT_MEM_FRACTION=0.6
      for node_size in "$gpus" "$half"; do
        local nodes=
        [ "$node_size" = "$gpus" ] || nodes=", \"node_size\": $node_size"
        export WIDEEP_GROUP="{\"transport\": \"nvshmem\"$nodes}"
        processes nvshmem $flags "$gpus" tests/gpu/low_latency_suite.py ${LL_CHECKS:-values kept masked loop bad_index}
        processes nvshmem $flags "$gpus" tests/gpu/exchange_suite.py \
          ${EXCHANGE_CHECKS:-values one_token fp8 masked repeats transforms bad_index delayed}
        processes "nvshmem_$node_size" $captured "$gpus" benchmarks/exchange_gpu.py \
          --json "$LOGS/nvshmem_$node_size.jsonl" ${EXCHANGE:-$sizes --sms 16 32 --form chain} \
          --ops "dispatch push" "combine pull" "dispatch grad pull" "combine grad"
        WIDEEP_GROUP='{}' WIDEEP_NODE_SIZE=$node_size processes nvshmem $flags "$gpus" tests/gpu/nvshmem_suite.py
      done
      step 20 nvshmem python3 tests/gpu/ratio.py "$LOGS/nvshmem_$gpus.jsonl" "$LOGS/nvshmem_$half.jsonl"
      unset WIDEEP_GROUP NVSHMEM_SYMMETRIC_SIZE XLA_PYTHON_CLIENT_MEM_FRACTION ;;
    killed)
      processes killed --xla-flag=--xla_gpu_enable_command_buffer= "$gpus" tests/gpu/exchange_suite.py \
        bad_index delayed killed ;;
    link) step 60 link "$BUILD_DIR/peer_copy_benchmark" "--json=$LOGS/link.jsonl" ${LINK:-} ;;
    exchange)
      processes exchange $captured "$gpus" benchmarks/exchange_gpu.py --json "$LOGS/exchange.jsonl" \
        ${EXCHANGE:-$sizes --sms 16 32 --routing uniform zipf --form chain} ;;
    latency)
      processes latency $captured --dump=loop_of "$gpus" benchmarks/low_latency_gpu.py \
        --json "$LOGS/low_latency.jsonl" ${LATENCY:---tokens 1 8 32 128 --sms 32} ;;
    baselines)
      for flag in true false; do
        one_process "baselines" --xla-flag=$one_shot=$flag 1 jax_wideep.bench exchange --json \
          "$LOGS/baselines_one_shot_$flag.jsonl" ${BASELINES:-$sizes --experts 256 --routing uniform --repeats 10}
      done ;;
    layer)
      one_process layer 1 jax_wideep.bench layer --json "$LOGS/layer.jsonl" \
        ${LAYER:-$sizes --experts 64 --ffn 2048 --routing uniform --repeats 5} ;;
    train)
      # 67 M parameters. A step of 32,768 tokens, some of which are dropped.
      options=${TRAIN:---hidden 1024 --layers 4 --heads 8 --ffn 512 --experts 8 --top-k 2 --dtype bfloat16 --batch 64
        --seq 512 --steps 50 --eval-every 50}
      runs=$(mktemp -d)
      step "$LIMIT" train env "PYTHONPATH=$PWD:${PYTHONPATH:-}" python3 -m jax_wideep.launch --processes "$gpus" \
        --gpu-each examples/train_lm.py $options --run "$runs/processes" &&
        one_process train 1 examples/train_lm.py $options --run "$runs/one" &&
        step 30 train python3 benchmarks/compare_runs.py "$runs/processes" "$runs/one" --json "$LOGS/train.jsonl"
      rm -rf "$runs" ;;
    drop_in)
      one_process drop_in 1 examples/drop_in.py ${DROP_IN:---dtype bfloat16 --hidden 1024 --ffn 512 --layers 4
        --experts 32 --top-k 4 --batch 64 --seq 256 --steps 60 --learning-rate 3e-4} ;;
    microbatches)
      processes microbatches "$gpus" benchmarks/microbatches.py --json "$LOGS/microbatches.jsonl" \
        ${MICROBATCHES:---tokens 4096 --decode-tokens 64 --hidden 4096 --ffn 1024 --experts 32 --layers 2} ;;
    decode) processes decode "$gpus" jax_wideep.bench decode --json "$LOGS/decode.jsonl" ${DECODE:-} ;;
    overlap)
      processes overlap --xla-flag=--xla_allow_excess_precision=false "$gpus" examples/decode_overlap.py \
        --dtype bfloat16 ${OVERLAP:---tokens 128 --hidden 7168 --ffn 2048 --experts 64 --top-k 8} ;;
    *) echo "unknown step $1"; exit 2 ;;
  esac
}

for name in ${@:-suite reduce killed link exchange latency baselines layer train drop_in microbatches decode overlap}; do run "$name"; done
compgen -G "$LOGS/*.jsonl" >/dev/null && step 60 tables python3 benchmarks/plot_multi.py "$LOGS" --out "$LOGS/multi.png" --merge
# Few files: all logs in one.
(cd "$LOGS" && for log in *.log; do [ "$log" = multi.log ] || { echo "==== $log"; cat "$log"; rm "$log"; }; done >>multi.log)
exit $failed
