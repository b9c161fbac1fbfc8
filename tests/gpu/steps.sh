# What the scripts beside it share. Source it from the root of the repository. Sets BUILD_DIR, LOGS and failed.
BUILD_DIR=${BUILD_DIR:-build/gpu}
LOGS=${OUT:-$BUILD_DIR/logs}
mkdir -p "$LOGS"
failed=0

step() {  # seconds name command..; the output goes to $LOGS/name.log too
  local limit=$1 name=$2 began=$SECONDS
  shift 2
  echo "== $name"
  timeout --kill-after=5 "$limit" "$@" 2>&1 | tee -a "$LOGS/$name.log"
  local rc=${PIPESTATUS[0]}
  echo "== $name: status $rc, $((SECONDS - began)) s"
  if [ "$rc" != 0 ]; then failed=1; fi
  return "$rc"
}

# Lines of a step's log that sum it up; the script that sources this prints all of them at its end.
note() {  # name pattern
  tail -n 100 "$LOGS/$1.log" | grep -E "$2" | sed "s/^/$1: /" | tee -a "$LOGS/summary.log"
}

# Several processes share a GPU with their kernels running at once only under MPS.
start_mps() {
  [ -n "${mps:-}" ] && return
  mps=$(mktemp -d)
  export CUDA_MPS_PIPE_DIRECTORY=$mps/pipe CUDA_MPS_LOG_DIRECTORY=$mps/log
  mkdir -p "$CUDA_MPS_PIPE_DIRECTORY" "$CUDA_MPS_LOG_DIRECTORY"
  nvidia-cuda-mps-control -d && sleep 1
}
stop_mps() {
  [ -n "${mps:-}" ] || return
  echo quit | timeout 20 nvidia-cuda-mps-control >/dev/null
  rm -rf "$mps"
  unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY mps
}
trap stop_mps EXIT
