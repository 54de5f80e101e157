"""Where a cluster keeps itself on this machine, and who may touch it.

Everything a cluster writes lies in one directory, `<cache>/clusters/<name>/`; the only other things that outlive a
command are the built binaries beside it. `cluster.json` in that directory says what the cluster is, how far its
start came, and which process owns it. From that one file a later command can tell the three cases apart:

* owner alive: somebody else's cluster, hands off;
* no owner, phase ready: `up` left it running on purpose;
* owner dead: a crashed or killed run. Whoever comes next removes it.

A process is identified by its pid *and* its start time, because pids are reused. Locks are `flock` on directories that
exist anyway, so that a lock leaves no file behind and dies with its holder.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

Profile = Literal["control-plane", "node"]
PROFILES: tuple[Profile, ...] = ("control-plane", "node")

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")


class ClusterError(Exception):
    """Something about the local cluster failed; the message names the part and, where there is one, ends with
    the tail of that part's log."""


def cache_directory() -> Path:
    """The directory for everything that is built once and kept: `$LLMFLEET_CACHE` or `~/.cache/llmfleet`."""
    chosen = os.environ.get("LLMFLEET_CACHE")
    directory = Path(chosen) if chosen else Path.home() / ".cache" / "llmfleet"
    directory.mkdir(parents=True, exist_ok=True)
    return directory.resolve()


def cluster_directory(name: str) -> Path:
    """The state directory of the cluster `name` (it need not exist).

    Raises ClusterError for a name that could not be a directory, a host name and a cgroup at once.
    """
    if not _NAME.fullmatch(name):
        raise ClusterError(
            f"cluster name {name!r} is refused: use at most 40 lower-case letters, digits and inner hyphens"
        )
    return cache_directory() / "clusters" / name


@contextlib.contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Hold the machine-wide lock that belongs to an existing directory; waits for the present holder."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Owner:
    """A process as it can be found again: its pid and its start time in clock ticks since boot."""

    pid: int
    started_ticks: int

    @classmethod
    def this_process(cls) -> Owner:
        started = _start_ticks(os.getpid())
        assert started is not None
        return cls(os.getpid(), started)

    def alive(self) -> bool:
        return _start_ticks(self.pid) == self.started_ticks


def _start_ticks(pid: int) -> int | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The second field is the command in parentheses and may hold anything; field 22 counts from after it.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else int(fields[19])


@dataclass(frozen=True)
class Record:
    """What `cluster.json` says.

    port: the API server's. block: the /16 whose parts a node-profile cluster uses for its link, pods and services;
    None in the control-plane profile. owner: None once the cluster is meant to outlive
    the process that started it.
    """

    name: str
    profile: Profile
    phase: Literal["starting", "ready"]
    owner: Owner | None
    port: int
    block: str | None

    def abandoned(self) -> bool:
        return self.owner is not None and not self.owner.alive()

    def save(self, directory: Path) -> None:
        partial = directory / "cluster.json.partial"
        partial.write_text(json.dumps(asdict(self), indent=1) + "\n")
        partial.replace(directory / "cluster.json")


def read_record(directory: Path) -> Record | None:
    """The record in a state directory; None where there is none (not even a half-written cluster)."""
    try:
        fields = json.loads((directory / "cluster.json").read_text())
    except FileNotFoundError:
        return None
    owner = fields.pop("owner")
    return Record(owner=Owner(**owner) if owner else None, **fields)


def state_directories() -> list[Path]:
    """The state directories of every cluster of this cache, running or left over."""
    clusters = cache_directory() / "clusters"
    return sorted(path for path in clusters.glob("*") if path.is_dir())


def tag(directory: Path) -> str:
    """Eight hex digits that tell this state directory apart from every other on the machine, for names in shared
    places (network links, cgroups) that two caches could otherwise both claim."""
    return hashlib.sha256(str(directory).encode()).hexdigest()[:8]
