#!/usr/bin/env bash
# Builds the CPU module and the C++ tests with Bazel 4, runs the tests, and imports the module.
#
#   tools/check_bazel.sh [options of bazel build and test, such as --jobs=2]
#
# The building Python (PYTHON_BIN_PATH, or else python3) needs nanobind and jaxlib. Takes Bazel from the PATH,
# or installs Debian's bazel-bootstrap (4.2.3) if it may. The build itself may not download anything.
# Exit status: 0 passed, 77 skipped because something is missing here, anything else failed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

skip() {
  echo "check_bazel: skipped: $1" >&2
  exit 77
}

# Prints the name of a Bazel 4 on the PATH. Debian's own build of 4.2.3 says "no_version".
find_bazel() {
  local name
  for name in bazel bazel-4; do
    case "$("$name" --version 2>/dev/null)" in
      "bazel 4."* | "bazel no_version") echo "$name" && return ;;
    esac
  done
  return 1
}

install_bazel() {
  command -v apt-get >/dev/null || skip "no Bazel 4 on the PATH, and no apt-get to install one"
  local as_root=()
  if [[ $(id -u) != 0 ]]; then
    sudo -n true 2>/dev/null || skip "no Bazel 4 on the PATH, and no right to install bazel-bootstrap"
    as_root=(sudo -n)
  fi
  local install=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive
    apt-get install -y --no-install-recommends bazel-bootstrap)
  # The package lists may be absent or stale: fetch them only if the first try fails.
  "${install[@]}" >&2 || { "${as_root[@]}" apt-get update >&2 && "${install[@]}" >&2; } ||
    skip "no Bazel 4 on the PATH, and apt-get cannot install bazel-bootstrap"
}

PYTHON_BIN_PATH=${PYTHON_BIN_PATH:-$(command -v python3)} || skip "no python3 on the PATH"
export PYTHON_BIN_PATH
"$PYTHON_BIN_PATH" tools/ffi_include_dir.py >/dev/null || skip "$PYTHON_BIN_PATH has no FFI headers"
"$PYTHON_BIN_PATH" -c "import nanobind" || skip "$PYTHON_BIN_PATH has no nanobind: pip install nanobind"
command -v c++ >/dev/null || skip "no C++ compiler on the PATH"

bazel=$(find_bazel) || { install_bazel && bazel=$(find_bazel); } ||
  skip "bazel-bootstrap is installed, but its bazel is not 4.x"

trap '"$bazel" shutdown' EXIT # or its server stays for hours
options=(--experimental_repository_disable_download --color=no --curses=no "$@")
"$bazel" build "${options[@]}" //:_wideep_cpu.so
"$bazel" test "${options[@]}" //:all

module_folder=$("$bazel" info "${options[@]}" bazel-bin 2>/dev/null)
# -I: neither the working directory nor PYTHONPATH may provide another _wideep_cpu.
"$PYTHON_BIN_PATH" -I - "$module_folder" <<'PYTHON'
import sys

sys.path.insert(0, sys.argv[1])
import _wideep_cpu

assert _wideep_cpu.__file__.startswith(sys.argv[1]), _wideep_cpu.__file__
targets = sorted(_wideep_cpu.handlers())
assert "wideep_dispatch" in targets and "wideep_combine" in targets, targets
group = _wideep_cpu.open_group(num_ranks=2, deadline_s=1.0, places=[(0, 0, 0), (1, 0, 1)])
assert group > 0, group
_wideep_cpu.close_group(group)
version = ".".join(map(str, _wideep_cpu.ffi_api_version()))
print(f"check_bazel: _wideep_cpu imports: {len(targets)} targets, FFI {version}, rows {_wideep_cpu.isa()}")
PYTHON
echo "check_bazel: passed"
