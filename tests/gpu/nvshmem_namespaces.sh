#!/bin/bash
# Tries a group over two "hosts" without RDMA hardware: two processes on the GPU of this machine, each in network and host
# name spaces of its own, joined by a veth pair; NVSHMEM goes over UCX and TCP. As root, after a build as in nvshmem.sh.
#
#   UCX_LIB=folder tests/gpu/nvshmem_namespaces.sh [suite.py check ..]
#
# UCX_LIB: folder with libucp.so.0 and libucs.so.0, built with CUDA, such as that of `pip install libucx-cu13`; the wheel of
# NVSHMEM does not bring them. Default suites: low_latency_suite.py values, then exchange_suite.py values.
#
# NVSHMEM's UCX transport sends signals as active messages that the target's proxy applies, through GDRCopy where the memory
# is a GPU's: without libgdrapi and its kernel module it says "AMO .. not supported with the current configuration (GDRCopy
# Disabled)". Then HEAP=SYSMEM puts NVSHMEM's memory on the host, which the processor can reach.
set -u -o pipefail
cd "$(dirname "$0")/../.."
. tests/gpu/steps.sh
if [ "$(id -u)" != 0 ] || ! command -v ip >/dev/null || ! command -v unshare >/dev/null; then
  echo "nvshmem_namespaces.sh: expected root, ip (iproute2) and unshare (util-linux)"
  exit 2
fi
UCX_LIB=${UCX_LIB:-$(python3 -c 'import libucx, pathlib; print(pathlib.Path(libucx.__file__).parent / "lib")' 2>/dev/null)}
if [ ! -e "$UCX_LIB/libucp.so.0" ]; then
  echo "nvshmem_namespaces.sh: expected libucp.so.0 in UCX_LIB, got '$UCX_LIB'; pip install libucx-cu13"
  exit 2
fi
cp "$BUILD_DIR"/_wideep_cuda*.so "$BUILD_DIR"/_wideep_nvshmem*.so jax_wideep/ || exit 1
[ "${MPS:-1}" = 0 ] || start_mps

# Both ends are called wideep0: NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME and UCX_NET_DEVICES are then the same.
spaces=("wideep-$$-0" "wideep-$$-1")
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

# A host name of its own too: by it NVSHMEM tells hosts apart.
in_space() {  # i command..
  local i=$1
  shift
  ip netns exec "${spaces[i]}" unshare --uts bash -c 'hostname "wideep-host-$0" && exec "$@"' "$i" "$@"
}

pair() {  # suite.py check..
  local port=$((20000 + RANDOM % 20000)) scratch pids=() status=0 i
  scratch=$(mktemp -d)
  for i in 1 0; do
    in_space "$i" env WIDEEP_PROCESS=$i WIDEEP_NUM_PROCESSES=2 WIDEEP_COORDINATOR=10.213.0.1:$port WIDEEP_SCRATCH="$scratch" \
      WIDEEP_GROUP='{"transport": "nvshmem", "node_size": 1, "deadline_s": 60.0}' \
      PYTHONPATH="$PWD:$PWD/tests:$PWD/tests/gpu" PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 JAX_PLATFORMS=cuda \
      CUDA_VISIBLE_DEVICES=0 XLA_PYTHON_CLIENT_MEM_FRACTION=0.2 \
      NVSHMEM_REMOTE_TRANSPORT=ucx NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME=wideep0 NVSHMEM_SYMMETRIC_SIZE=1G \
      NVSHMEM_HEAP_KIND="${HEAP:-VIDMEM}" NVSHMEM_DEBUG="${NVSHMEM_DEBUG:-INFO}" \
      UCX_TLS=tcp,cuda_copy UCX_NET_DEVICES=wideep0 LD_LIBRARY_PATH="$UCX_LIB:${LD_LIBRARY_PATH:-}" \
      timeout --kill-after=5 "${LIMIT_S:-280}" python3 "$@" >"$scratch/log$i" 2>&1 </dev/null &
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
fi >>"$LOGS/nvshmem_namespaces.log" 2>&1
tail -n 400 "$LOGS/nvshmem_namespaces.log"
exit $failed
