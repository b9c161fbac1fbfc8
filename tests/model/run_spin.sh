#!/bin/bash
# Checks two_hop.pml with spin (Debian: apt-get install spin). Without spin it says so and succeeds: the explorer
# (two_hop_explore) checks the same transition system.
#
#   tests/model/run_spin.sh [build folder]
set -eu -o pipefail
cd "$(dirname "$0")/../.."
if ! command -v spin >/dev/null; then
  echo "run_spin: no spin here, nothing checked"
  exit 0
fi
build=${1:-build/spin}
mkdir -p "$build"
root=$PWD
cd "$build"
spin -a "$root/tests/model/two_hop.pml" >/dev/null
# SAFETY: invalid ends and assertions. HC4: states are told apart by a hash.
gcc -O2 -w -DSAFETY -DHC4 -DMEMLIM=4000 -DVECTORSZ=4096 -c pan.c -o pan.o
g++ -std=c++17 -O2 -I"$root" -c "$root/tests/model/two_hop_spin.cc" -o two_hop_spin.o
g++ -std=c++17 -O2 -I"$root" -c "$root/csrc/ep/two_hop_config.cc" -o two_hop_config.o
g++ pan.o two_hop_spin.o two_hop_config.o -o two_hop_pan

# Operation, mapped, tokens of ranks 0, 1 and 2; a last digit is a fault that spin has to find.
for case in ${CASES:-d0400 d0004 d1211 d1400 c0400 c0004 c1211 c1400 d04001 d04004}; do
  TWO_HOP=$case ./two_hop_pan -m1000000 >"$case.log" 2>&1 || { cat "$case.log"; exit 1; }
  [ ${#case} = 5 ] && errors=0 || errors=1
  if ! grep -q "errors: $errors" "$case.log" || grep -qE "depth too small|out of memory" "$case.log"; then
    cat "$case.log"
    echo "run_spin: $case failed"
    exit 1
  fi
  echo "ok $case $(grep -E 'states, stored' "$case.log")"
done
