"""The programs of the cluster, built from their Go modules and kept by version.

`binaries/<module>/` holds one Go module per upstream project (their dependency graphs do not agree with each
other), each with a go.mod that pins the version and a go.sum that pins every checksum. The upstream version is
written nowhere else: it is read from the go.mod, linked into the binary and asked back from it.

Built programs lie in `<cache>/binaries-<hash>/`, where the hash covers everything that decides what comes out: the
module files, the sources and flags here, and the Go version. So a changed pin builds beside the old directory, and
the second start builds nothing. Each program appears under its name only when complete (built aside, then renamed);
a lock lets one builder work while others wait and then find the work done. A program that the machine already has in
exactly the pinned version, in `$KUBEBUILDER_ASSETS` or on PATH, is linked instead of built.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e2e.cluster.processes import clean_environment
from e2e.cluster.state import ClusterError, Profile, cache_directory, exclusive

_MODULES = Path(__file__).parent / "binaries"
_STAGES = "kwok-stages"

Report = Callable[[str], None]


@dataclass(frozen=True)
class Program:
    """How one program is built: the package inside one of our modules, build tags, the variables that the linker
    sets to the upstream version, and the arguments that make the program print it."""

    module: str
    package: str
    upstream: str | None = None
    tags: str = ""
    version_variables: tuple[str, ...] = ()
    version_arguments: tuple[str, ...] = ("--version",)


def _kubernetes(name: str, *version_arguments: str) -> Program:
    return Program(
        module="kubernetes",
        package=f"k8s.io/kubernetes/cmd/{name}",
        upstream="k8s.io/kubernetes",
        # The tags of the release builds: the linker may drop what only tests and tracing would reach.
        tags="selinux,notest,grpcnotrace",
        version_variables=(
            "k8s.io/component-base/version.gitVersion",
            "k8s.io/client-go/pkg/version.gitVersion",
        ),
        version_arguments=version_arguments or ("--version",),
    )


def _containerd(name: str) -> Program:
    upstream = "github.com/containerd/containerd/v2"
    return Program(
        module="containerd",
        package=f"{upstream}/cmd/{name}",
        upstream=upstream,
        tags="no_btrfs",
        version_variables=(f"{upstream}/version.Version",),
        version_arguments=("-v",),
    )


# In the order in which they are built: what the control-plane profile needs comes first.
PROGRAMS: dict[str, Program] = {
    "etcd": Program("etcd", ".", upstream="go.etcd.io/etcd/server/v3"),
    "kube-apiserver": _kubernetes("kube-apiserver"),
    "kube-controller-manager": _kubernetes("kube-controller-manager"),
    "kube-scheduler": _kubernetes("kube-scheduler"),
    "kubectl": _kubernetes("kubectl", "version", "--client"),
    "kwok": Program("kwok", "sigs.k8s.io/kwok/cmd/kwok", upstream="sigs.k8s.io/kwok"),
    "kubelet": _kubernetes("kubelet"),
    "kube-proxy": _kubernetes("kube-proxy"),
    "containerd": _containerd("containerd"),
    "containerd-shim-runc-v2": _containerd("containerd-shim-runc-v2"),
    "ctr": _containerd("ctr"),
    "pause": Program("pause", "."),
    "helm": Program(
        module="helm",
        package="helm.sh/helm/v3/cmd/helm",
        upstream="helm.sh/helm/v3",
        version_variables=("helm.sh/helm/v3/internal/version.version",),
        version_arguments=("version", "--short"),
    ),
}

_CONTROL_PLANE = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl", "kwok")
_NODE = ("kubelet", "kube-proxy", "containerd", "containerd-shim-runc-v2", "ctr", "pause")
NEEDED: dict[Profile, tuple[str, ...]] = {"control-plane": _CONTROL_PLANE, "node": _CONTROL_PLANE + _NODE}


@dataclass(frozen=True)
class Binaries:
    """A directory that holds the programs asked for, and kwok's stage files."""

    directory: Path

    def __getitem__(self, program: str) -> Path:
        return self.directory / program

    @property
    def kwok_stages(self) -> list[Path]:
        return sorted((self.directory / _STAGES).glob("*.yaml"))

    @property
    def search_path(self) -> str:
        """A PATH with ours first: containerd runs whichever shim comes first, and Debian's runc package may bring
        one of containerd 1.6 along."""
        return os.pathsep.join([str(self.directory), os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def upstream_version(program: Program) -> str | None:
    """The version that the program's go.mod pins, such as `v1.36.3`; None for our own programs."""
    if program.upstream is None:
        return None
    text = (_MODULES / program.module / "go.mod").read_text()
    pinned = re.search(rf"^\s*(?:require )?{re.escape(program.upstream)} (v\S+)", text, re.MULTILINE)
    if pinned is None:
        raise ClusterError(f"{program.module}/go.mod does not require {program.upstream}")
    return pinned[1]


def binaries_directory() -> Path:
    """Where the programs of this checkout and this Go version belong, whether they are built or not.

    Raises ClusterError where there is no Go.
    """
    if shutil.which("go") is None:
        raise ClusterError("go is not on PATH: the local cluster is built from source, install Go 1.26 or later")
    digest = hashlib.sha256(_go(_MODULES, "env", "GOVERSION", "GOOS", "GOARCH").encode())
    digest.update(repr(PROGRAMS).encode())
    for path in sorted(_MODULES.glob("*/*")):
        digest.update(str(path.relative_to(_MODULES)).encode() + b"\0" + path.read_bytes() + b"\0")
    return cache_directory() / f"binaries-{digest.hexdigest()[:16]}"


def ensure_binaries(names: Collection[str], report: Report) -> Binaries:
    """Build (or find) the named programs and return their directory; `report` gets a line per program built.

    Raises ClusterError with the compiler's words when a build fails.
    """
    binaries = Binaries(binaries_directory())
    wanted = [name for name in PROGRAMS if name in names]
    if all(_present(binaries, name) for name in wanted):
        return binaries
    binaries.directory.mkdir(exist_ok=True)
    with exclusive(binaries.directory):
        missing = [name for name in wanted if not _present(binaries, name)]
        timing = _Timing(binaries.directory)
        for position, name in enumerate(missing, start=1):
            report(f"building {name} ({position} of {len(missing)}) ...")
            begun = time.monotonic()
            timing.begin(name)
            how = _provide(binaries, name)
            seconds = time.monotonic() - begun
            timing.end(name, seconds)
            report(f"  {name} {how} in {seconds:.0f} s")
    return binaries


class _Timing:
    """`build.json` beside the programs: seconds per program built, and whether they add up to a cold build: the first
    began with an empty Go build cache, and none was interrupted (what it had compiled would be missing)."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "build.json"
        if not self._path.exists():
            go_cache = Path(_go(_MODULES, "env", "GOCACHE").strip())
            cold = not any(go_cache.glob("[0-9a-f][0-9a-f]/*-d"))
            self._write({"cold": cold, "unfinished": None, "seconds": {}})

    def begin(self, name: str) -> None:
        record = self._read()
        self._write(record | {"cold": record["cold"] and record["unfinished"] is None, "unfinished": name})

    def end(self, name: str, seconds: float) -> None:
        record = self._read()
        self._write(record | {"unfinished": None, "seconds": record["seconds"] | {name: round(seconds, 1)}})

    def _read(self) -> dict[str, Any]:
        record: dict[str, Any] = json.loads(self._path.read_text())
        return record

    def _write(self, record: dict[str, Any]) -> None:
        self._path.write_text(json.dumps(record, indent=1) + "\n")


def recorded_cold_build_s() -> float | None:
    """Seconds of a complete build that began with an empty Go build cache; None where none was recorded, or where
    some program was found on the machine instead of built."""
    directory = binaries_directory()
    try:
        record = json.loads((directory / "build.json").read_text())
    except FileNotFoundError:
        return None
    seconds: dict[str, float] = record["seconds"]
    found = [name for name in PROGRAMS if (directory / name).is_symlink()]
    complete = record["cold"] and seconds.keys() == PROGRAMS.keys() and not found
    return sum(seconds.values()) if complete else None


def _present(binaries: Binaries, name: str) -> bool:
    path = binaries[name]
    if path.is_symlink():  # somebody else's program may have been removed or upgraded since
        return in_right_version(path, PROGRAMS[name])
    return path.exists() and (name != "kwok" or bool(binaries.kwok_stages))


def _provide(binaries: Binaries, name: str) -> str:
    program = PROGRAMS[name]
    if name == "kwok":
        _copy_kwok_stages(binaries.directory / _STAGES)
    target = binaries[name]
    target.unlink(missing_ok=True)
    if found := _installed(name, program):
        target.symlink_to(found)
        return f"found as {found}"
    partial = target.with_name(f".{name}.partial")
    version = upstream_version(program)
    link = " ".join(["-s -w", *(f"-X {variable}={version}" for variable in program.version_variables)])
    flags = ["-trimpath", "-mod=readonly", "-buildvcs=false", f"-tags={program.tags}", f"-ldflags={link}"]
    try:
        _go(_MODULES / program.module, "build", *flags, "-o", str(partial), program.package)
        if not in_right_version(partial, program):
            raise ClusterError(f"the {name} just built does not call itself {version}")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return "built"


def _copy_kwok_stages(target: Path) -> None:
    """The fast stages that ship inside kwok's module: nodes become Ready and pods Running at once."""
    module = PROGRAMS["kwok"]
    _go(_MODULES / module.module, "mod", "download", str(module.upstream))
    found = _go(_MODULES / module.module, "list", "-m", "-f", "{{.Dir}}", str(module.upstream)).strip()
    target.mkdir(exist_ok=True)
    for kind in ("node", "pod"):
        for stage in (Path(found) / "kustomize" / "stage" / kind / "fast").glob(f"{kind}-*.yaml"):
            (target / stage.name).write_bytes(stage.read_bytes())


def _installed(name: str, program: Program) -> Path | None:
    if program.upstream is None:
        return None
    search = os.pathsep.join([os.environ.get("KUBEBUILDER_ASSETS", ""), os.environ.get("PATH", "")])
    found = shutil.which(name, path=search)
    return Path(found).resolve() if found and in_right_version(Path(found), program) else None


def in_right_version(path: Path, program: Program) -> bool:
    """Whether the executable at `path` says that it is exactly the version we pin."""
    version = upstream_version(program)
    if version is None:
        return True
    try:
        said = subprocess.run(
            [path, *program.version_arguments], capture_output=True, text=True, timeout=30, env=clean_environment()
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    exact = rf"(?<![\w.])v?{re.escape(version.removeprefix('v'))}(?![\w.+~-])"
    return said.returncode == 0 and re.search(exact, said.stdout) is not None


def _go(module: Path, *arguments: str) -> str:
    environment = os.environ | {"CGO_ENABLED": "0", "GOWORK": "off"}
    done = subprocess.run(["go", *arguments], cwd=module, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise ClusterError(f"`go {' '.join(arguments)}` failed in {module} (its words are above)")
    return done.stdout
