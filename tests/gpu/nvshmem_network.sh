#!/bin/bash
# A group over a network without RDMA hardware: two processes on the GPU of this machine, a node each, without addresses of
# each other's memory; NVSHMEM goes over UCX and TCP. After a build as in nvshmem.sh.
#
#   UCX_LIB=folder tests/gpu/nvshmem_network.sh [suite.py check ..]
#
# UCX_LIB: folder with libucp.so.0 and libucs.so.0, such as that of `pip install libucx-cu13`; the wheel of NVSHMEM does not
# bring them. Default suites: low_latency_suite.py values, then exchange_suite.py values.
#
# With SPACES=1, as root, the processes have network and host name spaces of their own, joined by a veth pair (needs ip and
# unshare); otherwise they meet over the loopback device, and NVSHMEM_DISABLE_P2P keeps them from mapping each other.
#
# NVSHMEM's UCX transport applies signals on the processor, through GDRCopy where the memory is a GPU's. HEAP=SYSMEM, the
# default, has NVSHMEM's memory on the host, and host_gdrapi.c stands in for GDRCopy; HEAP=VIDMEM needs GDRCopy.
set -u -o pipefail
cd "$(dirname "$0")/../.."
. tests/gpu/steps.sh
HEAP=${HEAP:-SYSMEM}
LIMIT_S=${LIMIT_S:-280}
UCX_LIB=${UCX_LIB:-$(python3 -c 'import libucx, pathlib; print(pathlib.Path(libucx.__file__).parent / "lib")' 2>/dev/null)}
if [ ! -e "$UCX_LIB/libucp.so.0" ]; then
  echo "nvshmem_network.sh: expected libucp.so.0 in UCX_LIB, got '$UCX_LIB'; pip install libucx-cu13"
  exit 2
fi
cp "$BUILD_DIR"/_wideep_cuda*.so "$BUILD_DIR"/_wideep_nvshmem*.so jax_wideep/ || exit 1
libraries=$UCX_LIB
if [ "$HEAP" = SYSMEM ]; then
  mkdir -p "$BUILD_DIR/host_gdrapi"
  cc -O2 -shared -fPIC -o "$BUILD_DIR/host_gdrapi/libgdrapi.so.2" tests/gpu/host_gdrapi.c || exit 1
  libraries=$(realpath "$BUILD_DIR/host_gdrapi"):$libraries
fi
start_mps

if [ "${SPACES:-0}" = 1 ]; then
  # Both ends are called wideep0: NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME and UCX_NET_DEVICES are then the same.
  spaces=("wideep-$$-0" "wideep-$$-1")
  device=wideep0 coordinator=10.213.0.1
  cleanup() {
    for space in "${spaces[@]}"; do ip netns delete "$space" 2>/dev/null; done
    stop_mps
  }
  trap cleanup EXIT
  for space in "${spaces[@]}"; do ip netns add "$space" || exit 1; done
  ip link add wideep0 netns "${spaces[0]}" type veth peer name wideep0 netns "${spaces[1]}" || exit 1
  for i in 0 1; do
    ip -n "${spaces[i]}" address add "10.213.0.$((i + 1))/24" dev wideep0 &&
      ip -n "${spaces[i]}" link set wideep0 up && ip -n "${spaces[i]}" link set lo up || exit 1
  done
  # A host name of its own too: by it NVSHMEM tells hosts apart; and shared memory, in which it keeps a host's SYSMEM.
  on_host() {  # i command..
    local i=$1
    shift
    ip netns exec "${spaces[i]}" unshare --uts bash -c \
      'mount -t tmpfs -o size=4g tmpfs /dev/shm && hostname "wideep-host-$0" && exec "$@"' "$i" "$@"
  }
else
  device=lo coordinator=127.0.0.1
  on_host() {
    shift
    "$@"
  }
fi

pair() {  # suite.py check..
  local port=$((20000 + RANDOM % 20000)) scratch pids=() status=0 i
  scratch=$(mktemp -d)
  for i in 1 0; do
    on_host "$i" env WIDEEP_PROCESS=$i WIDEEP_NUM_PROCESSES=2 WIDEEP_COORDINATOR=$coordinator:$port \
      WIDEEP_SCRATCH="$scratch" WIDEEP_NODE_SIZE=1 \
      WIDEEP_GROUP='{"transport": "nvshmem", "node_size": 1, "deadline_s": 60.0}' \
      PYTHONPATH="$PWD:$PWD/tests:$PWD/tests/gpu:${PYTHONPATH:-}" PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 \
      JAX_PLATFORMS=cuda CUDA_VISIBLE_DEVICES=0 XLA_PYTHON_CLIENT_MEM_FRACTION=0.2 \
      NVSHMEM_DISABLE_P2P=1 NVSHMEM_REMOTE_TRANSPORT=ucx NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME=$device \
      NVSHMEM_SYMMETRIC_SIZE=1G NVSHMEM_HEAP_KIND="$HEAP" NVSHMEM_DEBUG="${NVSHMEM_DEBUG:-WARN}" \
      UCX_TLS=tcp,self,cuda_copy UCX_NET_DEVICES=$device LD_LIBRARY_PATH="$libraries:${LD_LIBRARY_PATH:-}" \
      timeout --kill-after=5 "$LIMIT_S" python3 "$@" >"$scratch/log$i" 2>&1 </dev/null &
    pids+=($!)
  done
  for i in "${pids[@]}"; do wait "$i" || status=1; done
  for i in 0 1; do
    echo "-- process $i"
    tail -c 6000 "$scratch/log$i"
  done
  rm -rf "$scratch"
  return $status
}

if [ $# -gt 0 ]; then
  pair "tests/gpu/$1" "${@:2}" || failed=1
else
  pair tests/gpu/low_latency_suite.py values || failed=1
  pair tests/gpu/exchange_suite.py values || failed=1
fi >>"$LOGS/nvshmem_network.log" 2>&1
tail -n 400 "$LOGS/nvshmem_network.log"
exit $failed
