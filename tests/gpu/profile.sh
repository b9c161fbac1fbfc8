#!/bin/bash
# Records traces of a layer on the GPU of this machine: route, plan, dispatch, experts, combine, forward and backward.
# Prints the time of each phase and the longest kernels; traces (for XProf and Perfetto) and logs go to $OUT, or to
# $BUILD_DIR/logs. Needs the module _wideep_cuda beside jax_wideep (run.sh builds it). docs/profiling.md says more.
#
#   tests/gpu/profile.sh [step ..]
#
#   one       one rank on one GPU
#   ranks     8 ranks that share the GPU, under MPS
#   nsys      one rank under Nsight Systems, with the NVTX ranges of the handlers, where nsys is installed
#
# Default: one ranks. $TRACE holds further options, such as --tokens 1024.
set -u -o pipefail
cd "$(dirname "$0")/../.."
. tests/gpu/steps.sh

# Without command buffers, in which kernels do not say which operation they belong to.
FLAGS=--xla_gpu_enable_command_buffer=
SIZES="--hidden 7168 --top-k 8 --ffn 2048 --no-baselines --steps 5"

for name in ${@:-one ranks}; do
  case $name in
    one)
      step 200 one env XLA_FLAGS="${XLA_FLAGS:-} $FLAGS" python3 -m jax_wideep.bench trace --tokens 4096 --experts 32 \
        $SIZES --trace "$LOGS/trace_one" --json "$LOGS/trace_one.jsonl" ${TRACE:-} ;;
    ranks)
      start_mps
      step 300 ranks python3 tests/gpu/launch.py --timeout 290 --xla-flag=$FLAGS 8 jax_wideep.bench trace \
        --tokens 512 --experts 64 $SIZES --trace "$LOGS/trace_ranks" --json "$LOGS/trace_ranks.jsonl" ${TRACE:-} ;;
    nsys)
      step 300 nsys nsys profile --trace cuda,nvtx --force-overwrite true --output "$LOGS/layer" \
        python3 -m jax_wideep.bench trace --tokens 4096 --experts 32 $SIZES ${TRACE:-} &&
        step 60 nsys_ranges nsys stats --report nvtx_gpu_proj_sum "$LOGS/layer.nsys-rep" ;;
    *) echo "unknown step $name"; exit 2 ;;
  esac
done
exit $failed
