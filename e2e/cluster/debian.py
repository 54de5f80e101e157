"""What the node profile takes from the distribution: runc, the CNI plug-ins, iptables, conntrack, iproute2.

Installed with apt-get when a command is missing; on other systems they must be there already, wherever they come
from.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from e2e.cluster.binaries import Report
from e2e.cluster.state import ClusterError

# Command, or CNI plug-in, and the Debian package that brings it.
_COMMANDS = {
    "runc": "runc",
    "iptables": "iptables",
    "conntrack": "conntrack",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "mount": "mount",
}
_PLUGINS = ("bridge", "host-local", "loopback", "portmap")
_PLUGIN_PACKAGE = "containernetworking-plugins"
_PLUGIN_DIRECTORIES = (Path("/usr/lib/cni"), Path("/opt/cni/bin"), Path("/usr/libexec/cni"))


def cni_plugins() -> Path | None:
    """The directory that holds every CNI plug-in we use, or None."""
    for directory in _PLUGIN_DIRECTORIES:
        if all((directory / plugin).exists() for plugin in _PLUGINS):
            return directory
    return None


def ensure_packages(search_path: str, report: Report) -> None:
    """Install what is missing of the commands above.

    Raises ClusterError, naming the missing packages, where we are not root, have no apt-get, or it fails.
    """
    missing = _missing(search_path)
    if not missing:
        return
    names = " ".join(missing)
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise ClusterError(f"the node profile needs {names}: install what these Debian packages hold, then try again")
    report(f"installing Debian packages {names} ...")
    for arguments in (["update"], ["install", "--yes", "--no-install-recommends", *missing]):
        done = subprocess.run(
            ["apt-get", "-qq", *arguments],
            env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise ClusterError(f"apt-get {arguments[0]} failed while installing {names}: {done.stderr.strip()}")
    if missing := _missing(search_path):
        raise ClusterError(f"apt-get installed {names}, but {' '.join(missing)} still lacks its commands")


def _missing(search_path: str) -> list[str]:
    packages = [package for name, package in _COMMANDS.items() if shutil.which(name, path=search_path) is None]
    return packages if cni_plugins() else [*packages, _PLUGIN_PACKAGE]
