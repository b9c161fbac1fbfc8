"""Two hosts on one machine: two network namespaces joined by a virtual cable (veth), each with a host name of its own.

Needs `unshare`, `nsenter` and `ip`, and to be root or to be allowed user namespaces; `unavailable` says what is
missing. Nothing outside of the namespaces is changed, and they end with their processes.
"""

from __future__ import annotations

import functools
import os
import pathlib
import shutil
import subprocess
import tempfile
from collections.abc import Sequence

_ADDRESSES = ("10.77.0.1", "10.77.0.2")

# $1: a folder with a file `hosts`; the rest is the command. The first host is this script's own namespace, the second
# that of a process that only waits. Both see the other's name through /etc/hosts.
_SCRIPT = """
set -e
export folder=$1 && shift
become='hostname "$0"; mount --bind "$folder/hosts" /etc/hosts; ip link set lo up; '
mkfifo "$folder/ready"
unshare --net --uts --mount sh -ec "$become"'echo > "$folder/ready"; exec sleep 1000000' host1 &
second=$!
sh -ec "$become" host0
read _ < "$folder/ready"
ip link add cable0 type veth peer name cable1 netns "$second"
ip addr add ADDRESS0/24 dev cable0 && ip link set cable0 up
enter="nsenter --target $second --net --uts --mount"
$enter ip addr add ADDRESS1/24 dev cable1 && $enter ip link set cable1 up
export JAX_COORDINATOR_ADDRESS=ADDRESS0:47000 JAX_NUM_PROCESSES=2
set +e
JAX_PROCESS_ID=1 $enter "$@" > "$folder/output1" 2>&1 &
other=$!
JAX_PROCESS_ID=0 "$@" > "$folder/output0" 2>&1
first=$?
wait "$other"
echo "$first $?" > "$folder/statuses"
"""


def run(
    command: Sequence[str], *, timeout_s: float, env: dict[str, str] | None = None
) -> list[tuple[int, str]]:
    """Runs one process of a JAX job on each host; returns each one's exit status and output.

    Raises:
      RuntimeError: the hosts could not be made.
      subprocess.TimeoutExpired: it took longer than `timeout_s`; all of it has been ended.
    """
    script = _SCRIPT
    for number, address in enumerate(_ADDRESSES):
        script = script.replace(f"ADDRESS{number}", address)
    with tempfile.TemporaryDirectory(prefix="wideep-hosts-") as name:
        folder = pathlib.Path(name)
        lines = ["127.0.0.1 localhost", *(f"{address} host{i}" for i, address in enumerate(_ADDRESSES))]
        (folder / "hosts").write_text("\n".join(lines) + "\n")
        # The namespace of process ids ends everything in it as soon as its first process ends.
        unshare = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
        if os.geteuid() != 0:
            unshare += ["--user", "--map-root-user"]
        done = subprocess.run(
            [*unshare, "sh", "-c", script, "sh", str(folder), *command],
            env=os.environ | (env or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if not (folder / "statuses").exists():
            raise RuntimeError(f"two hosts: {done.stderr.strip() or done.returncode}")
        statuses = map(int, (folder / "statuses").read_text().split())
        return [
            (status, (folder / f"output{number}").read_text(errors="replace"))
            for number, status in enumerate(statuses)
        ]


@functools.cache
def unavailable() -> str | None:
    """Why there can be no two hosts here; None if there can."""
    missing = [name for name in ("unshare", "nsenter", "ip", "hostname") if shutil.which(name) is None]
    if missing:
        return f"needs {', '.join(missing)}"
    try:
        run(["true"], timeout_s=30)
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        return f"needs network namespaces: {error}"
    return None
