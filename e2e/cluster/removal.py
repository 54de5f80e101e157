"""Taking a cluster away without a trace, whatever state it is in.

The same steps end a healthy cluster, one whose start was interrupted, and one whose owner was killed, because none
of them trusts a record of what was started: processes are found by their marks, the network link and the cgroup by
names that follow from the state directory. In the node profile the first step already ends the namespaces, and with
them every mount, bridge, firewall rule and pod inside; what is left is what lives outside them.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import subprocess
import time
from pathlib import Path

from e2e.cluster.processes import Processes
from e2e.cluster.state import ClusterError, cache_directory, exclusive, read_record, state_directories, tag

_CGROUP_ROOT = Path("/sys/fs/cgroup")
_GONE_DEADLINE_S = 20.0


def host_link(directory: Path) -> str:
    """The name of the host's end of a cluster's veth pair (Linux allows 15 characters)."""
    return f"lf{tag(directory)}h"


def node_link(directory: Path) -> str:
    """The name of the other end, inside the cluster's network namespace."""
    return f"lf{tag(directory)}n"


def cgroup_name(directory: Path) -> str:
    """The cgroup under which the cluster's pods run, in every hierarchy."""
    return f"llmfleet-{directory.name}-{tag(directory)}"


def cgroup_parents() -> list[Path]:
    """The directories in which a cluster's cgroup lies: one per mounted hierarchy of cgroup v1, or the one of v2."""
    if (_CGROUP_ROOT / "cgroup.controllers").exists():
        return [_CGROUP_ROOT]
    return sorted({path.resolve() for path in _CGROUP_ROOT.glob("*") if (path / "cgroup.procs").exists()})


def remove_cluster(directory: Path) -> None:
    """End and remove the cluster in `directory`; nothing happens where there is none. Call it under the cache's lock.

    Raises ClusterError naming what does not go away.
    """
    Processes(directory, path="").kill_all()
    _remove_link(host_link(directory))
    _remove_cgroups(cgroup_name(directory))
    _refuse_mounts_below(directory)
    _remove_tree(directory)
    with contextlib.suppress(OSError):  # other clusters are still there
        directory.parent.rmdir()


def remove_abandoned() -> None:
    """Remove every cluster of this cache whose owner died before it could."""
    for directory in state_directories():
        with exclusive(cache_directory()):
            record = read_record(directory)
            # Records are written under this lock, so a directory without one is what a killed start left.
            if record is None or record.abandoned():
                remove_cluster(directory)


def _remove_link(name: str) -> None:
    if Path("/sys/class/net", name).exists():
        # It also goes by itself with the namespace that holds the other end, and may just have done so.
        subprocess.run(["ip", "link", "delete", name], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + _GONE_DEADLINE_S
    while Path("/sys/class/net", name).exists():
        if time.monotonic() > deadline:
            raise ClusterError(f"network interface {name} does not go away")
        time.sleep(0.02)


def _remove_cgroups(name: str) -> None:
    for parent in cgroup_parents():
        top = parent / name
        if top.exists():
            for path in sorted((path for path in top.rglob("*") if path.is_dir()), reverse=True):
                _remove_cgroup(path)
            _remove_cgroup(top)


def _remove_cgroup(path: Path) -> None:
    deadline = time.monotonic() + _GONE_DEADLINE_S
    while True:
        try:
            path.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError as refusal:
            # Busy until the kernel has reaped the last process that was in it.
            if refusal.errno != errno.EBUSY or time.monotonic() > deadline:
                raise ClusterError(f"cgroup {path} does not go away: {refusal.strerror}") from refusal
            time.sleep(0.02)


def _refuse_mounts_below(directory: Path) -> None:
    """A pod's host paths are mounted below its cluster's directory, in a namespace of their own. Should one ever be
    mounted here too, removing the directory would remove what it shows."""
    mounted = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    below = [point for point in mounted if Path(point).is_relative_to(directory)]
    if below:
        raise ClusterError(f"not removing {directory}: {below[0]} is a mount point; unmount it first")


def _remove_tree(directory: Path) -> None:
    deadline = time.monotonic() + _GONE_DEADLINE_S
    while directory.exists():
        try:
            shutil.rmtree(directory)
        except FileNotFoundError:
            continue
        except OSError as refusal:
            # A dying mount namespace may hold its mount points for a moment.
            if time.monotonic() > deadline:
                raise ClusterError(f"cannot remove {directory}: {refusal}") from refusal
            time.sleep(0.05)
