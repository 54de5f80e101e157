"""The processes of one cluster: started, watched, waited for and ended by whoever owns the cluster.

Every process carries two environment variables: which state directory it belongs to, and which component it is.
They are inherited by whatever it starts, so the kernel's process table is itself the record of what is running:
a later command, in another process, finds and ends exactly these, even after a crash between starting a process
and writing its pid down. No pid file can be stale because there is none.

The table shows marks only once the new program is in place. Two moments before that are accounted for. While the
kernel lays the new program out, the process has no environment at all: it is looked at again. Between fork and exec it
still has its parent's; but it holds the lock on its log, which was taken before the fork and which its program keeps
with the log itself. So nothing of the cluster runs any more when no marks are found *and* nobody holds a log.

In the node profile a component runs inside the cluster's namespaces through `nsenter`; the waiting nsenter and the
component itself carry the same marks and are ended together.

Each component writes to `logs/<component>.log`. Whoever waits for something names the components it depends on:
when one of them ends, or the deadline passes, the error carries the ends of their logs.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from e2e.cluster.state import ClusterError

_DIRECTORY_MARK = "LLMFLEET_CLUSTER_DIRECTORY"
_COMPONENT_MARK = "LLMFLEET_CLUSTER_COMPONENT"
_LOG_TAIL_LINES = 20
_EXEC_DEADLINE_S = 10.0
"""How long a process may be between two programs before a search goes on without it."""
# Of proc_pid_stat(5), counted from the field after the command.
_STAT_STATE, _STAT_FLAGS, _STAT_ENV_START, _STAT_ENV_END = 0, 6, 47, 48
# Of the kernel's include/linux/sched.h: PF_EXITING, PF_KTHREAD.
_ENDS_OR_HAS_NO_PROGRAM = 0x4 | 0x200000


def clean_environment() -> dict[str, str]:
    """This process's environment without what would lead a cluster's own traffic elsewhere: proxies, and the
    user's kubeconfig."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.lower().endswith("_proxy") and name != "KUBECONFIG"
    }


def marked_environment(directory: Path, component: str) -> dict[str, str]:
    """The environment of a process that belongs to the cluster in `directory` and is ended with it at the latest."""
    return clean_environment() | {_DIRECTORY_MARK: str(directory), _COMPONENT_MARK: component}


class Processes:
    """The components of the cluster in `directory`; `path` is the PATH they get (our binaries first)."""

    def __init__(self, directory: Path, path: str) -> None:
        self.directory = directory
        self._path = path
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def environment(self, component: str) -> dict[str, str]:
        return marked_environment(self.directory, component) | {"PATH": self._path}

    def start(self, component: str, command: Sequence[str | Path]) -> int:
        """Start a component in the state directory, in a session of its own; returns its pid."""
        logs = self.directory / "logs"
        logs.mkdir(exist_ok=True)
        with open(logs / f"{component}.log", "ab") as log:
            # Shared with what an earlier start of this component may have left behind.
            fcntl.flock(log, fcntl.LOCK_SH)
            child = subprocess.Popen(
                [str(word) for word in command],
                cwd=self.directory,
                env=self.environment(component),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._children[component] = child
        return child.pid

    def pids(self, component: str | None = None) -> list[int]:
        """The live processes of one component, or of the whole cluster, whoever started them."""
        for child in self._children.values():
            child.poll()
        return marked_processes(self.directory, component)

    def alive(self, component: str) -> bool:
        child = self._children.get(component)
        return child.poll() is None if child else bool(self.pids(component))

    def stop(self, component: str, grace_s: float) -> None:
        """End a component: SIGTERM, and SIGKILL for what is left after `grace_s`. Returns when it is gone."""
        _signal(self.pids(component), signal.SIGTERM)
        if not self._gone_within(grace_s, component):
            _signal(self.pids(component), signal.SIGKILL)
            if not self._gone_within(10, component):
                raise ClusterError(f"{component} does not end: pids {self.pids(component)}")
        if child := self._children.pop(component, None):
            child.wait()

    def kill_all(self) -> None:
        """End every process of the cluster at once, its containers included; their data is about to be removed."""
        deadline = time.monotonic() + 20
        while (left := self.pids()) or (held := self._held_logs()):
            if time.monotonic() > deadline:
                what = f"processes {left}" if left else f"processes without marks that write {', '.join(held)}"
                raise ClusterError(f"{what} of {self.directory} do not end")
            _signal([pid for pid in left if not _waits_for_a_namespace(pid)], signal.SIGKILL)
            time.sleep(0.02)
        for child in self._children.values():
            child.wait()
        self._children.clear()

    def _held_logs(self) -> list[str]:
        """Logs that a process still holds, found by its marks or not."""
        return [log.name for log in sorted((self.directory / "logs").glob("*.log")) if _is_held(log)]

    def _gone_within(self, seconds: float, component: str) -> bool:
        deadline = time.monotonic() + seconds
        while self.pids(component):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def log_tail(self, component: str) -> str:
        try:
            lines = (self.directory / "logs" / f"{component}.log").read_text(errors="replace").splitlines()
        except FileNotFoundError:
            return f"--- {component} wrote no log"
        return "\n".join([f"--- end of {component}'s log:", *lines[-_LOG_TAIL_LINES:]])

    def wait(self, what: str, check: Callable[[], bool], components: Sequence[str], deadline_s: float) -> None:
        """Poll `check` until it is true.

        Raises ClusterError when one of `components` has ended or `deadline_s` has passed, with the ends of
        their logs.
        """
        deadline = time.monotonic() + deadline_s
        while not check():
            dead = [component for component in components if not self.alive(component)]
            if dead:
                raise ClusterError(f"{dead[0]} ended while waiting for {what}\n{self.log_tail(dead[0])}")
            if time.monotonic() > deadline:
                tails = "\n".join(self.log_tail(component) for component in components)
                raise ClusterError(f"no {what} within {deadline_s:g} s\n{tails}")
            time.sleep(0.05)


def marked_processes(directory: Path, component: str | None = None) -> list[int]:
    """Pids of the live processes that carry the marks of a state directory (and of one of its components)."""
    wanted: Mapping[str, str] = {_DIRECTORY_MARK: str(directory)} | ({_COMPONENT_MARK: component} if component else {})
    marks = {f"{name}={value}".encode() for name, value in wanted.items()}
    found = []
    deadline = time.monotonic() + _EXEC_DEADLINE_S
    for entry in os.listdir("/proc"):
        # Gone meanwhile, or another user's: either way not ours.
        with contextlib.suppress(OSError):
            if entry.isdigit() and marks <= set(environment_of(int(entry), deadline).split(b"\0")):
                found.append(int(entry))
    return found


def environment_of(pid: int, deadline: float) -> bytes:
    """What a process was started with: `NAME=value` and a NUL each; empty for a kernel thread or one that ends.

    Waits for a process that is just being given a new program, until `time.monotonic()` is past `deadline`. Raises
    OSError where it is gone or another user's.
    """
    process = Path("/proc", str(pid))
    while True:
        environment = (process / "environ").read_bytes()
        if environment or not _has_an_environment(process) or time.monotonic() > deadline:
            return environment
        time.sleep(0.001)


def _has_an_environment(process: Path) -> bool:
    """Whether there is something to read in `environ`, or will be once the kernel has laid the program out."""
    fields = (process / "stat").read_text(errors="replace").rpartition(")")[2].split()
    has_program = fields[_STAT_STATE] not in "ZX" and not int(fields[_STAT_FLAGS]) & _ENDS_OR_HAS_NO_PROGRAM
    start, end = int(fields[_STAT_ENV_START]), int(fields[_STAT_ENV_END])
    return has_program and (end == 0 or end > start)


def _is_held(log: Path) -> bool:
    with contextlib.suppress(FileNotFoundError), open(log, "rb") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _waits_for_a_namespace(pid: int) -> bool:
    """Whether this is the `unshare` whose child is a PID namespace's first process.

    It ends by itself when the kernel has ended everything in the namespace, containers (which carry no marks)
    included; waiting for it is waiting for them.
    """
    try:
        command = Path(f"/proc/{pid}/comm").read_text().strip()
        return command == "unshare" and bool(Path(f"/proc/{pid}/task/{pid}/children").read_text())
    except OSError:
        return False


def _signal(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
